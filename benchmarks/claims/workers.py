"""Missing runs, made in several processes; each is saved as soon as it ends."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from benchmarks.claims.results import Results, Run

SAVE_EVERY = 60.0  # seconds


class Job(NamedTuple):
    """One call that makes runs of a seed.

    call: returns runs by their keys; it and `arguments` go to another process.
    runs: how many it makes.
    """

    seed: int
    call: Callable[..., dict[str, Run]]
    arguments: tuple[Any, ...]
    runs: int


def run_jobs(
    jobs: Sequence[Job], results: Results, environment: dict[str, Any], workers: int
) -> None:
    """Run all jobs, in order; what is made is kept when this is interrupted.

    A job that fails does not keep the others from running; its error is raised at the end.
    """
    saved = time.monotonic()
    failed: list[tuple[Job, BaseException]] = []
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, context, initializer=_start) as pool,
        tqdm(total=sum(job.runs for job in jobs), unit="run") as bar,
    ):
        try:
            waiting = {pool.submit(job.call, *job.arguments): job for job in jobs}
            for done in as_completed(waiting):
                job = waiting[done]
                if (error := done.exception()) is not None:
                    failed.append((job, error))
                    bar.write(f"failed: {job.arguments}: {type(error).__name__}: {error}")
                    continue
                for key, run in done.result().items():
                    results.add(key, job.seed, run)
                bar.update(job.runs)
                if time.monotonic() > saved + SAVE_EVERY:
                    results.save(environment)
                    saved = time.monotonic()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            results.save(environment)
    if failed:
        raise failed[0][1]


def _start() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process if its parent is killed: it would keep its run's folder locked for minutes,
    for a result that nobody takes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
