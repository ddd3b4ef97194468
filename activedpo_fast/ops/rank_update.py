"""Rank update: add outer products of points to a symmetric matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.ops import backends, reference
from activedpo_fast.ops.layout import rows_together


def rank_update_(v: Tensor, points: Tensor, alpha: float = 1.0) -> None:
    """V <- V + alpha * sum of p p^T over the points, in place, on and below V's diagonal.

    V is a symmetric matrix of which only that part is stored: entries above the diagonal are not
    read, and are undefined afterward (a GPU leaves them unchanged). Each number is read and written
    once, for any m.

    Args:
        v: float64 [k, k]; each row is contiguous, with any stride between rows.
        points: float64 [m, k], on v's device.

    Raises:
        ActiveDPOError: tensors that do not fit.
    """
    _check_rank_update(v, points)
    _rank_update(v, points, alpha)


@torch.library.custom_op("activedpo::rank_update_", mutates_args={"v"})
def _rank_update(v: torch.Tensor, points: torch.Tensor, alpha: float) -> None:
    if len(points) == 0:
        return
    if backends.choose("rank_update", v.device.type, v.dtype) == "reference":
        return reference.rank_update_(v, points, alpha)
    from activedpo_fast import _cuda

    points = rows_together(points)
    stream = torch.cuda.current_stream(v.device)
    _cuda.rank_update(
        v=v.data_ptr(),
        v_stride=v.stride(0),
        points=points.data_ptr(),
        points_stride=points.stride(0),
        k=len(v),
        m=len(points),
        alpha=alpha,
        device=stream.device_index,
        stream=stream.cuda_stream,
    )


@_rank_update.register_fake
def _(v: torch.Tensor, points: torch.Tensor, alpha: float) -> None:
    pass


def _check_rank_update(v: Tensor, points: Tensor) -> None:
    name = "rank_update_"
    for label, tensor in (("v", v), ("points", points)):
        if tensor.dim() != 2 or tensor.dtype != torch.float64 or tensor.layout != torch.strided:
            raise ActiveDPOError(
                f"{name}: {label} is {tensor.dtype} {tuple(tensor.shape)}, expected a dense matrix "
                "of torch.float64"
            )
        if tensor.requires_grad:
            raise ActiveDPOError(f"{name}: {label} requires grad; it is not differentiated")
    if v.shape[0] != v.shape[1] or v.stride(1) != 1 or v.stride(0) < len(v):
        raise ActiveDPOError(
            f"{name}: v is {tuple(v.shape)} with strides {v.stride()}, expected a square matrix "
            "whose rows are contiguous"
        )
    if points.shape[1] != len(v):
        raise ActiveDPOError(f"{name}: points are {points.shape[1]} wide, expected {len(v)}")
    if v.device != points.device:
        raise ActiveDPOError(f"{name}: v is on {v.device} and points on {points.device}")
