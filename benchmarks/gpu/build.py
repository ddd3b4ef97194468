"""The section "build" of `benchmarks.gpu`: the C++ and CUDA extensions, built in place."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.cases import Case, Found, Record, Settings, Skip
from benchmarks.gpu.checkout import ROOT

COMMAND = ("setup.py", "build_ext", "--inplace", "--parallel", "2")  # extensions side by side
_ALONE = (
    "import benchmarks.gpu.checkout, json\n"
    "from activedpo_fast.ops.backends import backends\n"
    "print(json.dumps(backends()))"
)


def cases(settings: Settings) -> list[Case]:
    """The build; then the active backends, according to a process that starts after it."""
    return [
        Case("setup.py build_ext --inplace", lambda _: build(settings), 1, 240),
        Case("backends", active, 1, 60),
    ]


def build(settings: Settings) -> Record:
    """Build for this GPU's architecture alone, unless ACTIVEDPO_CUDA_ARCHS names others.

    If pybind11 is not installed, torch's copy of its headers is used.
    """
    if settings.device != "cuda":
        raise Skip("nothing is built for a dry run")
    environment = dict(os.environ)
    environment.setdefault("ACTIVEDPO_CUDA_ARCHS", architecture())
    if importlib.util.find_spec("pybind11") is None:
        environment.setdefault("ACTIVEDPO_PYBIND11_INCLUDE", str(torch_headers()))
    done = subprocess.run(
        [sys.executable, *COMMAND],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    last = "\n".join(done.stdout.splitlines()[-30:])
    if done.returncode:
        raise RuntimeError(f"setup.py ended with {done.returncode}:\n{last}")
    return {
        "architectures": environment["ACTIVEDPO_CUDA_ARCHS"],
        "built": sorted(path.name for path in (ROOT / "activedpo_fast").glob("*.so")),
        "warnings": [line for line in done.stdout.splitlines() if "not built" in line],
    }


def active(found: Found) -> Record:
    """The backends of every operation, as `activedpo env` prints them."""
    done = subprocess.run([sys.executable, "-c", _ALONE], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return {"backends": json.loads(done.stdout.splitlines()[-1])}


def architecture() -> str:
    """nvcc's name for this GPU; for Hopper and later, with architecture-specific features."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def torch_headers() -> Path:
    """The folder of torch's own copy of pybind11/pybind11.h."""
    import torch

    return Path(torch.__file__).parent / "include"
