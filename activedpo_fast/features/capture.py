"""Per-sample gradients of linear layers from one batched backward pass.

For y = W h the gradient of a sample's objective is Σ_t g_t h_tᵀ over its tokens, g_t being the
gradient at the layer's output. Hooks take h on the way forward and g on the way back; no weight
gradient is ever computed by autograd, and nothing below the lowest trainable layer is
differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from activedpo_fast.errors import UnsupportedParameterError
from activedpo_fast.features.parameters import TrainableLinear

Consumer = Callable[[TrainableLinear, torch.Tensor, torch.Tensor], None]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode and frozen parameters inside; every flag as it was afterwards.

    `.grad` is never touched, as no parameter requires one. Grad mode is switched on, whatever the
    caller has set.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def capture(
    linears: Sequence[TrainableLinear], batch_shape: tuple[int, int], consume: Consumer
) -> Iterator[None]:
    """Call `consume(linear, h, g)` for each use of each layer during the backward pass inside.

    h is [B, T, in] and g is [B, T, out], in the dtypes that the model computes with; `batch_shape`
    is (B, T). A layer that is used several times in one forward pass is consumed several times,
    its gradient being the sum. Must be entered inside `undisturbed`.

    Raises:
        UnsupportedParameterError: a layer's input does not have one row for each token of the
            batch (routed experts, for instance), so that its gradient cannot be told by sample.
    """
    handles = [
        linear.module.register_forward_hook(_forward_hook(linear, batch_shape, consume))
        for linear in linears
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def row_dtype(linears: Sequence[TrainableLinear]) -> torch.dtype:
    """float64 where all trainable weights are, else float32."""
    dtypes = {parameter.dtype for linear in linears for parameter in linear.module.parameters()}
    return torch.float64 if dtypes == {torch.float64} else torch.float32


def sample_gradients(
    linear: TrainableLinear, h: torch.Tensor, g: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """Σ_t g_t h_tᵀ (and Σ_t g_t for a bias) of each sample, shaped as the parameter is stored.

    Args:
        h: [B, T, in], the layer's input. g: [B, T, out], the gradient at its output.
    """
    if linear.weight is not None:
        left, right = (h, g) if linear.transposed else (g, h)
        yield linear.weight, left.transpose(1, 2) @ right
    if linear.bias is not None:
        yield linear.bias, g.sum(dim=1)


def _forward_hook(
    linear: TrainableLinear, batch_shape: tuple[int, int], consume: Consumer
) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
    def take_input(
        module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> None:
        if not torch.is_grad_enabled():
            return
        h = _by_sample(linear, inputs[0].detach(), batch_shape)
        if not output.requires_grad:
            # All parameters are frozen: the lowest trainable layer is where the graph begins.
            output.requires_grad_()

        def take_output_gradient(g: torch.Tensor) -> None:
            consume(linear, h, _by_sample(linear, g.detach(), batch_shape))

        output.register_hook(take_output_gradient)

    return take_input


def _by_sample(
    linear: TrainableLinear, tensor: torch.Tensor, batch_shape: tuple[int, int]
) -> torch.Tensor:
    if tuple(tensor.shape[:-1]) == batch_shape:
        return tensor
    tokens = batch_shape[0] * batch_shape[1]
    if tensor.dim() == 2 and tensor.shape[0] == tokens:
        # Some MLPs flatten batch and time; the self-check of the extractor proves the order.
        return tensor.reshape(*batch_shape, tensor.shape[-1])
    raise UnsupportedParameterError(
        f"cannot take per-sample gradients of {linear.label!r}: its input has shape "
        f"{list(tensor.shape)}, not one row for each of {batch_shape[0]} × {batch_shape[1]} tokens "
        "(a routed expert?); leave it out of the adapter"
    )
