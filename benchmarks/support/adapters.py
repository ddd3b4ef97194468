"""What a model trains: adapters of PEFT, after some training, or all of its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
from torch import nn
from transformers import PreTrainedModel

_RANK = 4


def _lora(attention: Sequence[str], model: PreTrainedModel) -> peft.PeftConfig:
    return peft.LoraConfig(r=_RANK, target_modules="all-linear")


def _lora_on_attention(attention: Sequence[str], model: PreTrainedModel) -> peft.PeftConfig:
    return peft.LoraConfig(r=_RANK, target_modules=list(attention))


def _dora(attention: Sequence[str], model: PreTrainedModel) -> peft.PeftConfig:
    return peft.LoraConfig(r=_RANK, target_modules=list(attention), use_dora=True)


def _with_saved_modules(attention: Sequence[str], model: PreTrainedModel) -> peft.PeftConfig:
    """The embeddings and the head, as people train them who add tokens."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    saved = [
        name.rsplit(".", 1)[-1] for name, m in model.named_modules() if any(m is e for e in ends)
    ]
    return peft.LoraConfig(r=_RANK, target_modules=list(attention), modules_to_save=saved)


def _ia3(attention: Sequence[str], model: PreTrainedModel) -> peft.PeftConfig:
    return peft.IA3Config(target_modules=list(attention), feedforward_modules=[])


def _prompt_tuning(attention: Sequence[str], model: PreTrainedModel) -> peft.PeftConfig:
    return peft.PromptTuningConfig(num_virtual_tokens=3)


# By name; "all weights" has no adapter.
_CONFIGS: dict[str, Callable[[Sequence[str], PreTrainedModel], peft.PeftConfig] | None] = {
    "LoRA, all linear layers": _lora,
    "LoRA, attention": _lora_on_attention,
    "DoRA, attention": _dora,
    "LoRA and modules_to_save": _with_saved_modules,
    "IA³": _ia3,
    "prompt tuning": _prompt_tuning,
    "all weights": None,
}
ADAPTERS = tuple(_CONFIGS)


def adapted(model: PreTrainedModel, name: str, attention: Sequence[str]) -> nn.Module:
    """Return `model`, changed in place, with an adapter, the same each time; in eval mode.

    Args:
        name: one of `ADAPTERS`.
        attention: the layers that adapters of some linear layers are on.
    """
    make = _CONFIGS[name]
    if make is None:
        return model.requires_grad_(True).eval()
    config = make(attention, model)
    config.task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    torch.manual_seed(1)
    found: Any = peft.get_peft_model(model, config)
    with torch.no_grad():  # many have no effect at their initialization
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return found.eval()
