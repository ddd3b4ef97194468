"""Time, memory and error of one contender, for one row of a table."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def side_by_side(
    benchmark: Any, function: Callable[[], Any], yardstick: Callable[[], Any], *, rounds: int
) -> Any:
    """Time `function` with pytest-benchmark, each round right after one of `yardstick`.

    Machines drift; a ratio of neighbors does not. The median of the rounds' ratios goes into the
    benchmark's extra info as "ratio", beside the two medians in seconds.

    Returns:
        The last result of `function`.
    """
    ours: list[float] = []
    theirs: list[float] = []
    result: list[Any] = [None]

    def timed() -> None:
        ours.append(seconds(lambda: result.__setitem__(0, function())))

    def before() -> None:
        theirs.append(seconds(yardstick))

    warmup = 1 if rounds > 1 else 0
    benchmark.pedantic(timed, setup=before, rounds=rounds, warmup_rounds=warmup)
    ratios = [a / b for a, b in zip(ours[warmup:], theirs[warmup:], strict=True)]
    benchmark.extra_info["ratio"] = statistics.median(ratios)
    benchmark.extra_info["seconds"] = statistics.median(ours[warmup:])
    benchmark.extra_info["yardstick_seconds"] = statistics.median(theirs[warmup:])
    return result[0]


def peak_memory(function: Callable[[], Any]) -> float | None:
    """The largest increase of the process's resident memory while `function` ran, in MiB.

    None if the system does not report it (Linux does, in /proc).
    """
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(
            0
        )  # otherwise, freed memory that is kept would hide new allocations
        refs.write_text("5")  # the high-water mark starts again
    except (OSError, AttributeError):
        return None

    def read(field: str) -> float:
        line = next(x for x in status.read_text().splitlines() if x.startswith(field + ":"))
        return int(line.split()[1]) / 1024

    before = read("VmRSS")
    function()
    return read("VmHWM") - before


def gram(rows: torch.Tensor) -> torch.Tensor:
    """Inner products of all rows, float64 [R, R]."""
    rows = rows.double()
    return rows @ rows.T


def errors(rows: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """How far sketched rows [R, k] are from exact ones [R, D], both divided by the exact norms.

    "cosine error": the root mean square of <Sx, Sy> - <x, y> over x ≠ y, about 1/√k for an ideal
    projection of rows that are almost orthogonal; "norm distortion": that of ‖Sx‖ − 1.
    """
    norms = exact.double().norm(dim=1, keepdim=True)
    difference = gram(rows.double() / norms) - gram(exact.double() / norms)
    off = ~torch.eye(len(rows), dtype=torch.bool)
    distortion = (rows.double() / norms).norm(dim=1) - 1
    return {
        "cosine error": float(difference[off].square().mean().sqrt()),
        "norm distortion": float(distortion.square().mean().sqrt()),
    }
