"""Worker processes of a test that need no start of their own: they are forks of one that has it all
imported."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

# Importing these takes each new process seconds.
PRELOADED = ["torch.distributed", "transformers", "peft", "activedpo_fast.selector"]


def run_processes(work: Callable[..., None], args: tuple[Any, ...], count: int) -> None:
    """Run work(rank, *args) in `count` processes; an exception in one is raised."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(work, args=args, nprocs=count, start_method="forkserver")
