"""Several processes started together by a launcher: which one this is, and how they are connected.

torch is imported inside the functions: the command line asks for the rank before it needs torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from activedpo_fast._files import first_line
from activedpo_fast.errors import ActiveDPOError

if TYPE_CHECKING:
    import torch.distributed as dist

# Set by MPI launchers, which set none of torchrun's variables.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_SIZES = ("WORLD_SIZE", *_MPI_SIZES)  # the first is set by torchrun and `accelerate launch`
_ONE_PROCESS = ("", "0", "1")  # values of these variables that mean no launcher


def require_one_process(what: str) -> None:
    """Raise `ActiveDPOError` if a launcher has started more than one process.

    Each process would write the same files. `what` is the command or method that is refused.
    """
    import torch.distributed as dist

    found = _several(_SIZES)
    if found is None and dist.is_available() and dist.is_initialized():
        count = dist.get_world_size()
        found = ("the size of torch.distributed's group", str(count)) if count > 1 else None
    if found is not None:
        name, size = found
        raise ActiveDPOError(
            f"{name} is {size}: {what} works in one process only, several would "
            "mix their files; start it without torchrun or another launcher"
        )


@contextmanager
def launched(*, train: bool = False) -> Iterator[dist.ProcessGroup | None]:
    """Connect the processes that a launcher started, through gloo; None for a single process.

    Args:
        train: whether a trainer will use the connection, too: on GPUs it does so through NCCL.

    Raises:
        ActiveDPOError: they cannot be connected, or were started by MPI alone.
    """
    found = _several(("WORLD_SIZE",))
    if found is not None and train:
        # Before torch is imported: each process would say at every training what slows DDP down.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch.distributed as dist

    if found is None:
        _require_no_mpi()
        yield None
        return
    backend = _trainers_backend() if train else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    except (ValueError, RuntimeError) as error:
        raise ActiveDPOError(
            f"WORLD_SIZE is {found[1]}, but the processes cannot be connected (use "
            f"torchrun, or unset it): {first_line(error)}"
        ) from None
    done = False
    try:
        yield dist.group.WORLD
        done = True
    finally:
        # After an error NCCL would wait here for processes that may be waiting for this one.
        if done or backend == "gloo":
            dist.destroy_process_group()


@contextmanager
def group_of_all() -> Iterator[dist.ProcessGroup | None]:
    """Make a gloo group of all connected processes, beside the trainer's; None for a single one.

    Its processes may wait for each other for as long as labeling takes.

    Raises:
        ActiveDPOError: a launcher has started several, and they are not connected.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        if (found := _several(_SIZES)) is not None:
            raise ActiveDPOError(
                f"{found[0]} is {found[1]}, but the processes are not connected: start them with "
                "torchrun or `accelerate launch`, and call torch.distributed.init_process_group"
            )
        yield None
        return
    if dist.get_world_size() == 1:
        yield None
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def _trainers_backend() -> str:
    import torch
    import torch.distributed as dist

    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if nccl else "gloo"


def launched_rank() -> int:
    """Return the number of this process among those of a launcher; 0 for a single process."""
    return 0 if _several(("WORLD_SIZE",)) is None else _number("RANK", 0)


def own_device(device: str) -> str:
    """Return the device of this process: of several processes, each has a GPU of its own.

    Args:
        device: "cuda" or "auto" leave the choice of the GPU; any other is returned as it is.

    Raises:
        ActiveDPOError: this machine has more processes than GPUs.
    """
    import torch

    if _several(("WORLD_SIZE",)) is None or device not in ("auto", "cuda"):
        return device
    if not torch.cuda.is_available():
        return device
    number, gpus = _number("LOCAL_RANK", launched_rank()), torch.cuda.device_count()
    if number >= gpus:
        raise ActiveDPOError(
            f"there is no GPU for process {number} of this machine, which has {gpus}: start as "
            "many processes as GPUs, or name the device that all of them share"
        )
    return f"cuda:{number}"


def _several(names: tuple[str, ...]) -> tuple[str, str] | None:
    """Return the first of these variables that means several processes, and its value."""
    for name in names:
        size = os.environ.get(name, "").strip()
        if size not in _ONE_PROCESS:
            return name, size
    return None


def _require_no_mpi() -> None:
    found = _several(_MPI_SIZES)
    if found is not None:
        raise ActiveDPOError(
            f"{found[0]} is {found[1]}, but WORLD_SIZE is not set: start the processes with "
            "torchrun or `accelerate launch`, or set WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR "
            "and MASTER_PORT in each"
        )


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "").strip()
    return int(text) if text.isascii() and text.isdigit() else default
