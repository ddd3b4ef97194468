"""Detection of several processes started together by a launcher."""

from __future__ import annotations

import os

import torch.distributed as dist

from activedpo_fast.errors import ActiveDPOError

# Set by torchrun and `accelerate launch`, then by MPI launchers (accelerate reads these, too).
_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
ONE_PROCESS = ("", "0", "1")  # values of these variables that mean no launcher


def require_one_process(what: str) -> None:
    """Raise `ActiveDPOError` if a launcher has started more than one process.

    Each process would write the same files. `what` is the command or method that is refused.
    """
    found = next(
        (
            (name, size)
            for name in _SIZES
            if (size := os.environ.get(name, "").strip()) not in ONE_PROCESS
        ),
        None,
    )
    if found is None and dist.is_available() and dist.is_initialized():
        count = dist.get_world_size()
        found = ("the size of torch.distributed's group", str(count)) if count > 1 else None
    if found is not None:
        name, size = found
        raise ActiveDPOError(
            f"{name} is {size}: {what} works in one process only, several would "
            "mix their files; start it without torchrun or another launcher"
        )
