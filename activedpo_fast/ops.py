"""One function per operation, and the only place that chooses a backend for it.

The sketches are here, the selection's operations in score_ops.py.

Backends: `cpp` (csrc/, tensors on the CPU) and `reference` (reference.py, any
device). `auto` takes the first that can serve the tensors' device. The environment variable
ACTIVEDPO_BACKEND (auto, cpp, reference) forces one; what it names is used or an error is raised.
"""

from __future__ import annotations

import logging
import os
from types import ModuleType

import torch
from torch import Tensor

from activedpo_fast import reference
from activedpo_fast.errors import ActiveDPOError

_csrc: ModuleType | None
try:
    from activedpo_fast import _csrc  # type: ignore[attr-defined, no-redef]
    _WHY_NO_CPP = ""
except ImportError as error:
    _csrc = None
    _WHY_NO_CPP = (
        f"the C++ extension is not built ({error}); with a C++17 compiler, run `pip install .` "
        "again, or `python setup.py build_ext --inplace` in a checkout"
    )

log = logging.getLogger(__name__)

OPERATIONS = ("sjlt", "rademacher", "outer_sketch", "pair_lengths", "advance")
METHODS = ("sjlt", "rademacher", "kronecker")  # of outer_sketch_
BACKENDS = ("cpp", "reference")  # in the order in which `auto` prefers them
_DTYPES = {torch.float32: "float32", torch.float64: "float64"}
_OUTER_DTYPES = {**_DTYPES, torch.bfloat16: "bfloat16"}
_warned = False


def sjlt_(out: Tensor, x: Tensor, key: int) -> None:
    """out += S x in place, S the sparse sketch of `reference.sjlt`.

    Args:
        out: [n, k], 1 <= k < 2^31, float32 or float64.
        x: [n, D], of out's dtype and device. n = 0 and D = 0 are fine.
        key: 0 <= key < 2^64, from `Sketch.key`.

    float32 numbers are summed in float32 over 32 k positions at a time (32 a bucket, on average)
    and in float64 beyond. Raises ActiveDPOError on tensors that do not fit.
    """
    _add("sjlt", out, x, key)


def rademacher_(out: Tensor, x: Tensor, key: int) -> None:
    """out += R x / sqrt(k) in place, R the signs of `reference.rademacher`; arguments as `sjlt_`.

    float32 sums are formed in float32 over 32 numbers at a time and in float64 beyond.
    """
    _add("rademacher", out, x, key)


def outer_sketch_(out: Tensor, left: Tensor, right: Tensor, segments: Tensor, key: int,
                  method: str) -> None:
    """out[row] += S vec(sum of left_t right_tᵀ over a run of tokens), for every run, in place.

    It is the sketch of each run's gradient, `reference.outer_sketch`, without forming the gradient:
    on the CPU no more than a tile of it exists at a time.

    Args:
        out: float64 [n, k], 1 <= k < 2^31.
        left: [N, rows], right: [N, columns], float32, float64 or bfloat16, of one dtype and on
            out's device. bfloat16 is multiplied in float32.
        segments: int64 [S, 3] on the CPU, of (start, end, row), 0 <= start <= end <= N,
            0 <= row < n. They may overlap, and may share rows.
        key: 0 <= key < 2^64, from `Sketch.key`. method: one of METHODS.

    Products are summed over tokens in float32 (float64 for float64) and over segments and calls in
    float64. The number of threads changes nothing. Raises ActiveDPOError on tensors that do not
    fit.
    """
    _check_outer(out, left, right, segments, key, method)
    if left.shape[0] == 0 or len(segments) == 0:
        return
    if choose(out.device.type) == "reference":
        out += reference.outer_sketch(left, right, segments, key, out.shape[1], len(out), method)
        return
    left, right = (x if x.stride(1) == 1 else x.contiguous() for x in (left, right))
    target = out if out.stride(1) == 1 else out.contiguous()
    segments = segments.contiguous()
    sides = reference.kronecker_sides(left.shape[1], right.shape[1], out.shape[1])
    getattr(_csrc, f"outer_{method}_{_OUTER_DTYPES[left.dtype]}")(
        out=target.data_ptr(), out_stride=target.stride(0), left=left.data_ptr(),
        left_stride=left.stride(0), right=right.data_ptr(), right_stride=right.stride(0),
        segments=segments.data_ptr(), n_segments=len(segments), rows=left.shape[1],
        columns=right.shape[1], k=out.shape[1], key=key, sides=sides,
        num_threads=torch.get_num_threads())
    if target is not out:
        out.copy_(target)


