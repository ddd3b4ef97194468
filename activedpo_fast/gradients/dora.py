"""DoRA: its magnitudes as a layer, and its weight norms as the constants that they are.

The output for an input x is m ⊙ (W x + s B A x) / n + bias, where m are the magnitudes and n the
norms of the rows of W + s B A, which PEFT takes out of the graph (section 4.3 of DoRA, arXiv
2402.09353). So A and B are linear layers like any LoRA's, and the gradient of m is
Σ_t g_t ⊙ (W x_t + s B A x_t) / n. For the norms PEFT calls A and B with an identity matrix, whose
rows are no tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

from activedpo_fast.gradients.layers import Call, Rule, by_token
from activedpo_fast.gradients.terms import Outer, Term


@dataclass(frozen=True)
class DoraMagnitudes:
    """The magnitudes of DoRA on a linear layer, inside `constant_dora_norms`.

    name: their canonical name.
    """

    module: DoraLinearLayer
    name: str

    @property
    def label(self) -> str:
        return self.name

    def seen(self, call: Call) -> Rule:
        given = call.kwargs
        with torch.no_grad():  # hooks do not see this call of A and B
            product = given["scaling"] * given["lora_B"](given["lora_A"](call.first))
            product += given["base_result"]
            if given["base_layer"].bias is not None:
                product -= given["base_layer"].bias
            norm = self.module.get_weight_norm()
            by_magnitude = by_token(self.name, product.div_(norm), call.shape)

        def rule(g: Tensor, segments: Tensor) -> list[Term]:
            g = by_token(self.name, g, call.shape) * by_magnitude
            return [Outer(self.name, g, g.new_ones(len(g), 1), g.nbytes)]

        return rule


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
