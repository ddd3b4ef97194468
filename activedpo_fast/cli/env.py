"""The report of `activedpo env`: what is installed, and what is in use."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass

from activedpo_fast import __version__

# name -> how to get it; None: required, so pip installs it
_PACKAGES: dict[str, str | None] = {
    "torch": None,
    "transformers": None,
    "peft": None,
    "datasets": None,
    "safetensors": None,
    "trl": "for training rounds: pip install activedpo-fast[trl]",
    "accelerate": "for `activedpo run` and the loop: pip install accelerate",
    "triton": "for kernels on NVIDIA GPUs; it comes with torch's CUDA builds for Linux",
    "gguf": "for GGUF models: pip install gguf",
    "starlette": "for `activedpo label`: pip install activedpo-fast[label]",
    "matplotlib": "for the demo's picture: pip install matplotlib",
}


@dataclass(frozen=True)
class Row:
    """One line of the report: its section, its subject, and what was found."""

    section: str
    name: str
    value: str


def report() -> list[Row]:
    """Return versions, devices, and for each operation its backend and why not the others.

    Raises:
        ActiveDPOError: ACTIVEDPO_BACKEND names no backend.
    """
    return [*_versions(), *_devices(), *_backends()]


def _versions() -> list[Row]:
    rows = [
        Row("versions", "activedpo-fast", __version__),
        Row("versions", "python", f"{platform.python_version()} on {platform.platform()}"),
    ]
    for name, hint in _PACKAGES.items():
        found = _version(name)
        missing = f"missing ({hint})" if hint else "missing: reinstall activedpo-fast"
        rows.append(Row("versions", name, found or missing))
    return rows


def _devices() -> list[Row]:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [
        Row(
            "devices",
            "cpu",
            f"{usable} usable cores, {torch.get_num_threads()} torch threads, "
            f"{torch.backends.cpu.get_cpu_capability()}",
        )
    ]
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "no usable GPU or driver" if built else "this torch is built without CUDA"
        return [*rows, Row("devices", "cuda", f"none ({why})")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append(
            Row(
                "devices",
                f"cuda:{index}",
                f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
                f"compute capability {properties.major}.{properties.minor}",
            )
        )
    return rows


def _backends() -> list[Row]:
    import torch

    from activedpo_fast.ops import backends

    chosen = os.environ.get("ACTIVEDPO_BACKEND")
    sums = "the same bits on every run" if backends.deterministic() else "in any order"
    rows = [
        Row("backends", "ACTIVEDPO_BACKEND", chosen or "not set (auto)"),
        Row("backends", "CUDA extension", backends.about_cuda()),
        Row("backends", "sketches on a GPU", sums),
    ]
    for operation, devices in backends.backends().items():
        for device, statuses in devices.items():
            if device == "cuda" and not torch.cuda.is_available():
                continue
            for backend, status in statuses.items():
                shown = "active" if status == "active" else f"not used: {status}"
                rows.append(Row("backends", f"{operation} on {device}: {backend}", shown))
    return rows


def _version(distribution: str) -> str | None:
    if distribution == "torch":
        import torch

        return torch.__version__  # with its build, such as "+cu130"
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
