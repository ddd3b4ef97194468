"""How many tokens go into one forward and backward pass."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

logger = logging.getLogger(__name__)

# Padded tokens of the first batch, which shows what a token costs; fewer are not worth while.
_FIRST = 512
# A CPU gains nothing by more, neither in tokens nor in memory; a GPU is to be kept busy.
_MOST_ON_CPU, _MOST = 2048, 1 << 17
_CPU_BYTES = 1 << 30
_SHARE_OF_FREE = 0.5
# What a pass takes beyond the tensors that autograd keeps: inputs of layers and gradients.
_ALLOWANCE = 1.5


class TokenBudget:
    """Padded tokens a batch may have: given, or found, and halved when memory does not suffice.

    Args:
        tokens: the limit, or None to find one: what the first batch makes autograd keep is
            counted, and the budget set so that a batch takes 1 GiB at most on a CPU (512 to 2048
            tokens), and half of the free memory at most anywhere.
        device: where the batches run.
    """

    def __init__(self, tokens: int | None, device: torch.device) -> None:
        self.tokens = _FIRST if tokens is None else tokens
        self.device = device
        self._searching = tokens is None

    @contextmanager
    def batch(self, padded_tokens: int) -> Iterator[None]:
        """Around the passes of one batch; the first tells what a token costs."""
        if not self._searching:
            yield
            return
        storages: dict[int, int] = {}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            # Weights are saved too, but are there whatever the batch.
            if not isinstance(tensor, torch.nn.Parameter) and tensor.device == self.device:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            yield
        self._searching = False
        cost = _ALLOWANCE * sum(storages.values()) / padded_tokens
        on_cpu = self.device.type == "cpu"
        room = min(_CPU_BYTES, _available(self.device)) if on_cpu else _available(self.device)
        most = _MOST_ON_CPU if on_cpu else _MOST
        self.tokens = max(_FIRST, min(most, int(room / cost) if cost else _MOST_ON_CPU))
        logger.info("batches of %d tokens, about %.0f kB for each token", self.tokens, cost / 1e3)

    def halve(self, padded_tokens: int) -> None:
        """After a batch of `padded_tokens` that did not fit."""
        self.tokens = max(1, min(self.tokens, padded_tokens) // 2)
        self._searching = False
        logger.warning("out of memory: going on with batches of %d tokens", self.tokens)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # What torch's CPU allocator raises has no class of its own.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _available(device: torch.device) -> float:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
    else:
        free = psutil.virtual_memory().available
    return _SHARE_OF_FREE * free
