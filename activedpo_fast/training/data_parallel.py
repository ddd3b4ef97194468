"""Training in several processes: each has the whole model and a part of every batch (DDP)."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from activedpo_fast.distributed.processes import LostContactError, lost_contact
from activedpo_fast.errors import ActiveDPOError

if TYPE_CHECKING:
    from trl import DPOConfig

logger = logging.getLogger(__name__)

# Set by `accelerate launch`, for engines that leave each process parts of the weights.
_SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}
_FIELDS = {"fsdp": "FSDP", "deepspeed": "DeepSpeed", "parallelism_config": "parallelism_config"}


def require_whole_model(args: DPOConfig | None = None) -> None:
    """Refuse engines that leave each process parts of the weights.

    Args:
        args: of the trainer; None to look at what the launcher has set alone.

    Raises:
        ActiveDPOError: FSDP, DeepSpeed, or tensor or context parallelism.
    """
    found = [
        name
        for variable, name in _SHARDING.items()
        if os.environ.get(variable, "").lower() in ("true", "1")
    ]
    found += [name for field, name in _FIELDS.items() if getattr(args, field, None)]
    if found:
        raise ActiveDPOError(
            f"{found[0]} leaves each process parts of the model, and gradients of single responses "
            "need all of it: start the processes with torchrun or `accelerate launch --multi_gpu`, "
            "where each has the whole model"
        )


def with_shared_batches(args: DPOConfig) -> DPOConfig:
    """Return settings whose steps are on as many pairs as in one process, if these divide.

    Gradient accumulation becomes shorter first, then the batches of each process smaller. If the
    pairs of a step do not divide, the number that is used is logged.
    """
    processes = args.world_size
    if processes == 1:
        return args
    wanted = args.per_device_train_batch_size * args.gradient_accumulation_steps
    in_turn = math.gcd(processes, args.gradient_accumulation_steps)
    shared = copy.copy(args)
    shared.gradient_accumulation_steps //= in_turn
    own = max(1, args.per_device_train_batch_size // (processes // in_turn))
    shared.per_device_train_batch_size = own
    pairs = own * shared.gradient_accumulation_steps * processes
    if pairs != wanted and args.process_index == 0:
        logger.warning(
            "training steps are on %d pairs in place of %d: per_device_train_batch_size times "
            "gradient_accumulation_steps is not a multiple of %d processes",
            pairs,
            wanted,
            processes,
        )
    return shared


def mean_over_processes(trainer: Any, loss: float) -> float:
    """Return the mean loss of all processes; each has that of its own pairs since the last log."""
    if trainer.args.world_size == 1:
        return float(loss)
    own = torch.tensor(loss, dtype=torch.float64, device=trainer.args.device)
    return float(trainer.accelerator.reduce(own, "mean"))


@contextmanager
def in_contact(args: DPOConfig) -> Iterator[None]:
    """Raise `LostContactError` where the trainer finds that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if args.world_size == 1 or not lost_contact(error):
            raise
        raise LostContactError(
            f"lost contact with another of the {args.world_size} processes while training; nothing "
            "of this training is kept"
        ) from error
