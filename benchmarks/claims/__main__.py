"""Run the missing experiments, and write docs/evidence.md from all runs.

python -m benchmarks.claims --help
"""

from __future__ import annotations

import subprocess
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from activedpo_fast.errors import ActiveDPOError
from benchmarks.claims.evidence import document
from benchmarks.claims.experiments import of_known_reward, of_reviews
from benchmarks.claims.jobs import known_reward_jobs, missing_runs, review_jobs
from benchmarks.claims.results import Results
from benchmarks.claims.workers import run_jobs
from benchmarks.machine import describe_run

RESULTS = Path("benchmarks/results/claims")
DOCUMENT = Path("docs/evidence.md")


class Task(str, Enum):
    """What `--task` takes."""

    known_reward = "known-reward"
    reviews = "reviews"


VERSIONS = {Task.known_reward: 1, Task.reviews: 2}  # runs of another one are made again


def main(
    task: Annotated[list[Task] | None, typer.Option(help="One task only; default: all.")] = None,
    only: Annotated[
        str, typer.Option(help="Run the experiments whose name contains this text only.")
    ] = "",
    method: Annotated[
        list[str] | None, typer.Option(help="Run this method only; may be repeated.")
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=2, help="So many seeds of each, if that is fewer than the experiment has."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 1,
    write: Annotated[bool, typer.Option(help=f"Write {DOCUMENT} and its pictures.")] = True,
    results: Annotated[Path, typer.Option(help="Folder of the runs' JSON.")] = RESULTS,
) -> None:
    """Does the selection save labels? Runs what is missing, then writes the tables.

    What has been run is in the results and is not run again; an interrupted run goes on.
    """
    of_task = {Task.known_reward: of_known_reward(), Task.reviews: of_reviews()}
    known = {t: Results(results / f"{t.name}.json", VERSIONS[t]) for t in of_task}
    for t in task or list(of_task):
        chosen = [e for e in of_task[t] if only in e.name]
        missing = {
            at: variant
            for at, variant in missing_runs(known[t], chosen, seeds).items()
            if not method or variant.method in method
        }
        if not missing:
            continue
        seconds = {v.key: e.seconds for e in chosen for v in e.variants}
        minutes = sum(seconds[key] for _, key in missing) / 60 / workers
        print(
            f"{t.value}: {len(missing)} runs are missing, about {minutes:.0f} minutes", flush=True
        )
        jobs = (known_reward_jobs if t is Task.known_reward else review_jobs)(missing)
        run_jobs(jobs, known[t], environment(), workers)
    if write:
        document(
            {t.name: known[t] for t in of_task},
            {t.name: found for t, found in of_task.items()},
            DOCUMENT,
        )


def environment() -> dict[str, Any]:
    """Machine, versions, date and commit."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        **describe_run(),
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
    }


if __name__ == "__main__":
    try:
        typer.run(main)
    except ActiveDPOError as error:
        raise SystemExit(f"error: {error}") from None
