"""The number of tokens in one forward and backward pass."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

logger = logging.getLogger(__name__)

# Padded tokens of the first batch, which measures the cost per token; fewer are not worthwhile.
_FIRST = 512
# A CPU gains nothing from more, neither in tokens nor in memory; a GPU has to be kept busy.
_MOST_ON_CPU, _MOST = 2048, 1 << 17
_CPU_BYTES = 1 << 30
_SHARE_OF_FREE = 0.5
# Factor for memory beyond the tensors that autograd keeps: layer inputs and gradients.
_ALLOWANCE = 1.5


class TokenBudget:
    """The limit of padded tokens per batch: given or measured, and halved when memory runs out.

    Args:
        tokens: the limit, or None to measure it: the memory that autograd keeps for the first batch
            is counted. The budget is then set so that a batch takes at most 1 GiB on a CPU (512 to
            2048 tokens), and at most half of the free memory of each device that takes part.
        device: where the batches begin.
    """

    def __init__(self, tokens: int | None, device: torch.device) -> None:
        self.tokens = _FIRST if tokens is None else tokens
        self.device = device
        self._searching = tokens is None

    @contextmanager
    def batch(self, padded_tokens: int) -> Iterator[None]:
        """Wrap the passes of one batch; the first batch measures the cost per token."""
        if not self._searching:
            yield
            return
        storages: dict[torch.device, dict[int, int]] = {self.device: {}}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            # Weights are saved, too, but exist independent of the batch.
            device = tensor.device  # one of several, if the model is split over them
            if not isinstance(tensor, torch.nn.Parameter) and device.type == self.device.type:
                storage = tensor.untyped_storage()
                storages.setdefault(device, {})[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            yield
        self._searching = False
        costs = {
            device: _ALLOWANCE * sum(saved.values()) / padded_tokens
            for device, saved in storages.items()
        }
        most = _MOST_ON_CPU if self.device.type == "cpu" else _MOST
        fitting = [int(_room(device) / cost) for device, cost in costs.items() if cost]
        self.tokens = max(_FIRST, min(most, *fitting) if fitting else _MOST_ON_CPU)
        for device, cost in costs.items():
            if cost > 1e3:  # passes without gradients keep nothing to speak of
                logger.info(
                    "batches of %d tokens, about %.0f kB per token on %s",
                    self.tokens,
                    cost / 1e3,
                    device,
                )

    def halve(self, padded_tokens: int) -> None:
        """Halve the budget after a batch of `padded_tokens` did not fit."""
        self.tokens = max(1, min(self.tokens, padded_tokens) // 2)
        self._searching = False
        logger.warning("out of memory: going on with batches of %d tokens", self.tokens)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means out of memory, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # Errors of torch's CPU allocator have no specific class.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _room(device: torch.device) -> float:
    """Return the bytes that a batch may take on a device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
    else:
        free = psutil.virtual_memory().available
    room = _SHARE_OF_FREE * free
    return min(_CPU_BYTES, room) if device.type == "cpu" else room
