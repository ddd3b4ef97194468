"""The trainable linear layers of a model, and the refusal of unsupported parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from activedpo_fast.errors import ActiveDPOError, UnsupportedParameterError
from activedpo_fast.gradients.sketch import canonical_name
from activedpo_fast.models.adapters import adapter_parameters, tuner_layers


@dataclass(frozen=True)
class TrainableLinear:
    """A linear layer with at least one trainable parameter.

    Attributes:
        module: the `nn.Linear`, or transformers' `Conv1D`, whose weight is stored transposed.
        weight: canonical name of its weight if that is trainable, else None.
        bias: canonical name of its bias if that is trainable, else None.
        readers: for a LoRA A matrix, the B matrices that read its output (several if layers share
            it); nothing else reads it.
    """

    module: nn.Module
    weight: str | None
    bias: str | None
    readers: tuple[nn.Module, ...] = ()

    @property
    def label(self) -> str:
        return self.weight or self.bias or "?"

    @property
    def transposed(self) -> bool:
        return isinstance(self.module, Conv1D)

    def shapes(self) -> Iterator[tuple[str, torch.Size]]:
        """Yield the canonical names and shapes of the trainable parameters."""
        for name, attribute in ((self.weight, "weight"), (self.bias, "bias")):
            if name is not None:
                yield name, getattr(self.module, attribute).shape


def trainable_linears(model: nn.Module) -> list[TrainableLinear]:
    """Return the linear layers that `model` trains, in the order of `model.named_parameters()`.

    For a PEFT model these are the LoRA A and B matrices of the active adapter. Parameters of other
    adapters take no part in the forward pass and are left out.

    Raises:
        UnsupportedParameterError: a trainable parameter is not the weight or bias of exactly one
            linear layer (DoRA magnitudes, embeddings, norms, `modules_to_save`, tied weights, ...).
        ActiveDPOError: nothing is trainable, or an adapter is merged or disabled.
    """
    _check_adapters(model)
    inactive = adapter_parameters(model, inactive=True)
    # With several active adapters, only their names distinguish the parameters.
    adapters = _active_adapters(model)
    adapter = next(iter(adapters)) if len(adapters) == 1 else None
    owners: dict[int, list[tuple[str, nn.Module, str]]] = defaultdict(list)
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners[id(parameter)].append((path, module, attribute))

    found: dict[int, dict[str, str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or id(parameter) in inactive:
            continue
        advice = "" if hasattr(model, "peft_config") else ", or put an adapter on it (peft_config)"
        module, attribute = _linear_owner(name, owners[id(parameter)], advice)
        modules[id(module)] = module
        found.setdefault(id(module), {})[attribute] = canonical_name(name, adapter)
    if not found:
        raise ActiveDPOError(
            "the model has no trainable parameter to take gradients of: load the adapter with "
            "is_trainable=True, wrap the model with peft.get_peft_model, or pass peft_config"
        )
    readers = _readers(model)
    return [
        TrainableLinear(modules[key], names.get("weight"), names.get("bias"), readers.get(key, ()))
        for key, names in found.items()
    ]


def silent_modules(linears: Sequence[TrainableLinear]) -> frozenset[int]:
    """Return ids of the A matrices whose B is currently all zero, as at LoRA's initialization."""
    return frozenset(
        id(linear.module)
        for linear in linears
        if linear.readers and not any(torch.count_nonzero(b.weight) for b in linear.readers)  # type: ignore[arg-type]
    )


def _linear_owner(
    name: str, owners: list[tuple[str, nn.Module, str]], advice: str
) -> tuple[nn.Module, str]:
    reason = None
    _, module, attribute = owners[0]
    if "modules_to_save." in name:
        reason = "belongs to modules_to_save"
    elif len(owners) > 1:
        reason = "is shared by " + " and ".join(path or "the model" for path, _, _ in owners)
    elif not isinstance(module, (nn.Linear, Conv1D)):
        reason = f"belongs to {type(module).__name__}, not to a linear layer"
    elif attribute not in ("weight", "bias"):
        reason = "is neither the weight nor the bias of its linear layer"
    if reason is not None:
        raise UnsupportedParameterError(
            f"cannot take per-sample gradients of trainable parameter {name!r}: it {reason}; "
            f"freeze it (requires_grad_(False)) or leave it out of the adapter{advice}"
        )
    return module, attribute


def _readers(model: nn.Module) -> dict[int, tuple[nn.Module, ...]]:
    """Return the B matrices by the id of their A, for every LoRA layer of every adapter."""
    found: dict[int, tuple[nn.Module, ...]] = {}
    for _, layer in tuner_layers(model):
        if isinstance(layer, LoraLayer):
            for adapter, a in layer.lora_A.items():
                if adapter in layer.lora_B:
                    found[id(a)] = (*found.get(id(a), ()), layer.lora_B[adapter])
    return found


def _check_adapters(model: nn.Module) -> None:
    for path, layer in tuner_layers(model):
        if layer.merged:
            raise ActiveDPOError(
                f"adapter {layer.merged_adapters[0]!r} is merged into {path}: call "
                "unmerge_adapter() first, merged weights have no adapter gradient"
            )
        if layer.disable_adapters:
            raise ActiveDPOError(f"the adapters of {path} are disabled: enable them first")


def _active_adapters(model: nn.Module) -> frozenset[str]:
    names: set[str] = set()
    for _, layer in tuner_layers(model):
        names.update(layer.active_adapters)
    return frozenset(names)
