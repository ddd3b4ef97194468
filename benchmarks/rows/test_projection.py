"""Projections of ready gradients, 8 of 1,000,000 numbers each, to k = 4096, compared with their
bounds.

The arrays that take turns are together larger than the caches, as new gradients would be.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from activedpo_fast import ops
from benchmarks.rows.measure import errors, side_by_side
from benchmarks.rows.peers import PROJECTION_PEERS, ProjectionPeer, title

N, D, K, KEY = 8, 1_000_000, 4096, 12345


@pytest.fixture(scope="module")
def gradients() -> list[Tensor]:
    """Some entries carry most of the norm, as in real gradients."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(N, D, generator=generator) * torch.rand(D, generator=generator) ** 4
        for _ in range(8)
    ]


def product(x: Tensor) -> Tensor:
    """[N, D] @ [D, K] in blocks of D, with a matrix that exists already."""
    block = product.__dict__.setdefault("block", torch.randn(10_000, K))
    return sum(x[:, start : start + len(block)] @ block for start in range(0, D, len(block)))


def read(x: Tensor) -> Tensor:
    return x.sum(dim=1)


def sjlt(x: Tensor) -> Tensor:
    out = torch.zeros(N, K)
    ops.sjlt_(out, x, KEY)
    return out


def rademacher(x: Tensor) -> Tensor:
    out = torch.zeros(N, K)
    ops.rademacher_(out, x, KEY)
    return out


@pytest.mark.parametrize(
    ("function", "floor", "what"),
    [(sjlt, read, "**ours**, sjlt"), (rademacher, product, "**ours**, rademacher")],
)
def test_ours(benchmark, gradients: list[Tensor], function, floor, what: str) -> None:
    _measure(benchmark, gradients, what, function, floor)


@pytest.mark.parametrize("peer", PROJECTION_PEERS, ids=lambda peer: peer.name)
def test_peer(benchmark, gradients: list[Tensor], peer: ProjectionPeer) -> None:
    name = title(peer)
    if name is None:
        pytest.skip(f"{peer.package} is not installed (make bench installs it)")
    dense = peer.name.endswith(("rademacher", "BasicProjector"))
    _measure(benchmark, gradients, name, peer.make(D, K), product if dense else read)


def _measure(
    benchmark,
    gradients: list[Tensor],
    name: str,
    function: Callable[[Tensor], Tensor],
    floor: Callable[[Tensor], Tensor],
) -> None:
    turns, floor_turns = itertools.cycle(gradients), itertools.cycle(gradients)
    benchmark.group = "projection"
    benchmark.extra_info.update(
        contender=name, floor="the bare matrix product" if floor is product else "reading once"
    )
    rounds = 40 if floor is read else 3 if function is rademacher else 1
    result = side_by_side(
        benchmark, lambda: function(next(turns)), lambda: floor(next(floor_turns)), rounds=rounds
    )
    # The only round was on the first array.
    sketched = function(gradients[0]) if rounds > 1 else result
    benchmark.extra_info.update(errors(sketched, gradients[0]))
