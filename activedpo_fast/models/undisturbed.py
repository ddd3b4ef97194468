"""A model in its saved state while features are computed, restored afterward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from activedpo_fast._modes import own_modes
from activedpo_fast.models.own_forward import own_forward
from activedpo_fast.models.positions import fresh_positions
from activedpo_fast.models.quantized import keep_differentiable


@contextmanager
def undisturbed(model: nn.Module, precision: str | None = None) -> Iterator[None]:
    """Run with the model's `own_forward`, eval mode, frozen parameters and fresh position
    embeddings; restore all of them afterward.

    `.grad` is never touched, as no parameter requires one. Grad mode is on, and inference mode and
    autocast are off, regardless of the caller's settings. With precision "bf16", matrix products
    are computed in bfloat16 (autocast).
    """
    device = next(model.parameters()).device.type
    autocast = torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        # A walk through the modules takes milliseconds, and this runs for every batch.
        if any(mode for _, mode in modes):
            model.eval()
        keep_differentiable(model)
        for parameter, flag in flags:
            if flag:
                parameter.requires_grad_(False)
        with own_modes(device), own_forward(model), fresh_positions(model), autocast:
            yield
    finally:
        for module, mode in modes:
            vars(module)["training"] = mode  # as assignment does, which is slow for modules
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
