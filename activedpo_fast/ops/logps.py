"""Log-probs of targets, and their gradient with respect to the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.ops import backends, reference
from activedpo_fast.ops.layout import rows_together


def response_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log softmax(logits)[target]; see `response_logp_grad`, which adds the gradient."""
    _check_logits("response_logps", logits, {"targets": targets})
    found: Tensor = _response_logps(logits, targets)
    return found


def response_logp_grad(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return log softmax(logits)[target] and the logits' gradient of its weighted sum.

    Args:
        logits: [n, V], floating. targets: int64 [n], 0 <= target < V. weights: float32 [n], or
            float64 with float64 logits.

    Returns:
        float32 [n] (float64 for float64 logits), and weight * (one-hot - softmax), [n, V] in the
        logits' dtype. On a GPU no other tensor of n V numbers is allocated.
    """
    _check_logits("response_logp_grad", logits, {"targets": targets, "weights": weights})
    found: tuple[Tensor, Tensor] = _response_logp_grad(
        logits, targets, weights.to(reference.sum_dtype(logits.dtype))
    )
    return found


@torch.library.custom_op("activedpo::response_logps", mutates_args=())
def _response_logps(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if backends.choose("response_logp_grad", logits.device.type, logits.dtype) == "reference":
        return reference.response_logps(logits, targets)
    from activedpo_fast.kernels.response_logp_grad import response_logp_grad as kernel

    logps: torch.Tensor = kernel(rows_together(logits), targets, None)[0]
    return logps


@torch.library.custom_op("activedpo::response_logp_grad", mutates_args=())
def _response_logp_grad(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if backends.choose("response_logp_grad", logits.device.type, logits.dtype) == "reference":
        return reference.response_logp_grad(logits, targets, weights)
    from activedpo_fast.kernels.response_logp_grad import response_logp_grad as kernel

    logps, gradient = kernel(rows_together(logits), targets, weights)
    assert gradient is not None
    return logps, gradient


@_response_logps.register_fake
def _(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.new_empty(len(logits), dtype=reference.sum_dtype(logits.dtype))


@_response_logp_grad.register_fake
def _(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        logits.new_empty(len(logits), dtype=reference.sum_dtype(logits.dtype)),
        logits.new_empty(logits.shape),
    )


def _check_logits(name: str, logits: Tensor, of_tokens: dict[str, Tensor]) -> None:
    if logits.dim() != 2 or not logits.is_floating_point() or logits.requires_grad:
        raise ActiveDPOError(
            f"{name}: logits are {logits.dtype} {tuple(logits.shape)}, expected a detached "
            "floating [n, V]"
        )
    for label, given in of_tokens.items():
        if given.shape != logits.shape[:1] or given.device != logits.device:
            raise ActiveDPOError(
                f"{name}: {label} are {tuple(given.shape)} on {given.device}, expected "
                f"({len(logits)},) on {logits.device}"
            )
    if of_tokens["targets"].dtype != torch.int64:
        raise ActiveDPOError(f"{name}: targets are {of_tokens['targets'].dtype}, expected int64")