def backends() -> dict[str, dict[str, dict[str, str]]]:
    """What serves each operation: {operation: {"cpu" | "cuda": {backend: status}}}.

    A status is "active", or why the backend is not: it cannot serve the device, is not built, or
    another one goes before it. Raises ActiveDPOError when ACTIVEDPO_BACKEND names no backend.
    """
    def statuses(device: str) -> dict[str, str]:
        forced = _forced()
        result: dict[str, str] = {}
        for backend in BACKENDS:
            why_not = _why_not(backend, device)
            if not why_not and forced not in ("auto", backend):
                why_not = f"ACTIVEDPO_BACKEND={forced}"
            if not why_not and "active" in result.values():
                why_not = "a faster backend is active"
            result[backend] = why_not or "active"
        return result

    return {operation: {device: statuses(device) for device in ("cpu", "cuda")}
            for operation in OPERATIONS}


def csrc() -> ModuleType:
    """The C++ extension; to be called only where `choose` says "cpp"."""
    assert _csrc is not None
    return _csrc


def _add(operation: str, out: Tensor, x: Tensor, key: int) -> None:
    _check(operation, out, x, key)
    if x.numel() == 0:
        return
    backend = choose(out.device.type)
    if backend == "reference":
        function = reference.sjlt if operation == "sjlt" else reference.rademacher
        out += function(x, key, out.shape[1])
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    target = out if out.stride(1) == 1 else out.contiguous()
    getattr(_csrc, f"{operation}_{_DTYPES[x.dtype]}")(
        out=target.data_ptr(), out_stride=target.stride(0), x=x.data_ptr(), x_stride=x.stride(0),
        n=x.shape[0], length=x.shape[1], k=out.shape[1], key=key,
        num_threads=torch.get_num_threads())
    if target is not out:
        out.copy_(target)


def _check(operation: str, out: Tensor, x: Tensor, key: int) -> None:
    name = f"{operation}_"
    for label, tensor in (("out", out), ("x", x)):
        if not isinstance(tensor, Tensor):
            raise ActiveDPOError(f"{name}: {label} is a {type(tensor).__name__}, not a tensor")
        if tensor.dim() != 2:
            raise ActiveDPOError(
                f"{name}: {label} has shape {tuple(tensor.shape)}, expected two dimensions")
        if tensor.dtype not in _DTYPES:
            raise ActiveDPOError(
                f"{name}: {label} is {tensor.dtype}, expected torch.float32 or torch.float64")
        if tensor.layout != torch.strided:
            raise ActiveDPOError(f"{name}: {label} is sparse, expected a dense tensor")
        if tensor.requires_grad:
            raise ActiveDPOError(f"{name}: {label} requires grad; a sketch is not differentiated")
    if out.dtype != x.dtype:
        raise ActiveDPOError(f"{name}: out is {out.dtype} and x is {x.dtype}")
    if out.device != x.device:
        raise ActiveDPOError(f"{name}: out is on {out.device} and x on {x.device}")
    if out.shape[0] != x.shape[0]:
        raise ActiveDPOError(f"{name}: out has {out.shape[0]} rows and x has {x.shape[0]}")
    if not 1 <= out.shape[1] < 2 ** 31:
        raise ActiveDPOError(f"{name}: out has {out.shape[1]} columns, expected 1 to 2^31 - 1")
    _check_key(name, key)


