"""Which of a model's parameters belong to layers that hooks can capture, and what the others are.

A layer is recognized by its type: the rule for it must be right without the self-check, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from activedpo_fast.gradients.dora import DoraMagnitudes
from activedpo_fast.gradients.layers import (
    Elementwise,
    Layer,
    TrainableEmbedding,
    TrainableEmbeddingLora,
    TrainableLinear,
    TrainedTokens,
)
from activedpo_fast.models.adapters import causal_lm, tuner_layers


class Owner(NamedTuple):
    """A module that has a parameter: its path in the model, and the parameter's name in it."""

    path: str
    module: nn.Module
    attribute: str


class Unit(NamedTuple):
    """The module whose calls show a parameter's gradient, and the parameter's name in it."""

    module: nn.Module
    name: str


class Capturable:
    """The layers of `model` that there are rules for, as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._tuners = dict(tuner_layers(model))
        self._unlike_linear = _matrices_beside_linears(self._tuners)
        self._embeddings = _modules_of(model, "get_input_embeddings")
        self._head = _modules_of(model, "get_output_embeddings")
        self._readers = _readers(self._tuners)
        self._owners: dict[int, list[Owner]] = defaultdict(list)
        for path, module in model.named_modules(remove_duplicate=False):
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    self._owners[id(parameter)].append(Owner(path, module, attribute))

    def units(self, parameter: nn.Parameter) -> list[Unit] | str:
        """Return the units of a parameter, several if modules share it; its kind if it has none."""
        owners = self._owners[id(parameter)]
        found = [self._unit(owner) for owner in owners]
        units = {(id(unit.module), unit.name): unit for unit in found if unit is not None}
        if None in found:
            shared = len({id(owner.module) for owner in owners}) > 1
            return "shared weights" if shared else self._kind(owners[0])
        if len(units) > 1 and not all(_may_share(unit.module) for unit in units.values()):
            return "shared weights"
        return list(units.values())

    def layers(self, module: nn.Module, names: Mapping[str, str]) -> list[Layer]:
        """Return the layers of a unit. names: canonical names, by the names in the unit."""
        if isinstance(module, (nn.Linear, Conv1D)):
            readers = self._readers.get(id(module), ())
            return [TrainableLinear(module, names.get("weight"), names.get("bias"), readers)]
        if isinstance(module, nn.Embedding):
            return [TrainableEmbedding(module, names["weight"])]
        if isinstance(module, TrainableTokensLayer):
            return [TrainedTokens(module, _adapter(own), name) for own, name in names.items()]
        if isinstance(module, LoraEmbedding):
            return [
                TrainableEmbeddingLora(
                    module,
                    adapter,
                    *(names.get(f"lora_embedding_{side}.{adapter}") for side in "AB"),
                )
                for adapter in dict.fromkeys(map(_adapter, names))
            ]
        if isinstance(module, DoraLinearLayer):
            return [DoraMagnitudes(module, names["weight"])]
        return [Elementwise(module, names)]

    def _unit(self, owner: Owner) -> Unit | None:
        _, module, attribute = owner
        if id(module) in self._unlike_linear:
            return None
        if self._is_read_elsewhere(owner):
            return None
        if isinstance(module, (nn.Linear, Conv1D)) and attribute in ("weight", "bias"):
            return Unit(module, attribute)
        if isinstance(module, nn.Embedding):
            known = id(module) in self._embeddings and _plain(module)
            return Unit(module, attribute) if known else None
        if type(module) is DoraLinearLayer:
            return Unit(module, attribute)
        if id(module) in self._head:  # it sees tokens of several responses in one sequence
            return self._of_tokens(owner)
        if _is_norm(module):
            return Unit(module, attribute)
        return self._of_embedding_lora(owner) or self._of_tokens(owner)

    def _is_read_elsewhere(self, owner: Owner) -> bool:
        """Return whether an adapter reads a weight of its base layer without calling the layer."""
        _, tuner = self._tuner_around(owner)
        if tuner is None or tuner.get_base_layer() is not owner.module:
            return False
        dora = isinstance(tuner, LoraLayer) and any(
            _is_dora(tuner, a) for a in tuner.active_adapters
        )
        return isinstance(tuner, TrainableTokensLayer) or (dora and owner.attribute == "bias")

    def _of_tokens(self, owner: Owner) -> Unit | None:
        """Return the unit of trained tokens, also in a head that is tied to the embedding."""
        path, tuner = self._tuner_around(owner)
        if not isinstance(tuner, TrainableTokensLayer):
            return None
        base = tuner.get_base_layer()
        tokens = tuner.token_indices.get(owner.attribute, ())
        plain = isinstance(base, nn.Linear) or (isinstance(base, nn.Embedding) and _plain(base))
        if not plain or len(set(tokens)) < len(tokens):
            return None
        return Unit(tuner, _within(owner, path))

    def _of_embedding_lora(self, owner: Owner) -> Unit | None:
        path, tuner = self._tuner_around(owner)
        if not isinstance(tuner, LoraEmbedding) or owner.attribute in tuner.lora_variant:
            return None
        base = tuner.get_base_layer()
        of_lora = owner.path.rpartition(".")[2].startswith("lora_embedding_")
        known = isinstance(base, nn.Embedding) and _plain(base)
        return Unit(tuner, _within(owner, path)) if of_lora and known else None

    def _tuner_around(self, owner: Owner) -> tuple[str, BaseTunerLayer | None]:
        path = owner.path
        while path and path not in self._tuners:
            path = path.rpartition(".")[0]
        return path, self._tuners.get(path)

    def _kind(self, owner: Owner) -> str:
        path, module, _ = owner
        if id(module) in self._unlike_linear:
            return self._unlike_linear[id(module)]
        if isinstance(module, nn.ParameterDict):  # where PEFT keeps weights that are no modules
            return path.rpartition(".")[2]
        return type(module).__name__


def _within(owner: Owner, path: str) -> str:
    return f"{owner.path}.{owner.attribute}".removeprefix(f"{path}.")


def _adapter(name: str) -> str:
    return name.rpartition(".")[2]


def _may_share(module: nn.Module) -> bool:
    """Return whether a sum over modules of this kind is the gradient of what they share."""
    return isinstance(module, (nn.Linear, Conv1D, nn.Embedding, TrainableTokensLayer))


def _plain(embedding: nn.Embedding) -> bool:
    """Return whether tokens of a batch are embedded apart, and by a known formula."""
    own_forward = type(embedding).forward is not nn.Embedding.forward
    known = not own_forward or hasattr(embedding, "embed_scale")
    return known and embedding.max_norm is None and not embedding.scale_grad_by_freq


def _is_norm(module: nn.Module) -> bool:
    name = type(module).__name__
    return ("LayerNorm" in name or "RMSNorm" in name) and not any(module.children())


def _modules_of(model: nn.Module, getter: str) -> set[int]:
    """Return ids of the modules of the part of a causal LM that `getter` returns, if any."""
    get = getattr(causal_lm(model), getter, None)
    part = None if get is None else get()
    return set() if part is None else set(map(id, part.modules()))


def _matrices_beside_linears(tuners: Mapping[str, BaseTunerLayer]) -> dict[int, str]:
    """Return LoRA's A and B, by id, with the kind of LoRA, if they do not act token by token.

    PEFT's `ParamWrapper` adds their product to fused experts and routers. Of the variants of LoRA,
    DoRA on linear layers alone is known to use them token by token.
    """
    found: dict[int, str] = {}
    for layer in tuners.values():
        if not isinstance(layer, LoraLayer):
            continue
        variants = getattr(layer, "lora_variant", {})
        for adapter in layer.active_adapters:
            if isinstance(layer, ParamWrapper):
                kind = f"LoRA on {layer.parameter_name}"
            elif adapter in variants and not _is_dora(layer, adapter):
                kind = type(variants[adapter]).__name__.removesuffix("Variant")
            else:
                continue
            for matrices in (layer.lora_A, layer.lora_B):
                if adapter in matrices:
                    found[id(matrices[adapter])] = kind
    return found


def _is_dora(layer: LoraLayer, adapter: str) -> bool:
    magnitudes = layer.lora_magnitude_vector
    return adapter in magnitudes and type(magnitudes[adapter]) is DoraLinearLayer


def _readers(tuners: Mapping[str, BaseTunerLayer]) -> dict[int, tuple[nn.Module, ...]]:
    """Return the B matrices by the id of their A, for every LoRA layer of every adapter."""
    found: dict[int, tuple[nn.Module, ...]] = {}
    for layer in tuners.values():
        if isinstance(layer, LoraLayer):
            for adapter, a in layer.lora_A.items():
                if adapter in layer.lora_B:
                    found[id(a)] = (*found.get(id(a), ()), layer.lora_B[adapter])
    return found
