"""The section "selection" of `benchmarks.gpu`: greedy log-det on the GPU next to the torch loop.

The rows are artificial: a common part for each prompt, and a spectrum that falls like that of real
gradient rows. Three responses per prompt, every pair of them a candidate.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import combinations
from unittest.mock import patch

import torch
from torch import Tensor

from activedpo_fast.selection.greedy import logdet
from activedpo_fast.selection.greedy.resident import ResidentProblem, on_gpu
from activedpo_fast.selection.pair_features import PairFeatures
from benchmarks.gpu.cases import Case, Found, Record, Settings
from benchmarks.gpu.micro_peers import require
from benchmarks.gpu.timing import wall_seconds
from benchmarks.selection.peers import Problem, ours, rank, sherman_morrison

RESPONSES = 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOOP, REFERENCE = "torch loop, V⁻¹ in place", "ours, PyTorch definitions"
_RANK = 2048  # directions with a falling spectrum
_ROUNDS = 3


def cases(settings: Settings) -> list[Case]:
    """Ours on rows of both types, the loop, and our own definitions on few picks."""
    n, k, picks = (60, 64, 8) if settings.tiny else (100_000, 8192, 1000)
    few = 4 if settings.tiny else 50
    found = [
        Case(f"ours, {dtype} rows", partial(_ours, dtype, n, k, picks, settings), 15, 90)
        for dtype in DTYPES
    ]
    return [
        *found,
        Case(LOOP, partial(_loop, n, k, picks, settings), 15, 60),
        Case(REFERENCE, partial(_reference, n, k, few, settings), 30, 90),
    ]


def problem(n: int, k: int, dtype: str, device: str) -> Problem:
    """N pairs of R = N rows (RESPONSES of three have three pairs), the same for both dtypes."""
    prompts = -(-n // RESPONSES)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    rank = min(_RANK, k)
    spectrum = (1 + torch.arange(rank, device=device)).rsqrt()
    directions = normal(rank, k) / k**0.5 * spectrum[:, None]
    rows = torch.empty(prompts, RESPONSES, k, dtype=DTYPES[dtype], device=device)
    for part in torch.arange(prompts, device=device).split(4096):
        common = normal(len(part), 1, rank)
        own = normal(len(part), RESPONSES, rank)
        noise = normal(len(part), RESPONSES, k) * (0.3 / k**0.5)
        rows[part] = ((common + own) @ directions + noise).to(rows.dtype)
    first = RESPONSES * torch.arange(prompts)[:, None, None]
    pairs = (first + torch.tensor(list(combinations(range(RESPONSES), 2)))).flatten(0, 1)
    return Problem(rows.flatten(0, 1), pairs[:n], "response")


def _ours(dtype: str, n: int, k: int, picks: int, settings: Settings, found: Found) -> Record:
    given = problem(n, k, dtype, settings.device)
    require("greedy_select", given.rows)
    record = _timed(lambda: ours(given, picks), settings)
    return {**record, "dtype": dtype, **_shape(given, picks), **_phases(given, picks, settings)}


def _loop(n: int, k: int, picks: int, settings: Settings, found: Found) -> Record:
    """In float32, as published code runs; its picks are compared with ours for the same rows."""
    given = problem(n, k, "float32", settings.device)
    with torch.device(settings.device):
        record = _timed(lambda: sherman_morrison(given, picks), settings)
    return {
        **record,
        "dtype": "float32",
        **_shape(given, picks),
        **_agreement(record["picked"], found, "float32"),
    }


def _reference(n: int, k: int, picks: int, settings: Settings, found: Found) -> Record:
    """The same function with ACTIVEDPO_BACKEND=reference; few picks: all rows are scored."""
    given = problem(n, k, "float32", settings.device)
    with patch.dict(os.environ, {"ACTIVEDPO_BACKEND": "reference"}):
        record = _timed(lambda: ours(given, picks), settings, rounds=1)
    return {
        **record,
        "dtype": "float32",
        **_shape(given, picks),
        **_agreement(record["picked"], found, "float32"),
    }


def _timed(select: Callable[[], Tensor], settings: Settings, rounds: int = _ROUNDS) -> Record:
    """The median over rounds after a first one, and the picks."""
    picked: list[Tensor] = []
    if rounds > 1:
        select()
    times = [wall_seconds(lambda: picked.append(select()), settings.device) for _ in range(rounds)]
    return {
        "seconds": statistics.median(times),
        "least": min(times),
        "most": max(times),
        "rounds": rounds,
        "picked": picked[-1].tolist(),
        "repeats_agree": all(p.equal(picked[0]) for p in picked),
    }


def _phases(given: Problem, picks: int, settings: Settings) -> Record:
    """The phases of another selection, which waits for the GPU between them.

    norms: of the rows and pairs, measured alone. before: all until the launch, norms among it.
    kernel: by events around the launch. after: the rest. rows_a_pick: rows that were multiplied
    with new directions for a pick, counting repeats.
    """
    norms = wall_seconds(
        lambda: PairFeatures(given.rows, given.pairs, given.normalize), settings.device
    )
    if settings.device != "cuda":
        return {"phases": {"norms": norms}}
    marks: list[float] = []
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def mark() -> None:
        torch.cuda.synchronize()
        marks.append(time.perf_counter())

    def watched(problem: ResidentProblem, show_progress: bool | None) -> None:
        mark()
        begun.record()
        on_gpu(problem, show_progress)
        ended.record()
        mark()

    mark()
    with patch.object(logdet, "on_gpu", watched):
        touched = rank(given, picks).touched
    mark()
    start, launched, done, end = marks
    read = [] if touched is None else touched.tolist()
    return {
        "phases": {
            "norms": norms,
            "before": launched - start,
            "kernel": begun.elapsed_time(ended) / 1e3,
            "after": end - done,
        },
        "rows_a_pick": statistics.mean(read) if read else None,
        "rows_a_pick_most": max(read, default=None),
    }


def _agreement(picked: list[int], found: Found, dtype: str) -> Record:
    """The number of leading picks that are the same as ours, and the number of all that are."""
    other = found.get(f"ours, {dtype} rows", {}).get("picked")
    if other is None:
        return {}
    other = other[: len(picked)]
    same = [a == b for a, b in zip(picked, other, strict=True)]
    return {
        "same_first_picks": (same + [False]).index(False),
        "picks_in_common": len(set(picked) & set(other)),
    }


def _shape(given: Problem, picks: int) -> Record:
    return {
        "pairs": len(given.pairs),
        "rows": len(given.rows),
        "k": given.rows.shape[1],
        "picks": picks,
        "normalize": given.normalize,
    }