def _check_outer(out: Tensor, left: Tensor, right: Tensor, segments: Tensor, key: int,
                 method: str) -> None:
    name = "outer_sketch_"
    if method not in METHODS:
        raise ActiveDPOError(f"{name}: method is {method!r}; known: {', '.join(METHODS)}")
    for label, tensor in (("out", out), ("left", left), ("right", right), ("segments", segments)):
        if not isinstance(tensor, Tensor):
            raise ActiveDPOError(f"{name}: {label} is a {type(tensor).__name__}, not a tensor")
        if tensor.dim() != 2 or tensor.layout != torch.strided:
            raise ActiveDPOError(f"{name}: {label} has shape {tuple(tensor.shape)}, expected a "
                                 "dense matrix")
        if tensor.requires_grad:
            raise ActiveDPOError(f"{name}: {label} requires grad; a sketch is not differentiated")
    if out.dtype != torch.float64:
        raise ActiveDPOError(f"{name}: out is {out.dtype}, expected torch.float64")
    if left.dtype not in _OUTER_DTYPES or left.dtype != right.dtype:
        raise ActiveDPOError(f"{name}: left is {left.dtype} and right {right.dtype}, expected "
                             "both torch.float32, torch.float64 or torch.bfloat16")
    if not out.device == left.device == right.device:
        raise ActiveDPOError(f"{name}: out is on {out.device}, left on {left.device} and right on "
                             f"{right.device}")
    if left.shape[0] != right.shape[0]:
        raise ActiveDPOError(f"{name}: left has {left.shape[0]} tokens and right {right.shape[0]}")
    if left.shape[1] == 0 or right.shape[1] == 0:
        raise ActiveDPOError(f"{name}: left is {left.shape[1]} wide and right {right.shape[1]}")
    if not 1 <= out.shape[1] < 2 ** 31:
        raise ActiveDPOError(f"{name}: out has {out.shape[1]} columns, expected 1 to 2^31 - 1")
    if segments.dtype != torch.int64 or segments.device.type != "cpu" or segments.shape[1] != 3:
        raise ActiveDPOError(f"{name}: segments are {segments.dtype} {tuple(segments.shape)} on "
                             f"{segments.device}, expected torch.int64 [S, 3] on the CPU")
    tokens, rows = left.shape[0], out.shape[0]
    for start, end, row in segments.tolist():
        if not (0 <= start <= end <= tokens and 0 <= row < rows):
            raise ActiveDPOError(f"{name}: a segment lies outside {tokens} tokens and {rows} rows")
    _check_key(name, key)


def _check_key(name: str, key: int) -> None:
    if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < 2 ** 64:
        raise ActiveDPOError(f"{name}: key is {key!r}, expected an integer from 0 to 2^64 - 1")


def _forced() -> str:
    name = os.environ.get("ACTIVEDPO_BACKEND") or "auto"
    if name not in ("auto", *BACKENDS):
        known = ", ".join(("auto", *BACKENDS))
        raise ActiveDPOError(f"ACTIVEDPO_BACKEND is {name!r}; known: {known}")
    return name


def _why_not(backend: str, device: str) -> str:
    """Why `backend` cannot serve tensors on `device`; empty where it can."""
    if backend == "reference":
        return ""
    if device != "cpu":
        return "serves CPU tensors only"
    return _WHY_NO_CPP


def choose(device: str) -> str:
    """The backend that serves tensors on a device ("cpu", "cuda").

    Raises ActiveDPOError when ACTIVEDPO_BACKEND names one that cannot.
    """
    global _warned
    forced = _forced()
    if forced != "auto":
        why_not = _why_not(forced, device)
        if why_not:
            raise ActiveDPOError(f"ACTIVEDPO_BACKEND={forced} on a {device} tensor: {why_not}")
        return forced
    if not _why_not("cpp", device):
        return "cpp"
    if device == "cpu" and not _warned:
        _warned = True
        log.warning("using the slower PyTorch reference: %s", _WHY_NO_CPP)
    return "reference"
