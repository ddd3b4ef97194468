"""Sketches of 8 gradients of 1,000,000 numbers to k = 4096, beside what bounds them.

The SJLT reads every number once, so `scatter_add_` with ready-made indices is its plain rival; the
dense Rademacher sketch has the arithmetic of a float32 matrix product of the same shape.
"""

from __future__ import annotations

import pytest
import torch

from activedpo_fast import ops

N, D, K, KEY = 8, 1_000_000, 4096, 12345


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0))


def test_sjlt(benchmark, x: torch.Tensor) -> None:
    out = torch.zeros(N, K)
    benchmark(ops.sjlt_, out, x, KEY)


def test_scatter_add(benchmark, x: torch.Tensor) -> None:
    """Without drawing the random numbers: buckets and signs are there already."""
    buckets = torch.randint(K, (D,)).expand(N, D)
    signs = torch.randint(2, (D,)).float() * 2 - 1
    out = torch.zeros(N, K)
    benchmark(lambda: out.scatter_add_(1, buckets, x * signs))


def test_rademacher(benchmark, x: torch.Tensor) -> None:
    out = torch.zeros(N, K)
    benchmark.pedantic(ops.rademacher_, (out, x, KEY), rounds=3, warmup_rounds=1)


def test_matrix_product(benchmark, x: torch.Tensor) -> None:
    """[N, D] @ [D, K] in blocks of rows, so that the matrix fits in memory."""
    block = torch.randn(10_000, K)

    def product() -> None:
        for start in range(0, D, len(block)):
            x[:, start : start + len(block)] @ block

    benchmark.pedantic(product, rounds=3, warmup_rounds=1)
