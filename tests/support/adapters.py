"""Adapters of every kind that PEFT has, except for LoRA on linear layers alone."""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from tests.support.models import tiny_causal_lm

LORA: dict[str, Any] = dict(r=4, target_modules=["q_proj", "down_proj"])
ADAPTERS: dict[str, PeftConfig] = {
    "DoRA": LoraConfig(**LORA, use_dora=True),
    "LoRA on an embedding": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "modules_to_save": LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"]),
    "norms in modules_to_save": LoraConfig(**LORA, modules_to_save=["norm", "input_layernorm"]),
    "trainable tokens of LoRA": LoraConfig(**LORA, trainable_token_indices=[323, 343, 364]),
    "trainable tokens": peft.TrainableTokensConfig(
        target_modules=["embed_tokens"], token_indices=[323, 343, 364]
    ),
    "VeRA": peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "LoHa": peft.LoHaConfig(r=4, target_modules=["q_proj"]),
    "LoKr": peft.LoKrConfig(r=4, target_modules=["q_proj"]),
    "OFT": peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"]),
    "BOFT": peft.BOFTConfig(boft_block_size=8, target_modules=["q_proj"]),
    "IA3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "AdaLoRA": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=3),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=3),
    "P-tuning": peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16),
}


# Those whose gradients hooks capture.
CAPTURED = (
    *("DoRA", "LoRA on an embedding", "modules_to_save", "norms in modules_to_save"),
    *("trainable tokens of LoRA", "trainable tokens", "norms"),
)


def spread(model: nn.Module, seed: int = 1) -> Any:
    """Move the trainable weights from their initialization, where many have no effect."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # AdaLoRA's ranknum is a constant, which PEFT makes trainable in some dtypes.
            if parameter.requires_grad and "ranknum" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def adapted(
    config: PeftConfig,
    dtype: torch.dtype = torch.float64,
    *,
    adapter_name: str = "default",
    **model: Any,
) -> Any:
    """A tiny Llama with an adapter, as after some training."""
    config = copy.deepcopy(config)
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(3)
    base = tiny_causal_lm("llama", dtype, **model)
    return spread(get_peft_model(base, config, adapter_name=adapter_name).to(dtype))
