"""The energy of a GPU during a stage, by NVML's own counter where there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def gpu_name(device: torch.device) -> str:
    """Return the name of a CUDA device; "" for other devices."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def energy_counter(device: torch.device) -> Callable[[], float] | None:
    """Return a function that returns the joules a CUDA device has used since its driver started.

    They are those of the whole device, whoever uses it. None without a GPU, without nvidia-ml-py,
    or if the GPU has no such counter (before Volta).
    """
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)  # NVML numbers them differently
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000  # millijoules


@contextmanager
def metered(device: torch.device) -> Iterator[dict[str, float]]:
    """Yield a dictionary that has "joules" after the block, if they are known."""
    found: dict[str, float] = {}
    counter = energy_counter(device)
    if counter is None:
        yield found
        return
    torch.cuda.synchronize(device)
    before = counter()
    yield found
    torch.cuda.synchronize(device)
    found["joules"] = counter() - before
