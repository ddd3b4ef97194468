"""Sketches of rows and of gradients that are sums of outer products, added in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.ops import backends, reference
from activedpo_fast.ops.layout import rows_together, signed

METHODS = ("sjlt", "rademacher", "kronecker")  # of outer_sketch_
_TOGETHER = ("sjlt", "kronecker")  # those whose kernels take several weights at a time
_DTYPES = {torch.float32: "float32", torch.float64: "float64"}
_OUTER_DTYPES = {**_DTYPES, torch.bfloat16: "bfloat16", torch.float16: "float16"}


def sjlt_(out: Tensor, x: Tensor, key: int) -> None:
    """out += S x in place, S the sparse sketch of `reference.sjlt`.

    Args:
        out: [n, k], 1 <= k < 2^31, float32 or float64.
        x: [n, D], of out's dtype and device. n = 0 and D = 0 are fine.
        key: 0 <= key < 2^64, from `Sketch.key`.

    float32 numbers are summed on the CPU in float32 over 32 k positions at a time (32 per bucket,
    on average) and in float64 beyond that; on a GPU, in float64 or fixed point. Raises
    ActiveDPOError if the tensors do not fit.
    """
    _check("sjlt_", out, x, key)
    _sjlt(out, x, signed(key))


def rademacher_(out: Tensor, x: Tensor, key: int) -> None:
    """out += R x / sqrt(k) in place, R the signs of `reference.rademacher`; arguments as `sjlt_`.

    float32 numbers are summed in float32 over a bounded number of positions (32 on the CPU) and in
    float64 beyond that.
    """
    _check("rademacher_", out, x, key)
    _rademacher(out, x, signed(key))


def outer_sketch_(
    out: Tensor, left: Tensor, right: Tensor, segments: Tensor, key: int, method: str
) -> None:
    """out[row] += S vec(sum of left_t right_tᵀ over a run of tokens), for every run, in place.

    This sketches each run's gradient, as `reference.outer_sketch`, without forming the gradient:
    only a tile of it exists at a time (on a GPU with "rademacher": a slab).

    Args:
        out: float64 [n, k], 1 <= k < 2^31.
        left: [N, rows], right: [N, columns], float32, float64, bfloat16 or float16, of one dtype
            and on out's device. 16-bit tensors are multiplied in float32.
        segments: int64 [S, 3] on the CPU, of (start, end, row), 0 <= start <= end <= N,
            0 <= row < n. They may overlap, and may share rows.
        key: 0 <= key < 2^64, from `Sketch.key`. method: one of METHODS.

    Products are summed over tokens in float32 (float64 for float64) and over segments and calls in
    float64. The result does not depend on the number of threads; on a GPU the last bits may differ
    from run to run, unless `backends.deterministic`. Raises ActiveDPOError if the tensors do not
    fit.
    """
    _check_target(out, segments, method)
    _check_weight(out, left, right, key)
    _outer_sketch(out, left, right, segments, signed(key), method)


class OuterSum(NamedTuple):
    """A weight's gradients as sums of left_t right_tᵀ over runs of tokens; see `outer_sketch_`.

    name: of the weight, for messages.
    """

    name: str
    left: Tensor
    right: Tensor
    key: int


def outer_sketches_(
    out: Tensor, weights: Sequence[OuterSum], segments: Tensor, method: str
) -> None:
    """`outer_sketch_` of every weight, with one segmentation of their tokens.

    On a GPU, "sjlt" and "kronecker" take a few launches for all weights together: for LoRA weights,
    launching each costs more than its work. Not a registered operation, unlike `outer_sketch_`.
    """
    _check_target(out, segments, method)
    _check_weights(out, weights, segments)
    chosen: dict[torch.dtype, str] = {}
    together: list[OuterSum] = []
    for weight in weights:
        dtype = weight.left.dtype
        backend = chosen.get(dtype)
        if backend is None:
            backend = chosen[dtype] = backends.choose("outer_sketch", out.device.type, dtype)
        if backend == "triton" and method in _TOGETHER:
            together.append(weight)
        else:
            _add_outer(out, weight.left, weight.right, segments, weight.key, method, backend)
    if together:
        target = rows_together(out)
        _triton_together(target, together, segments, method)
        if target is not out:
            out.copy_(target)


# -- registration with PyTorch: a key is passed as the int64 with the same bits --------------------


@torch.library.custom_op("activedpo::sjlt_", mutates_args={"out"})
def _sjlt(out: torch.Tensor, x: torch.Tensor, key: int) -> None:
    _add("sjlt", out, x, key % 2**64)


@torch.library.custom_op("activedpo::rademacher_", mutates_args={"out"})
def _rademacher(out: torch.Tensor, x: torch.Tensor, key: int) -> None:
    _add("rademacher", out, x, key % 2**64)


@torch.library.custom_op("activedpo::outer_sketch_", mutates_args={"out"})
def _outer_sketch(
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    segments: torch.Tensor,
    key: int,
    method: str,
) -> None:
    # Not checked before: under torch.compile, only the operation itself sees the numbers.
    _check_segments(segments, left.shape[0], out.shape[0])
    backend = backends.choose("outer_sketch", out.device.type, left.dtype)
    _add_outer(out, left, right, segments, key % 2**64, method, backend)


@_sjlt.register_fake
@_rademacher.register_fake
def _(out: torch.Tensor, x: torch.Tensor, key: int) -> None:
    pass


@_outer_sketch.register_fake
def _(
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    segments: torch.Tensor,
    key: int,
    method: str,
) -> None:
    pass


# -- implementation --------------------------------------------------------------------------------


def _add(operation: str, out: Tensor, x: Tensor, key: int) -> None:
    if x.numel() == 0:
        return
    backend = backends.choose(operation, out.device.type, x.dtype)
    if backend == "reference":
        function = reference.sjlt if operation == "sjlt" else reference.rademacher
        out += function(x, key, out.shape[1])
        return
    x, target = rows_together(x), rows_together(out)
    if backend == "triton":
        _triton_rows(operation, target, x, key)
    else:
        from activedpo_fast import _csrc

        getattr(_csrc, f"{operation}_{_DTYPES[x.dtype]}")(
            out=target.data_ptr(),
            out_stride=target.stride(0),
            x=x.data_ptr(),
            x_stride=x.stride(0),
            n=x.shape[0],
            length=x.shape[1],
            k=out.shape[1],
            key=key,
            num_threads=torch.get_num_threads(),
        )
    if target is not out:
        out.copy_(target)


def _add_outer(
    out: Tensor, left: Tensor, right: Tensor, segments: Tensor, key: int, method: str, backend: str
) -> None:
    if left.shape[0] == 0 or len(segments) == 0:
        return
    if backend == "reference":
        out += reference.outer_sketch(left, right, segments, key, out.shape[1], len(out), method)
        return
    left, right, target = (rows_together(x) for x in (left, right, out))
    if backend == "triton":
        _triton_outer(target, left, right, segments, key, method)
    else:
        _cpp_outer(target, left, right, segments, key, method)
    if target is not out:
        out.copy_(target)


def _triton_rows(operation: str, out: Tensor, x: Tensor, key: int) -> None:
    if operation == "sjlt":
        from activedpo_fast.kernels.sjlt_rows import sjlt_rows

        sjlt_rows(out, x, key, backends.deterministic())
    else:
        from activedpo_fast.kernels.lora_grad_rademacher import rademacher_rows

        rademacher_rows(out, x, key)


def _triton_outer(
    out: Tensor, left: Tensor, right: Tensor, segments: Tensor, key: int, method: str
) -> None:
    if method in _TOGETHER:
        _triton_together(out, [OuterSum("", left, right, key)], segments, method)
    else:
        from activedpo_fast.kernels.lora_grad_rademacher import lora_grad_rademacher

        lora_grad_rademacher(out, left, right, segments, key)


def _triton_together(
    out: Tensor, weights: Sequence[OuterSum], segments: Tensor, method: str
) -> None:
    from activedpo_fast.kernels.lora_grad_sketch import lora_grad_sketches

    lora_grad_sketches(
        out,
        [(rows_together(left), rows_together(right), key) for _, left, right, key in weights],
        segments,
        method,
        backends.deterministic(),
    )


def _cpp_outer(
    out: Tensor, left: Tensor, right: Tensor, segments: Tensor, key: int, method: str
) -> None:
    if left.dtype == torch.float16:
        left, right = left.float(), right.float()
    segments = segments.contiguous()
    sides = reference.kronecker_sides(left.shape[1], right.shape[1], out.shape[1])
    from activedpo_fast import _csrc

    getattr(_csrc, f"outer_{method}_{_OUTER_DTYPES[left.dtype]}")(
        out=out.data_ptr(),
        out_stride=out.stride(0),
        left=left.data_ptr(),
        left_stride=left.stride(0),
        right=right.data_ptr(),
        right_stride=right.stride(0),
        segments=segments.data_ptr(),
        n_segments=len(segments),
        rows=left.shape[1],
        columns=right.shape[1],
        k=out.shape[1],
        key=key,
        sides=sides,
        place=reference.kronecker_place(key, out.shape[1]),
        num_threads=torch.get_num_threads(),
    )


# -- argument checks -------------------------------------------------------------------------------


def _check(name: str, out: Tensor, x: Tensor, key: int) -> None:
    for label, tensor in (("out", out), ("x", x)):
        if not isinstance(tensor, Tensor):
            raise ActiveDPOError(f"{name}: {label} is a {type(tensor).__name__}, not a tensor")
        if tensor.dim() != 2:
            raise ActiveDPOError(
                f"{name}: {label} has shape {tuple(tensor.shape)}, expected two dimensions"
            )
        if tensor.dtype not in _DTYPES:
            raise ActiveDPOError(
                f"{name}: {label} is {tensor.dtype}, expected torch.float32 or torch.float64"
            )
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
    if not 1 <= out.shape[1] < 2**31:
        raise ActiveDPOError(f"{name}: out has {out.shape[1]} columns, expected 1 to 2^31 - 1")
    _check_key(name, key)


def _check_target(out: Tensor, segments: Tensor, method: str) -> None:
    """Check what all weights of a call have in common, except the numbers in segments."""
    name = "outer_sketch_"
    if method not in METHODS:
        raise ActiveDPOError(f"{name}: method is {method!r}; known: {', '.join(METHODS)}")
    _check_matrix("out", out)
    _check_matrix("segments", segments)
    if out.dtype != torch.float64:
        raise ActiveDPOError(f"{name}: out is {out.dtype}, expected torch.float64")
    if not 1 <= out.shape[1] < 2**31:
        raise ActiveDPOError(f"{name}: out has {out.shape[1]} columns, expected 1 to 2^31 - 1")
    if segments.dtype != torch.int64 or segments.device.type != "cpu" or segments.shape[1] != 3:
        raise ActiveDPOError(
            f"{name}: segments are {segments.dtype} {tuple(segments.shape)} on {segments.device}, "
            "expected torch.int64 [S, 3] on the CPU"
        )


def _check_weights(out: Tensor, weights: Sequence[OuterSum], segments: Tensor) -> None:
    """Check each kind of weight once: there are many alike, and checking takes time."""
    fine: set[tuple[object, ...]] = set()
    for name, left, right, key in weights:
        kind = (*_kind(left), *_kind(right))
        try:
            if kind not in fine:
                _check_weight(out, left, right, key)
                _check_segments(segments, len(left), len(out))
                fine.add(kind)
            else:
                _check_key("outer_sketch_", key)
        except ActiveDPOError as error:
            raise ActiveDPOError(f"{name}: {error}") from None


def _kind(x: Tensor) -> tuple[object, ...]:
    """Everything that `_check_weight` looks at."""
    if not isinstance(x, Tensor):
        return (type(x),)
    return x.shape, x.dtype, x.device, x.layout, x.requires_grad


def _check_weight(out: Tensor, left: Tensor, right: Tensor, key: int) -> None:
    name = "outer_sketch_"
    _check_matrix("left", left)
    _check_matrix("right", right)
    if left.dtype not in _OUTER_DTYPES or left.dtype != right.dtype:
        raise ActiveDPOError(
            f"{name}: left is {left.dtype} and right {right.dtype}, expected both torch.float32, "
            "float64, bfloat16 or float16"
        )
    if not out.device == left.device == right.device:
        raise ActiveDPOError(
            f"{name}: out is on {out.device}, left on {left.device} and right on {right.device}"
        )
    if left.shape[0] != right.shape[0]:
        raise ActiveDPOError(f"{name}: left has {left.shape[0]} tokens and right {right.shape[0]}")
    if left.shape[1] == 0 or right.shape[1] == 0:
        raise ActiveDPOError(f"{name}: left is {left.shape[1]} wide and right {right.shape[1]}")
    _check_key(name, key)


def _check_matrix(label: str, tensor: Tensor) -> None:
    name = "outer_sketch_"
    if not isinstance(tensor, Tensor):
        raise ActiveDPOError(f"{name}: {label} is a {type(tensor).__name__}, not a tensor")
    if tensor.dim() != 2 or tensor.layout != torch.strided:
        raise ActiveDPOError(
            f"{name}: {label} has shape {tuple(tensor.shape)}, expected a dense matrix"
        )
    if tensor.requires_grad:
        raise ActiveDPOError(f"{name}: {label} requires grad; a sketch is not differentiated")


def _check_segments(segments: Tensor, tokens: int, rows: int) -> None:
    for start, end, row in segments.tolist():
        if not (0 <= start <= end <= tokens and 0 <= row < rows):
            raise ActiveDPOError(
                f"outer_sketch_: a segment lies outside {tokens} tokens and {rows} rows"
            )


def _check_key(name: str, key: int) -> None:
    if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < 2**64:
        raise ActiveDPOError(f"{name}: key is {key!r}, expected an integer from 0 to 2^64 - 1")
