"""What figures depend on, besides the code."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "peft", "activedpo-fast")


def describe_run() -> dict[str, Any]:
    """Processor, threads and versions, for a run's machine info."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "instructions": sorted(
            name for name, has in torch.cpu.get_capabilities().items() if has is True
        ),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def vectors(machine: dict[str, Any]) -> str:
    """The widest vectors of a machine that `describe_run` described: what its ratios depend on."""
    instructions = machine["instructions"]
    if any(name.startswith("avx512") for name in instructions):
        return "AVX-512"
    return "AVX2" if "avx2" in instructions else platform.machine()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
