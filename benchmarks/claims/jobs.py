"""Which runs are missing, and the calls that make them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path

from activedpo_fast.demo.reviews import Rating
from benchmarks.claims import known_reward, reviews
from benchmarks.claims.experiments import Experiment, Variant
from benchmarks.claims.results import Results, Run
from benchmarks.claims.workers import Job
from benchmarks.claims.world import make_world

WORK = Path("runs/claims")
# Runs that show how far the bound of the theory holds.
BOUND_OF = tuple(
    f'{method} | {{"reward": "{reward}"}}'.replace('{"reward": "linear"}', "{}")
    for method in ("random", "activedpo, none")
    for reward in ("linear", "synopsis")
)


def missing_runs(
    results: Results, chosen: Sequence[Experiment], most: int | None
) -> dict[tuple[int, str], Variant]:
    """By seed and key, the lowest seeds first."""
    found = {}
    for experiment in chosen:
        seeds = min(experiment.seeds, most or experiment.seeds)
        for variant in experiment.variants:
            for seed in set(range(seeds)) - results.runs(variant.key).keys():
                found[seed, variant.key] = variant
    return dict(sorted(found.items(), key=lambda entry: entry[0][0]))


def known_reward_jobs(missing: dict[tuple[int, str], Variant]) -> list[Job]:
    """One job per world, which takes as long to make as several runs in it."""
    for reward in {variant.setting.reward for variant in missing.values()}:
        make_world(reward, 0, WORK)  # what worlds share is kept on disk, before processes need it
    worlds: dict[tuple[int, str, float], list[Variant]] = {}
    for (seed, _), variant in missing.items():
        world = (seed, variant.setting.reward, variant.setting.duplicates)
        worlds.setdefault(world, []).append(variant)
    return [
        Job(seed, _in_one_world, (seed, reward, duplicates, variants), len(variants))
        for (seed, reward, duplicates), variants in worlds.items()
    ]


def _in_one_world(
    seed: int, reward: str, duplicates: float, variants: Sequence[Variant]
) -> dict[str, Run]:
    logging.getLogger("activedpo_fast").setLevel(logging.ERROR)
    world = make_world(reward, seed, WORK, duplicates)
    found = {}
    for variant in variants:
        run = known_reward.run(world, variant.method, variant.setting, seed)._asdict()
        if variant.key not in BOUND_OF:
            del run["error"], run["width"]
        found[variant.key] = run
    return found


def review_jobs(missing: dict[tuple[int, str], Variant]) -> list[Job]:
    """One job per run."""
    return [
        Job(seed, _with_one_method, (seed, variant), 1) for (seed, _), variant in missing.items()
    ]


@functools.cache
def _rating() -> Rating:
    return Rating()


def _with_one_method(seed: int, variant: Variant) -> dict[str, Run]:
    reviews.quiet()
    folder = WORK / "reviews" / f"{variant.key}-{seed}".translate({ord(c): "_" for c in ' |{}":,'})
    return {variant.key: reviews.run(variant.method, variant.setting, seed, folder, _rating())}
