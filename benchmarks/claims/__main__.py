"""Run what is missing of the experiments, and write docs/evidence.md from all runs.

    python -m benchmarks.claims --help
"""

from __future__ import annotations

import logging
import subprocess
import time
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm.auto import tqdm

from activedpo_fast.errors import ActiveDPOError
from benchmarks.claims.evidence import document
from benchmarks.claims.experiments import VERSION, Experiment, Variant, experiments
from benchmarks.claims.known_reward import run
from benchmarks.claims.results import Results
from benchmarks.claims.world import World, make_world
from benchmarks.report import describe_run

RESULTS = Path("benchmarks/results/claims")
WORK = Path("runs/claims")
DOCUMENT = Path("docs/evidence.md")
SAVE_EVERY = 60.0  # seconds
# Runs that show how far the bound of the theory holds.
BOUND_OF = ("random | {}", "activedpo, none | {}")
SECONDS_A_RUN = 0.35  # on one core of the machine named in docs/evidence.md


def main(
    only: Annotated[str, typer.Option(
        help="Run the experiments whose name contains this text.")] = "",
    seeds: Annotated[int | None, typer.Option(
        min=2, help="So many seeds of each, if that is fewer than the experiment has.")] = None,
    fresh: Annotated[bool, typer.Option(help="Forget the runs in the results first.")] = False,
    write: Annotated[bool, typer.Option(help=f"Write {DOCUMENT} and its pictures.")] = True,
    results: Annotated[Path, typer.Option(help="Folder of the runs' JSON.")] = RESULTS,
) -> None:
    """Does the selection save labels? Runs what is missing, then writes the tables."""
    torch.set_num_threads(1)  # a run is many small products
    logging.getLogger("activedpo_fast").setLevel(logging.ERROR)
    path = results / "known_reward.json"
    if fresh:
        path.unlink(missing_ok=True)
    known = Results(path, VERSION)
    chosen = [e for e in experiments() if only in e.name]
    if not chosen:
        raise ActiveDPOError(f"--only {only}: no such experiment; there are "
                             f"{', '.join(e.name for e in experiments())}")
    run_missing(known, chosen, seeds)
    if write:
        document(known, experiments(), DOCUMENT)


def run_missing(results: Results, chosen: list[Experiment], most: int | None) -> None:
    """Make the runs that are not in `results`; what is made is kept when this is interrupted."""
    todo: dict[tuple[str, float, int], dict[str, Variant]] = {}
    for experiment in chosen:
        seeds = min(experiment.seeds, most or experiment.seeds)
        for variant in experiment.variants:
            for seed in set(range(seeds)) - results.runs(variant.key).keys():
                world = (variant.setting.reward, variant.setting.duplicates, seed)
                todo.setdefault(world, {})[variant.key] = variant
    total = sum(map(len, todo.values()))
    if not total:
        return
    print(f"{total} runs are missing: about {total * SECONDS_A_RUN / 60:.0f} minutes", flush=True)
    saved = time.monotonic()
    try:
        with tqdm(total=total, unit="run") as bar:
            for (reward, duplicates, seed), variants in sorted(todo.items(), key=lambda w: w[0][2]):
                world = make_world(reward, seed, WORK, duplicates)
                for key, variant in variants.items():
                    results.add(key, seed, one_run(world, variant, seed))
                    bar.update()
                if time.monotonic() > saved + SAVE_EVERY:
                    results.save(environment())
                    saved = time.monotonic()
    finally:
        results.save(environment())


def one_run(world: World, variant: Variant, seed: int) -> dict[str, Any]:
    """What is kept of a run."""
    trace = run(world, variant.method, variant.setting, seed)._asdict()
    if variant.key not in BOUND_OF:
        del trace["error"], trace["width"]
    return trace


def environment() -> dict[str, Any]:
    """Machine, versions, date and commit."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {**describe_run(), "date": date.today().isoformat(),
            "commit": commit.stdout.strip() or "unknown"}


if __name__ == "__main__":
    try:
        typer.run(main)
    except ActiveDPOError as error:
        raise SystemExit(f"error: {error}") from None
