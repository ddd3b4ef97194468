"""Worker processes of a test that need no start of their own: forks of the process of the tests,
which has it all imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def run_processes(work: Callable[..., None], args: tuple[Any, ...], count: int) -> None:
    """Run work(rank, *args) in `count` processes; an exception in one is raised."""
    mp.start_processes(work, args=args, nprocs=count, start_method="fork")
