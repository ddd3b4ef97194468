"""π_ref: another model, another adapter, other weights of the same adapter, or the base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.models.adapters import adapter_state, load_adapter_state, trained_outside
from activedpo_fast.models.undisturbed import undisturbed

RefModel = PreTrainedModel | PeftModel | str | Mapping[str, torch.Tensor]
"""A model, the name of an adapter of the policy, or weights of its adapter (`adapter_state`)."""

_REFERENCE = "ref"  # TRL's DPOTrainer's name for the adapter that is π_ref

# Attributes of PEFT models and layers that store which adapters are active.
_SWITCHES = ("active_adapter", "_active_adapter", "_disable_adapters", "_adapters_disabled")


def check_ref_model(model: nn.Module, ref_model: RefModel | None, *, needed: bool = False) -> None:
    """Raise `ActiveDPOError` if `ref_model` cannot be the reference of the policy `model`.

    Args:
        needed: also if there is none.
    """
    if needed and ref_model is None and not isinstance(model, PeftModel):
        raise ActiveDPOError(
            "this strategy needs the reference model: pass ref_model=, or a PEFT "
            "model, whose base model is then the reference"
        )
    if isinstance(ref_model, (str, Mapping)):
        if not isinstance(model, PeftModel):
            raise ActiveDPOError(
                "ref_model: adapters and their weights are of a PEFT model, not "
                f"of {type(model).__name__}; pass a model"
            )
        if isinstance(ref_model, str):
            _check_adapter(model, ref_model)
    elif ref_model is not None:
        if not isinstance(ref_model, nn.Module):
            raise ActiveDPOError(
                "ref_model: expected a model, the name of an adapter or the "
                f"weights of one, got {type(ref_model).__name__}"
            )
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        if any(id(parameter) in trained for parameter in ref_model.parameters()):
            # This includes `model.get_base_model()`: PEFT inserts its layers into the base model.
            raise ActiveDPOError(
                "ref_model: this model shares trainable weights with the policy, "
                "so it is the policy itself; leave ref_model out for the base "
                "model, or load the reference by itself"
            )


@contextmanager
def reference_policy(
    model: PreTrainedModel | PeftModel, ref_model: RefModel | None
) -> Iterator[PreTrainedModel | PeftModel]:
    """Yield the model whose log-probs are those of π_ref inside the context.

    The policy is restored afterward: weights, active adapters, flags and modes.

    Args:
        model: the policy.
        ref_model: None for the adapter "ref" of a PEFT model that has one, else its base model.

    Raises:
        ActiveDPOError: no reference, or one that is the policy itself; merged adapters; trained
            weights outside the adapter, which would be in every adapter's reference.
    """
    check_ref_model(model, ref_model, needed=True)
    if ref_model is not None and not isinstance(ref_model, (str, Mapping)):
        yield ref_model
        return
    model = cast(PeftModel, model)
    if any(isinstance(layer, BaseTunerLayer) and layer.merged for layer in model.modules()):
        raise ActiveDPOError(
            "the adapter is merged into the model, which then has no reference; "
            "call model.unmerge_adapter() first"
        )
    if isinstance(ref_model, Mapping):
        if len(model.active_adapters) != 1:
            raise ActiveDPOError(
                "ref_model: weights are of one adapter, but the active ones are "
                f"{', '.join(model.active_adapters) or 'none'}"
            )
        _check_only_adapters_are_trained(model, biases=True)
        with _weights(model, model.active_adapters[0], ref_model):
            yield model
        return
    if ref_model is None and _REFERENCE in model.peft_config:
        ref_model = _REFERENCE
        _check_adapter(model, ref_model)
    _check_only_adapters_are_trained(model, biases=False)
    with _adapters_as_found(model):
        if ref_model is None:
            with model.disable_adapter():
                yield model
        else:
            model.set_adapter(ref_model)
            yield model


def _check_adapter(model: PeftModel, name: str) -> None:
    if name not in model.peft_config:
        raise ActiveDPOError(
            f"ref_model: the model has no adapter called {name!r}; it has "
            f"{', '.join(model.peft_config)}"
        )
    if name in model.active_adapters:
        raise ActiveDPOError(
            f"ref_model: the adapter {name!r} is active, so it is the policy "
            "itself; activate the one that is trained"
        )


def _check_only_adapters_are_trained(model: PeftModel, *, biases: bool) -> None:
    """Refuse trained weights outside adapters, which stay trained for any active adapter.

    LoRA's bias="all" trains the base model's biases: they are part of the adapter's weights, but
    not of another adapter of the model.
    """
    for name in trained_outside(model, biases=biases):
        raise ActiveDPOError(
            f"{name} is trained besides the adapter, so the model no longer has its old value; "
            "pass a model that was loaded by itself as ref_model"
        )


@contextmanager
def _weights(model: PeftModel, name: str, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Put other weights into the adapter `name`; adding an adapter may change the base model."""
    own = adapter_state(model, adapter_name=name)
    with undisturbed(model):
        try:
            load_adapter_state(model, weights, adapter_name=name)
            yield
        finally:
            load_adapter_state(model, own, adapter_name=name)


@contextmanager
def _adapters_as_found(model: PeftModel) -> Iterator[None]:
    """Restore which adapters are active, layer by layer, and every flag that switching sets."""
    found = [
        (own, {name: own[name] for name in _SWITCHES if name in own})
        for own in map(vars, model.modules())
    ]
    with undisturbed(model):
        try:
            yield
        finally:
            for own, before in found:
                for name in _SWITCHES:
                    own.pop(name, None)
                own.update(before)
