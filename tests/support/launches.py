"""The kernels that the host functions launch, as Triton specializes them, without running any.

    python -m tests.support.launches FILE

calls every function of the kernels on tensors of many shapes and writes JSON: what is wrong with a
launch, the launches that are no variant of activedpo_fast.kernels.variants, the names of all
variants, and those that nothing launched. The tensors are on the CPU; types, constants and
alignments are found by Triton's own code, for a GPU that is not there. Numbers are never looked at.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from activedpo_fast.kernels.lora_grad_rademacher import lora_grad_rademacher, rademacher_rows
from activedpo_fast.kernels.lora_grad_sketch import lora_grad_sketches
from activedpo_fast.kernels.response_logp_grad import response_logp_grad
from activedpo_fast.kernels.sjlt_rows import sjlt_rows
from activedpo_fast.kernels.variants import LAUNCH, Variant, all_variants

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIDES = (1, 8, 24, 64, 200, 2048)  # of a gradient; ranks among them
DIMENSIONS = (1, 100, 8192)
VOCABULARIES = (1, 1000, 1024, 32000, 50257, 128256)
KEYS = (0, 5, 2**64 - 1)
GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)


@contextmanager
def recorded(wrong: set[str]) -> Iterator[list[Variant]]:
    """Record launches as variants, in order, without compiling or running anything; wrong ones go
    into `wrong`."""
    found: list[Variant] = []
    run, backend = JITFunction.run, make_backend(GPUTarget("cuda", 90, 32))

    @cache  # each is compiled by Python, and there are thousands of launches of few kernels
    def binder(kernel: Any) -> Any:
        return create_function_from_signature(kernel.signature, kernel.params, backend)

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        wrong.update(
            f"{self.__name__} is launched without {name}={value}"
            for name, value in LAUNCH.items()
            if options.get(name) != value
        )
        wrong.update(
            f"{self.__name__} is launched on a grid of {grid}"
            for size, most in zip(grid, GRID, strict=False)
            if not 0 < size <= most
        )
        packed = self._pack_args(backend, options, *binder(self)(*args, **options))
        compiled, signature, constants, attributes = packed
        found.append(
            Variant(
                self,
                self.__name__,
                signature,
                {self.arg_names[path[0]]: value for path, value in constants.items()},
                compiled.num_warps,
                compiled.num_stages,
                tuple(self.arg_names[path[0]] for path, value in attributes.items() if value),
                compiled.maxnreg,
            )
        )

    JITFunction.run = record
    try:
        yield found
    finally:
        JITFunction.run = run


def call_all() -> None:
    """Call every host function on shapes that lead to every configuration, and on views."""
    for rows, columns, dtype, k in product(SIDES, SIDES, DTYPES, DIMENSIONS):
        gradients(2, rows, columns, dtype, k, KEYS[rows % 3], shift=0)
    for n, dtype, shift in product((1, 40, 100, 200), DTYPES, (0, 1)):
        gradients(n, 16, 70, dtype, 1000, 5, shift)
    for n, length, k, shift in product((1, 3, 40), (1, 70, 5000), DIMENSIONS, (0, 1)):
        x, out = empty(n, length, torch.float32, shift), empty(n, k, torch.float32, shift)
        for key, deterministic in zip(KEYS, (True, False, True), strict=True):
            sjlt_rows(out, x, key, deterministic)
            rademacher_rows(out, x, key)
    for vocabulary, dtype, shift in product(VOCABULARIES, DTYPES, (0, 1)):
        logits = empty(3, vocabulary, dtype, shift)
        for weights in (None, torch.ones(3)):
            response_logp_grad(logits, torch.zeros(3, dtype=torch.int64), weights)


def gradients(
    n: int, rows: int, columns: int, dtype: torch.dtype, k: int, key: int, shift: int
) -> None:
    """Sketch the gradients of n segments, the first of which is split in two."""
    left, right = empty(n + 1, rows, dtype, shift), empty(n + 1, columns, dtype, shift)
    out = empty(n, k, torch.float64, shift)
    segments = torch.tensor([[0, 1, 0], *([i, i + 1, i - 1] for i in range(1, n + 1))])
    for method, deterministic in product(("sjlt", "kronecker"), (True, False)):
        lora_grad_sketches(out, [(left, right, key)], segments, method, deterministic)
    lora_grad_rademacher(out, left, right, segments, key)


def empty(rows: int, columns: int, dtype: torch.dtype, shift: int) -> torch.Tensor:
    """A tensor, or a view without its first column, which is not aligned to 16 bytes."""
    return torch.empty(rows, columns + shift, dtype=dtype)[:, shift:]


def what(variant: Variant) -> tuple[Any, ...]:
    """Everything that distinguishes binaries."""
    return (
        variant.kernel.__name__,
        *variant.signature.items(),
        *sorted((name, repr(value)) for name, value in variant.constants.items()),
        variant.num_warps,
        variant.num_stages,
        variant.maxnreg,
        *sorted(variant.aligned),
    )


def main() -> None:
    wrong: set[str] = set()
    with recorded(wrong) as launches:
        call_all()
    known = {what(variant): variant for variant in all_variants()}
    seen = {what(launch): launch for launch in launches}
    Path(sys.argv[1]).write_text(
        json.dumps(
            {
                "variants": [variant.name for variant in known.values()],
                "launches": len(launches),
                "wrong": sorted(wrong),
                "unknown": [
                    asdict(replace(launch, kernel=None))
                    for key, launch in seen.items()
                    if key not in known
                ],
                "idle": [variant.name for key, variant in known.items() if key not in seen],
            },
            default=repr,
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
