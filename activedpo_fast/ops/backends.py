"""The choice of the backend for an operation, made only here.

Backends, in the order in which `auto` prefers them: `cuda` (csrc/cuda/) and `triton` (kernels/) for
tensors on NVIDIA GPUs, `cpp` (csrc/) for tensors on the CPU, `reference` (reference.py) for any
device and dtype. The environment variable ACTIVEDPO_BACKEND (auto, or one of these) forces one: all
operations that it has then use it, and a tensor that it cannot serve is an error.
ACTIVEDPO_DETERMINISTIC=1 gives Triton's sketches the same bits on every run; see `deterministic`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

import activedpo_fast.kernels as kernels
from activedpo_fast.errors import ActiveDPOError

log = logging.getLogger(__name__)


def _extension(module: str, name: str, compiler: str) -> tuple[ModuleType | None, str]:
    """Import an extension module: (module, ""), or None and why there is none."""
    try:
        return import_module(f"activedpo_fast.{module}"), ""
    except ImportError as error:
        return None, (
            f"the {name} extension is not built ({error}); with {compiler}, run `pip install .` "
            "again, or `python setup.py build_ext --inplace` in a checkout"
        )


# Operations import these modules where they call them: type checkers then know their functions.
_csrc, _WHY_NO_CPP = _extension("_csrc", "C++", "a C++17 compiler")
_cuda, _WHY_NO_CUDA = _extension("_cuda", "CUDA", "CUDA's compiler nvcc")

BACKENDS = ("cuda", "triton", "cpp", "reference")
# The backends of each operation besides the reference.
_FASTER = {
    "sjlt": ("triton", "cpp"),
    "rademacher": ("triton", "cpp"),
    "outer_sketch": ("triton", "cpp"),
    "response_logp_grad": ("triton",),
    "rank_update": ("cuda",),
    "pair_lengths": ("cuda", "cpp"),
    "advance": ("cpp",),
    "greedy_select": ("cuda",),
}
OPERATIONS = tuple(_FASTER)
_DEVICES = ("cpu", "cuda")
_ON_GPU_ALONE = {"greedy_select"}  # on the CPU it is a loop over `advance`
_warned: set[str] = set()


def choose(operation: str, device: str, dtype: torch.dtype = torch.float32) -> str:
    """Return the backend that serves an operation's tensors on a device ("cpu", "cuda").

    Raises ActiveDPOError if ACTIVEDPO_BACKEND names a backend that has the operation but cannot
    serve the tensors.
    """
    forced = _forced()
    if forced == "reference":
        return forced
    if forced in _FASTER[operation]:
        why_not = _why_not(forced, device, dtype, forced)
        if why_not:
            raise ActiveDPOError(f"ACTIVEDPO_BACKEND={forced} on a {device} tensor: {why_not}")
        return forced
    for backend in BACKENDS[:-1]:
        if backend in _FASTER[operation]:
            why_not = _why_not(backend, device, dtype, forced)
            if not why_not:
                return backend
            missing = not (_elsewhere(backend, device) or _has_not(backend, dtype))
            if missing and why_not not in _warned:
                _warned.add(why_not)
                log.warning("using the slower PyTorch reference: %s", why_not)
    return "reference"


def backends() -> dict[str, dict[str, dict[str, str]]]:
    """Return the backends of each operation: {operation: {"cpu" | "cuda": {backend: status}}}.

    A status is "active" or the reason why the backend is not active: it cannot serve the device, is
    not built, or another one has priority. Raises ActiveDPOError if ACTIVEDPO_BACKEND names an
    unknown backend.
    """
    forced = _forced()

    def statuses(operation: str, device: str) -> dict[str, str]:
        result: dict[str, str] = {}
        for backend in BACKENDS:
            if backend not in (*_FASTER[operation], "reference"):
                continue
            why_not = _why_not(backend, device, torch.float32, forced)
            elsewhere = forced not in ("auto", backend) and (
                forced == "reference" or forced in _FASTER[operation]
            )
            if not why_not and elsewhere:
                why_not = f"ACTIVEDPO_BACKEND={forced}"
            if not why_not and "active" in result.values():
                why_not = "a faster backend is active"
            result[backend] = why_not or "active"
        return result

    return {
        operation: {
            device: statuses(operation, device)
            for device in _DEVICES
            if device == "cuda" or operation not in _ON_GPU_ALONE
        }
        for operation in OPERATIONS
    }


def about_cuda() -> str:
    """Describe what the CUDA extension was built for, and why it cannot run here if it cannot."""
    if _cuda is None:
        return _WHY_NO_CUDA
    built = f"built with CUDA {_cuda.runtime_version} for {_cuda.architectures}"
    return "; ".join(part for part in (built, _why_no_cuda()) if part)


def deterministic() -> bool:
    """Return whether sketches of the same gradients on a GPU must have the same bits on every run.

    By default, if PyTorch was told so by `torch.use_deterministic_algorithms`: its own backward
    pass, attention above all, has other bits on every run otherwise. ACTIVEDPO_DETERMINISTIC, 0 or
    1, takes precedence. If not, sums are float64 in any order, which changes the last bits of 53,
    and takes fewer launches.
    """
    value = os.environ.get("ACTIVEDPO_DETERMINISTIC")
    if not value:
        return torch.are_deterministic_algorithms_enabled()
    if value not in ("0", "1"):
        raise ActiveDPOError(f"ACTIVEDPO_DETERMINISTIC is {value!r}, expected 0 or 1")
    return value == "1"


def _forced() -> str:
    name = os.environ.get("ACTIVEDPO_BACKEND") or "auto"
    if name not in ("auto", *BACKENDS):
        known = ", ".join(("auto", *BACKENDS))
        raise ActiveDPOError(f"ACTIVEDPO_BACKEND is {name!r}; known: {known}")
    return name


def _why_not(backend: str, device: str, dtype: torch.dtype, forced: str) -> str:
    """Return why `backend` cannot serve an operation that it has; empty if it can."""
    if backend == "reference":
        return ""
    if backend == "triton" and device == "cpu" and kernels.interpreted():
        only_tests = "its interpreter serves tests: ACTIVEDPO_BACKEND=triton"
        return (
            _has_not(backend, dtype)
            or kernels.why_not()
            or ("" if forced == "triton" else only_tests)
        )
    reasons: dict[str, Callable[[], str]] = {
        "cpp": lambda: _WHY_NO_CPP,
        "cuda": _why_no_cuda,
        "triton": kernels.why_not,
    }
    return _elsewhere(backend, device) or _has_not(backend, dtype) or reasons[backend]()


@cache
def _why_no_cuda() -> str:
    """Return why the CUDA extension cannot run here (not built, driver, GPU); empty if it can."""
    return _WHY_NO_CUDA if _cuda is None else _cuda.problem()


def _elsewhere(backend: str, device: str) -> str:
    if (backend == "cpp") == (device == "cpu"):
        return ""
    return f"serves {'CPU' if backend == 'cpp' else 'CUDA'} tensors only"


def _has_not(backend: str, dtype: torch.dtype) -> str:
    return "has no float64" if backend == "triton" and dtype == torch.float64 else ""
