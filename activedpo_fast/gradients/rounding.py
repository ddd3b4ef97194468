"""How much a model's own rounding changes its numbers, if it rounds more than its weights' dtype.

Layers may quantize their inputs (int8 dynamic quantization), or compute in bfloat16 inside a
float32 model (4-bit weights, autocast in a `forward`). There, numbers that differ in their last bit
before are rounded to neighbors, and that is how a response in a batch differs from the same one
alone. So it is measured: the inputs of the first layer are changed by a few last bits, and the
change of the result is what rounding does to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from activedpo_fast.gradients.batches import Batch
from activedpo_fast.gradients.passes import whole_model_logps
from activedpo_fast.models.adapters import causal_lm
from activedpo_fast.models.undisturbed import undisturbed

# Relative to the dtype's epsilon: about what sums of a thousand terms in another order differ by.
_DISTURBANCE = 32.0


def rounds_its_activations(model: nn.Module, batch: Batch) -> bool:
    """Return whether a forward pass of `batch` rounds float32 or float64 numbers to fewer bits."""
    with undisturbed(model), torch.no_grad(), _Rounding() as rounding:
        whole_model_logps(model, batch)
    return bool(rounding.seen)


@contextmanager
def disturbed(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Change the embeddings of all tokens by a few units in the last place, up or down."""

    def change(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, output.shape, generator=generator) * 2 - 1
        size = _DISTURBANCE * torch.finfo(output.dtype).eps
        return output * (1 + size * signs.to(output))

    embeddings: nn.Module = causal_lm(model).get_input_embeddings()  # type: ignore[operator]
    handle = embeddings.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


class _Rounding(TorchDispatchMode):
    """Notes whether an operation turns numbers of 32 bits or more into some of 16 or fewer."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(map(_dispatches, types)):
            return NotImplemented  # quantized weights say which operations they are made of
        result = func(*args, **kwargs)
        if not self.seen and any(map(_is_coarse, tree_leaves(result))):
            self.seen = any(map(_is_fine, tree_leaves((args, kwargs))))
        return result


def _dispatches(kind: type) -> bool:
    """Return whether a class of tensors has a say itself; bitsandbytes' weights have none."""
    dispatch: Any = getattr(kind, "__torch_dispatch__", None)
    return dispatch is not None and dispatch is not torch.Tensor.__torch_dispatch__


def _is_coarse(value: Any) -> bool:
    # Weights that are unpacked are not made of floating numbers.
    return (
        isinstance(value, torch.Tensor) and value.dtype != torch.bool and value.dtype.itemsize <= 2
    )


def _is_fine(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype.itemsize > 2
    )
