"""Hooks that capture per-token inputs and output gradients of every trainable linear layer.

For y = W h the gradient of an objective is Σ_t g_t h_tᵀ, where g_t is its gradient at the layer's
output for token t. A response's own part is the sum over the tokens that only it has. Hooks capture
h in the forward pass and g in the backward pass. Autograd computes no weight gradient, and
differentiates nothing below the lowest trainable layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from activedpo_fast.errors import UnsupportedParameterError
from activedpo_fast.gradients.trainable import TrainableLinear, silent_modules

# (layer, h [N, in], g [N, out], segments int64 [S, 3] of (first token, token after the last, row))
Consumer = Callable[[TrainableLinear, torch.Tensor, torch.Tensor, torch.Tensor], None]


class Capture:
    """Hooks on trainable linear layers that hand (h, g) to a consumer as gradients arrive.

    Args:
        linears: the layers. An A matrix whose B is zero everywhere has an exactly zero gradient
            (dL/dA h = Bᵀ g): nothing is differentiated through it, and it is never consumed.
        consume: called once per use of a layer in each backward pass; a layer's gradient is the sum
            over the calls. h and g have the dtypes that the model computes with.

    Used as a context manager inside `undisturbed`. Forward passes run inside `forward(...)`, the
    backward passes through them inside `backward(...)`.
    """

    def __init__(self, linears: Sequence[TrainableLinear], consume: Consumer) -> None:
        self._silent = silent_modules(linears)
        self.linears = linears
        self._consume = consume
        self._shapes: tuple[tuple[int, int], ...] = ()
        self._segments: tuple[torch.Tensor, ...] = ()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.first_label = linears[0].label
        self.used = False  # whether any of the layers took part in a forward pass

    def __enter__(self) -> Capture:
        for linear in self.linears:
            hook = _cut if id(linear.module) in self._silent else self._forward_hook(linear)
            self._handles.append(linear.module.register_forward_hook(hook))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def forward(self, *shapes: tuple[int, int]) -> Iterator[None]:
        """Capture the forward passes inside, of B x T tokens: the shape of the model's input.

        There may be others, of tokens that some layers see besides: each layer's input has one.
        """
        before, self._shapes = self._shapes, shapes
        try:
            yield
        finally:
            self._shapes = before

    @contextmanager
    def backward(self, *segments: torch.Tensor) -> Iterator[None]:
        """Add the gradients that arrive inside to rows.

        segments: for each of the forward pass's shapes, which of its B T tokens (row-major) add to
            which row.
        """
        before, self._segments = self._segments, segments
        try:
            yield
        finally:
            self._segments = before

    def _forward_hook(
        self, linear: TrainableLinear
    ) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def on_forward(
            module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
        ) -> None:
            shapes = self._shapes
            if not shapes or not torch.is_grad_enabled():
                return
            self.used = True
            which = _which_tokens(linear, inputs[0], shapes)
            h = _by_token(inputs[0])

            def on_gradient(g: torch.Tensor) -> None:
                assert self._segments, "a backward pass outside of `backward`"
                _which_tokens(linear, g, shapes[which : which + 1])
                self._consume(linear, h, _by_token(g), self._segments[which])

            if output.requires_grad:
                output.register_hook(on_gradient)
                return

            def on_leaf_gradient(leaf: torch.Tensor) -> None:
                assert leaf.grad is not None
                g, leaf.grad = leaf.grad, None
                on_gradient(g)

            # All parameters are frozen: the graph begins here.
            output.requires_grad_().register_post_accumulate_grad_hook(on_leaf_gradient)

        return on_forward


def _cut(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
    return output.detach()


def _by_token(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1])


def _which_tokens(
    linear: TrainableLinear, tensor: torch.Tensor, shapes: Sequence[tuple[int, int]]
) -> int:
    """Return the number of the first of `shapes` whose tokens are those of `tensor` [..., n]."""
    # Some MLPs flatten batch and time; attention may have dimensions of heads or chunks. Unless the
    # sequences come first, the order is another one. The self-check verifies it.
    leading = tensor.shape[:-1]
    count, first = math.prod(leading), next((size for size in leading if size != 1), 1)
    for number, (sequences, length) in enumerate(shapes):
        if count == sequences * length and (sequences == 1 or first in (sequences, count)):
            return number
    tokens = " or ".join(f"{sequences} × {length}" for sequences, length in shapes)
    what = "is a routed expert, which" if "expert" in linear.label else "has an input that"
    raise UnsupportedParameterError(
        f"cannot capture per-sample gradients of {linear.label!r}: it {what} has not one row for "
        f"each of {tokens} tokens (shape {list(tensor.shape)}); use verify=True, "
        "which finds this out and takes all gradients from autograd"
    )
