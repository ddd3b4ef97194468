"""The trainable parameters of a model: those of layers that can be captured, and the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.capturable import Capturable
from activedpo_fast.gradients.last_layers import parameters_of_last_layers
from activedpo_fast.gradients.layers import Layer
from activedpo_fast.gradients.sketch import canonical_name
from activedpo_fast.models.adapters import active_adapters, adapter_parameters, tuner_layers


@dataclass(frozen=True)
class TrainableParameters:
    """The parameters that a model trains.

    Attributes:
        by_name: by canonical name, in the order of `model.named_parameters()`. A parameter that
            several modules share is there once.
        layers: the layers whose per-sample gradients hooks can capture.
        others: kinds of the parameters that are no part of such a layer, by name.
    """

    by_name: Mapping[str, nn.Parameter]
    layers: Sequence[Layer]
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


def trainable_parameters(model: nn.Module, last_layers: int | None = None) -> TrainableParameters:
    """Return what `model` trains.

    For a PEFT model these are the weights of the active adapter, and what else requires a gradient.
    Parameters of other adapters take no part in the forward pass and are left out.

    Args:
        last_layers: only those of so many last decoder layers, and of what runs after them; see
            `parameters_of_last_layers`.

    Raises:
        ActiveDPOError: nothing is trainable, or an adapter is merged or disabled; with
            `last_layers`, the model has fewer layers, or no list of them.
    """
    _check_adapters(model)
    inactive = adapter_parameters(model, inactive=True)
    # With several active adapters, only their names distinguish the parameters.
    adapters = active_adapters(model)
    adapter = adapters[0] if len(adapters) == 1 else None
    capturable = Capturable(model)
    counted = None if last_layers is None else parameters_of_last_layers(model, last_layers)

    by_name: dict[str, nn.Parameter] = {}
    others: dict[str, str] = {}
    found: dict[int, dict[str, str]] = {}
    modules: dict[int, nn.Module] = {}
    skipped = 0
    for full_name, parameter in model.named_parameters():
        if not parameter.requires_grad or id(parameter) in inactive:
            continue
        if counted is not None and id(parameter) not in counted:
            skipped += 1
            continue
        name = canonical_name(full_name, adapter)
        if name in by_name:
            raise ActiveDPOError(f"two trainable parameters have the canonical name {name!r}")
        by_name[name] = parameter
        units = capturable.units(parameter)
        if isinstance(units, str):
            others[name] = units
            continue
        for unit in units:
            modules[id(unit.module)] = unit.module
            found.setdefault(id(unit.module), {})[unit.name] = name
    if not by_name and skipped:
        raise ActiveDPOError(
            f"last_layers: none of the {skipped} trainable parameters is in the last {last_layers} "
            "decoder layers alone, or runs after them"
        )
    if not by_name:
        raise ActiveDPOError(
            "the model has no trainable parameter to take gradients of: load the adapter with "
            "is_trainable=True, wrap the model with peft.get_peft_model, or pass peft_config"
        )
    layers = [
        layer for key, names in found.items() for layer in capturable.layers(modules[key], names)
    ]
    return TrainableParameters(by_name, layers, others)


def _check_adapters(model: nn.Module) -> None:
    for path, layer in tuner_layers(model):
        if layer.merged:
            raise ActiveDPOError(
                f"adapter {layer.merged_adapters[0]!r} is merged into {path}: call "
                "unmerge_adapter() first, merged weights have no adapter gradient"
            )
        if layer.disable_adapters:
            raise ActiveDPOError(f"the adapters of {path} are disabled: enable them first")
