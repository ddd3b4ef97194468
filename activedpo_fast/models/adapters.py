"""A PEFT adapter: its weights, copied and loaded, and the model inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel, PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from activedpo_fast.errors import ActiveDPOError

_ADAPTER = "default"  # the name that PEFT gives the first adapter


def adapter_state(model: PeftModel, *, adapter_name: str = _ADAPTER) -> dict[str, torch.Tensor]:
    """Return a copy of an adapter's weights, by PEFT's names without the adapter's name.

    Raises:
        ActiveDPOError: PEFT returns only the output of a prompt encoder, not the adapter's weights
            (P-tuning, prefix tuning with a projection), so they could not be restored.
    """
    _check_gives_weights(model, adapter_name)
    # False: "auto" may query the Hub to see whether the base model's vocabulary was changed.
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def load_adapter_state(
    model: PeftModel, state: Mapping[str, torch.Tensor], *, adapter_name: str = _ADAPTER
) -> None:
    """Copy weights of `adapter_state` into an adapter of the model.

    Raises:
        ActiveDPOError: names or shapes differ from the adapter's, or as `adapter_state`.
    """
    _check_gives_weights(model, adapter_name)
    own = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    differing = sorted(own.keys() ^ state.keys()) or [
        name for name in sorted(own) if own[name].shape != state[name].shape
    ]
    if differing:
        raise ActiveDPOError(f"the adapter weights do not fit the model: {differing[0]!r} differs")
    set_peft_model_state_dict(model, dict(state), adapter_name=adapter_name)


def adapter_parameters(model: nn.Module, *, inactive: bool = False) -> set[int]:
    """Return the ids of the parameters of all adapters, or only of inactive ones.

    This includes copies of modules (`modules_to_save`), trainable tokens and virtual tokens.
    """
    return {
        id(parameter)
        for adapter, content, active in _adapter_contents(model)
        if not (inactive and adapter in active)
        for parameter in (content.parameters() if isinstance(content, nn.Module) else [content])
    }


def trained_outside(model: PeftModel, *, biases: bool) -> list[str]:
    """Return the names of trained parameters that are not in `adapter_state`.

    Args:
        biases: biases of the base model that LoRA's option `bias` trains are in it, too.
    """
    own = adapter_parameters(model)
    configs = (model.peft_config[name] for name in model.active_adapters)
    biases = biases and any(getattr(config, "bias", "none") != "none" for config in configs)
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and id(parameter) not in own
        and not (biases and name.endswith(".bias"))
    ]


def _adapter_contents(model: nn.Module) -> Iterator[tuple[str, Any, Sequence[str]]]:
    """Yield (adapter, a part of its weights, the active adapters) for all parts of a model."""
    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            for group in (*module.adapter_layer_names, *module.other_param_names):
                contents: Any = module
                for name in group.split("."):
                    contents = getattr(contents, name, None)
                if isinstance(contents, (nn.ModuleDict, nn.ParameterDict)):
                    for adapter, content in contents.items():
                        yield adapter, content, module.active_adapters
    if isinstance(model, PeftModel):
        for adapter, content in getattr(model, "prompt_encoder", {}).items():
            yield adapter, content, active_adapters(model)


def active_adapters(model: nn.Module) -> list[str]:
    """Return the names of the adapters that take part in a forward pass."""
    names = {name: None for _, layer in tuner_layers(model) for name in layer.active_adapters}
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        names[model.active_adapter] = None
    return list(names)


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield path, module


def _check_gives_weights(model: PeftModel, adapter_name: str) -> None:
    config: Any = model.peft_config.get(adapter_name)
    if getattr(config, "is_prompt_learning", False) and (
        config.peft_type == PeftType.P_TUNING or getattr(config, "prefix_projection", False)
    ):
        raise ActiveDPOError(
            f"the adapter {adapter_name!r} ({config.peft_type.value}) computes "
            "its prompt by an encoder, whose weights cannot be copied and put "
            "back; use prompt tuning or LoRA"
        )


def causal_lm(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PEFT model; LoRA layers are among its modules."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the stack of layers of a causal LM, without its head; the LM itself if it has none."""
    base: Any = causal_lm(model)
    decoder: nn.Module = base.get_decoder()
    # transformers takes what is named `decoder` for it, which in ModernBERT is the head.
    return base.base_model if decoder is base.get_output_embeddings() else decoder
