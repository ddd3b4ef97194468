"""DoRA's weight norms as the constants that they are in its gradient.

DoRA divides by the norms of W + s B A, which PEFT takes out of the graph (section 4.3 of DoRA,
arXiv 2402.09353). To get B A it calls A and B with an identity matrix, whose rows are no tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn


@contextmanager
def constant_dora_norms(model: nn.Module) -> Iterator[None]:
    """Compute the norms of each DoRA layer once, without a graph, for all calls inside.

    The weights must not change inside.
    """
    layers = [module for module in model.modules() if type(module) is DoraLinearLayer]
    for layer in layers:
        weight, norm = _computed_once(layer)
        layer.get_lora_weight, layer.get_weight_norm = weight, norm
    try:
        yield
    finally:
        for layer in layers:
            del layer.get_lora_weight, layer.get_weight_norm


def _computed_once(layer: DoraLinearLayer) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    product, norm = layer.get_lora_weight, layer.get_weight_norm
    found: list[Tensor] = []

    def product_for_norm(**given: Any) -> Tensor:
        if found:
            return torch.empty(0)  # it serves only the norm
        with torch.no_grad():  # hooks do not see this call
            found_product: Tensor = product(**given)
        return found_product

    def known_norm(**given: Any) -> Tensor:
        if not found:
            found.append(norm(**given).detach())
        return found[0]

    return product_for_norm, known_norm
