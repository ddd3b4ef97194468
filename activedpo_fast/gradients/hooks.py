"""Hooks that capture the inputs and output gradients of every trainable layer.

For y = W h the gradient of an objective is Σ_t g_t h_tᵀ, where g_t is its gradient at the layer's
output for token t. A response's own part is the sum over the tokens that only it has. Hooks capture
h in the forward pass and g in the backward pass; `layers` has the rules for this and other layers.
Autograd computes no weight gradient, and differentiates nothing below the lowest trainable layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from activedpo_fast.gradients.layers import Call, Layer, has_tokens, silent_modules
from activedpo_fast.gradients.terms import Term


class Consumer(Protocol):
    """Takes what layers add to rows."""

    def add(self, terms: Sequence[Term], segments: torch.Tensor) -> None:
        """Take what one use of a layer adds.

        segments: int64 [S, 3], of (first token, token after the last, row).
        """

    def finish(self) -> None:
        """Let go of all terms: a backward pass has ended, and with it what its graph keeps."""


class Capture:
    """Hooks on trainable layers that hand what they add to a consumer as gradients arrive.

    Args:
        layers: the layers. An A matrix whose B is zero everywhere has an exactly zero gradient
            (dL/dA h = Bᵀ g): nothing is differentiated through it, and it is never consumed.
        consumer: given each use of a layer in each backward pass; a layer's gradient is the sum
            over them. Tensors have the dtypes that the model computes with.

    Used as a context manager inside `undisturbed`. Forward passes run inside `forward(...)`, the
    backward passes through them inside `backward(...)`.
    """

    def __init__(self, layers: Sequence[Layer], consumer: Consumer) -> None:
        self._silent = silent_modules(layers)
        self.layers = layers
        self._consumer = consumer
        self._shapes: tuple[tuple[int, int], ...] = ()
        self._segments: tuple[torch.Tensor, ...] = ()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.first_label = layers[0].label
        self.used = False  # whether any of the layers took part in a forward pass

    def __enter__(self) -> Capture:
        for layer in self.layers:
            hook = _cut if id(layer.module) in self._silent else self._forward_hook(layer)
            handle = layer.module.register_forward_hook(hook, with_kwargs=True)
            self._handles.append(handle)
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def forward(self, *shapes: tuple[int, int]) -> Iterator[None]:
        """Capture the forward passes inside, of B x T tokens: the shape of the model's input.

        There may be others, of tokens that some layers see besides (an encoder's, a prompt's once
        more): each layer's input has one of them.
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
            self._consumer.finish()
        finally:
            self._segments = before

    def _forward_hook(self, layer: Layer) -> Callable[..., None]:
        def on_forward(
            module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
        ) -> None:
            shapes = self._shapes
            if not shapes or not torch.is_grad_enabled():
                return
            self.used = True
            call = Call(args, kwargs, shapes[0])
            which = _which_tokens(call.first, shapes)
            if which > 0:
                call = call._replace(shape=shapes[which])
            rule = layer.seen(_beside(output, call))

            def on_gradient(g: torch.Tensor) -> None:
                assert self._segments, "a backward pass outside of `backward`"
                segments = self._segments[which]
                # A rule may run modules once more, which are not captured then.
                before, self._shapes = self._shapes, ()
                try:
                    terms = rule(g, segments)
                finally:
                    self._shapes = before
                self._consumer.add(terms, segments)

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


def _cut(module: nn.Module, args: object, kwargs: object, output: torch.Tensor) -> torch.Tensor:
    return output.detach()


def _beside(output: torch.Tensor, call: Call) -> Call:
    """Return a call with its tensors on the device of its output.

    In a model that is split over devices, hooks see inputs before they are moved to the layer's.
    """
    if call.first.device == output.device:
        return call

    def moved(value: Any) -> Any:
        return value.to(output.device) if isinstance(value, torch.Tensor) else value

    kwargs = {name: moved(value) for name, value in call.kwargs.items()}
    return Call(tuple(map(moved, call.args)), kwargs, call.shape)


def _which_tokens(tensor: torch.Tensor, shapes: Sequence[tuple[int, int]]) -> int:
    """Return the number of the first of `shapes` that a layer's input has, of states or token ids.

    If it has none, the rule of the layer says so.
    """
    leading = tensor.shape[:-1] if tensor.is_floating_point() else tensor.shape
    if leading == shapes[0]:
        return 0
    apart = (n for n, (b, t) in enumerate(shapes) if leading[0] == b and t in leading[1:])
    flat = (n for n, shape in enumerate(shapes) if has_tokens(leading, shape))
    return next(apart, next(flat, 0))
