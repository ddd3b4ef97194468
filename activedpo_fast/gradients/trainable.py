"""The trainable parameters of a model: the linear layers among them, and which are none."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.sketch import canonical_name
from activedpo_fast.models.adapters import active_adapters, adapter_parameters, tuner_layers


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


@dataclass(frozen=True)
class TrainableParameters:
    """The parameters that a model trains.

    Attributes:
        by_name: by canonical name, in the order of `model.named_parameters()`. A parameter that
            several modules share is there once.
        linears: the layers whose per-sample gradients hooks can capture.
        others: kinds of the parameters that are no part of such a layer, by name.
    """

    by_name: Mapping[str, nn.Parameter]
    linears: Sequence[TrainableLinear]
    others: Mapping[str, str] = field(default_factory=dict)

    @property
    def shapes(self) -> list[tuple[str, torch.Size]]:
        """The canonical names and shapes, for a `SketchPlan`."""
        return [(name, parameter.shape) for name, parameter in self.by_name.items()]

    @property
    def row_dtype(self) -> torch.dtype:
        """float64 if all trainable parameters are float64, else float32."""
        dtypes = {parameter.dtype for parameter in self.by_name.values()}
        return torch.float64 if dtypes == {torch.float64} else torch.float32

    def describe_others(self) -> str:
        """Return how many of each kind there are, and the first name."""
        kinds = Counter(self.others.values()).most_common()
        first = next(iter(self.others))
        return f"{', '.join(f'{count} of {kind}' for kind, count in kinds)}; first: {first!r}"


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """Return what `model` trains.

    For a PEFT model these are the weights of the active adapter, and what else requires a gradient.
    Parameters of other adapters take no part in the forward pass and are left out.

    Raises:
        ActiveDPOError: nothing is trainable, or an adapter is merged or disabled.
    """
    _check_adapters(model)
    inactive = adapter_parameters(model, inactive=True)
    # With several active adapters, only their names distinguish the parameters.
    adapters = active_adapters(model)
    adapter = adapters[0] if len(adapters) == 1 else None
    owners = _owners(model)
    unlike_linear = _matrices_beside_linears(model)

    by_name: dict[str, nn.Parameter] = {}
    others: dict[str, str] = {}
    found: dict[int, dict[str, str]] = {}
    modules: dict[int, nn.Module] = {}
    for full_name, parameter in model.named_parameters():
        if not parameter.requires_grad or id(parameter) in inactive:
            continue
        name = canonical_name(full_name, adapter)
        if name in by_name:
            raise ActiveDPOError(f"two trainable parameters have the canonical name {name!r}")
        by_name[name] = parameter
        kind = _kind_of_other(owners[id(parameter)], unlike_linear)
        if kind is not None:
            others[name] = kind
            continue
        _, module, attribute = owners[id(parameter)][0]
        modules[id(module)] = module
        found.setdefault(id(module), {})[attribute] = name
    if not by_name:
        raise ActiveDPOError(
            "the model has no trainable parameter to take gradients of: load the adapter with "
            "is_trainable=True, wrap the model with peft.get_peft_model, or pass peft_config"
        )
    readers = _readers(model)
    linears = [
        TrainableLinear(modules[key], names.get("weight"), names.get("bias"), readers.get(key, ()))
        for key, names in found.items()
    ]
    return TrainableParameters(by_name, linears, others)


def silent_modules(linears: Sequence[TrainableLinear]) -> frozenset[int]:
    """Return ids of the A matrices whose B is currently all zero, as at LoRA's initialization."""
    return frozenset(
        id(linear.module)
        for linear in linears
        if linear.readers and not any(torch.count_nonzero(b.weight) for b in linear.readers)  # type: ignore[arg-type]
    )


# (path, module, the parameter's name in it)
_Owner = tuple[str, nn.Module, str]


def _owners(model: nn.Module) -> dict[int, list[_Owner]]:
    """Return the modules that have a parameter, by the parameter's id."""
    found: dict[int, list[_Owner]] = defaultdict(list)
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                found[id(parameter)].append((path, module, attribute))
    return found


def _kind_of_other(owners: list[_Owner], unlike_linear: Mapping[int, str]) -> str | None:
    """Return the kind of a parameter that is not of exactly one linear layer, else None."""
    path, module, attribute = owners[0]
    if len(owners) > 1:
        return "shared weights"
    if id(module) in unlike_linear:
        return unlike_linear[id(module)]
    if isinstance(module, nn.ParameterDict):  # where PEFT keeps weights that are no modules
        return path.rpartition(".")[2]
    if not isinstance(module, (nn.Linear, Conv1D)) or attribute not in ("weight", "bias"):
        return type(module).__name__
    return None


def _matrices_beside_linears(model: nn.Module) -> dict[int, str]:
    """Return LoRA's A and B, by id, with the kind of LoRA, if they do not act token by token.

    DoRA also uses them for the norm of the whole weight, and PEFT's `ParamWrapper` adds their
    product to fused experts and routers.
    """
    found: dict[int, str] = {}
    for _, layer in tuner_layers(model):
        if not isinstance(layer, LoraLayer):
            continue
        variants = getattr(layer, "lora_variant", {})
        for adapter in layer.active_adapters:
            if isinstance(layer, ParamWrapper):
                kind = f"LoRA on {layer.parameter_name}"
            elif adapter in variants:
                kind = type(variants[adapter]).__name__.removesuffix("Variant")
            else:
                continue
            for matrices in (layer.lora_A, layer.lora_B):
                if adapter in matrices:
                    found[id(matrices[adapter])] = kind
    return found


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
