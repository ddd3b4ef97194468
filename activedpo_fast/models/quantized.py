"""Quantized layers: whether gradients flow back through them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from activedpo_fast.errors import ActiveDPOError


def keep_differentiable(model: nn.Module) -> None:
    """Let gradients flow through bitsandbytes' 4-bit layers of a model in eval mode.

    In eval mode on a CPU with bfloat16 instructions, such a layer packs its weights for inference
    at the first pass, for good. Packed, it has no gradient, and autograd silently leaves out what
    is below it. The layer has no dropout, so it computes the same in training mode, in which it
    does not pack; the caller restores the modes.
    """
    for layer in _four_bit_layers(model):
        layer.training = True


def check_gradients_flow(model: nn.Module) -> None:
    """Raise if no gradient flows back through a frozen layer, because its kernel is for inference.

    One layer of each kind is tried, on an input of zeros.

    Raises:
        ActiveDPOError: naming the layer.
    """
    for layer in _four_bit_layers(model):
        # bitsandbytes 0.50 cannot undo it: it leaves the scales in another order.
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise ActiveDPOError(
                "bitsandbytes has packed the model's 4-bit weights for inference, which has no "
                "gradients, in a pass in eval mode: load the model again, and call its train() "
                "before you run it"
            )
    tried = set()
    for path, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        if not isinstance(layer, nn.Linear) or not isinstance(weight, torch.Tensor):
            continue
        quantizes_inputs = getattr(weight, "act_quant_kwargs", None) is not None  # torchao
        kind = type(layer), type(weight), quantizes_inputs
        if kind == (nn.Linear, nn.Parameter, False) or kind in tried or weight.requires_grad:
            continue
        tried.add(kind)
        if not _gradient_flows(layer, next(model.parameters())):
            raise ActiveDPOError(
                f"{path} ({type(layer).__name__}, weights of {type(weight).__name__}) passes no "
                "gradient back to its input, as quantization for inference alone: load the model "
                "with weights quantized only (not activations), or not quantized"
            )


def _gradient_flows(layer: nn.Linear, like: torch.Tensor) -> bool:
    dtype = like.dtype if like.is_floating_point() else torch.float32
    zeros = torch.zeros(
        1, 2, layer.in_features, dtype=dtype, device=layer.weight.device, requires_grad=True
    )
    try:
        with torch.enable_grad():
            found = layer(zeros)
    except Exception:  # it may need more than an input; the self-check runs the whole model
        return True
    return not isinstance(found, torch.Tensor) or found.requires_grad


def _four_bit_layers(model: nn.Module) -> Iterator[Any]:
    package: Any = sys.modules.get("bitsandbytes")
    if package is not None:
        yield from (m for m in model.modules() if isinstance(m, package.nn.Linear4bit))
