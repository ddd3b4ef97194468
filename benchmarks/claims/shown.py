"""Which runs on disk a table or a picture shows, and their curves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.claims.experiments import Experiment, Variant
from benchmarks.claims.results import Results


def variants_made(results: Results, experiment: Experiment) -> tuple[Variant, ...]:
    """The variants with two runs or more, and not far fewer than others: a table has the seeds that
    all of its lines have, and may be filled in over several days."""
    runs = {v.key: min(len(results.runs(v.key)), experiment.seeds) for v in experiment.variants}
    least = max(2, 2 * max(runs.values()) // 3)
    return tuple(v for v in experiment.variants if runs[v.key] >= least)


def seeds_of(results: Results, experiment: Experiment) -> list[int]:
    """Those that every variant made has a run of, and random picks in each row, all of them sampled
    with the same random numbers."""
    keys = {v.key for v in variants_made(results, experiment)}
    if experiment.compared:
        keys |= {experiment.baseline(v.row).key for v in variants_made(results, experiment)}
    if not keys:
        return []
    common = set.intersection(*(set(results.runs(key)) for key in keys))
    paired = [
        seed
        for seed in common
        if len({results.runs(key)[seed].get("sampler", 1) for key in keys}) == 1
    ]
    return sorted(paired)[: experiment.seeds]


def curves_of(results: Results, variant: Variant, seeds: Sequence[int]) -> NDArray[np.float64]:
    runs = results.runs(variant.key)
    return np.array([runs[seed]["reward"] for seed in seeds])


def costs_of(
    results: Results, made: Sequence[Variant], seeds: Sequence[int]
) -> dict[str, NDArray[np.float64]] | None:
    """Mean passes of each method on the way, where they were counted."""
    runs = {v.method: [results.runs(v.key)[seed] for seed in seeds] for v in made}
    if not all("passes" in run for each in runs.values() for run in each):
        return None
    return {name: np.mean([run["passes"] for run in each], axis=0) for name, each in runs.items()}
