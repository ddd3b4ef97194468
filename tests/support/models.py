"""Tiny random models and a small tokenizer, shared by the tests.

The architectures are the real ones of `transformers`; only their sizes are small.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 384

_CORPUS = [
    "A library that decides which preference pairs to label next when a team aligns a model.",
    "Prompts have responses; people prefer one of them. TL;DR: choose well, label less.",
    "The quick brown fox jumps over the lazy dog, 0123456789 times.",
    "user assistant system <|im_start|> <|im_end|> What is a sketch? A short random projection.",
]

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@lru_cache
def _trained_bpe() -> str:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=specials,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return bpe.to_str()


def tiny_tokenizer(chat: bool = False, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; with `chat`, a ChatML template and <|im_end|> as EOS."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_bpe()),
        eos_token="<|im_end|>" if chat else "<|endoftext|>",
        pad_token="<|pad|>",
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
    )
    if chat:
        tokenizer.chat_template = _CHATML
    return tokenizer


_COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    intermediate_size=48,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=1,
)

# architecture -> (config class, its own arguments, modules that LoRA targets)
_SPECS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": (
        "LlamaConfig",
        dict(num_key_value_heads=2),
        ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    ),
    "gemma": (
        "GemmaConfig",
        dict(num_key_value_heads=2, head_dim=8),
        ["q_proj", "v_proj", "gate_proj"],
    ),
    "gemma2": (
        "Gemma2Config",
        dict(num_key_value_heads=2, head_dim=8, sliding_window=16, query_pre_attn_scalar=8),
        ["q_proj", "o_proj", "up_proj"],
    ),
    "qwen": (
        "Qwen3Config",
        dict(num_key_value_heads=2, head_dim=8),
        ["q_proj", "k_proj", "v_proj", "o_proj"],
    ),
    "gpt2": ("GPT2Config", dict(), ["c_attn", "c_proj", "c_fc"]),
    "gpt_neox": ("GPTNeoXConfig", dict(), ["query_key_value", "dense", "dense_h_to_4h"]),
    "mixtral": (
        "MixtralConfig",
        dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
        ["q_proj", "v_proj", "o_proj"],
    ),
}
ARCHS = tuple(_SPECS)


def tiny_causal_lm(
    arch: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A random model of the named architecture, in eval mode."""
    config_class, own, _ = _SPECS[arch]
    config = getattr(transformers, config_class)(**{**_COMMON, **own, **overrides})
    torch.manual_seed(seed)
    # Grouped matrix products, the default for experts, have no kernel for float64.
    experts = {"experts_implementation": "eager"} if arch == "mixtral" else {}
    model = transformers.AutoModelForCausalLM.from_config(config, **experts)
    _spread(model)
    return model.to(dtype).eval()


def _spread(model: PreTrainedModel) -> None:
    """Increase the weights: the default initialization makes all tokens almost equally likely."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4.0)


def lora(
    model: PreTrainedModel,
    arch: str,
    *,
    seed: int = 1,
    adapter_name: str = "default",
    randomize: bool = True,
    **config: Any,
) -> PeftModel:
    """Wrap `model` with LoRA; `randomize` gives B ≠ 0, as after some training."""
    _, _, targets = _SPECS[arch]
    settings: dict[str, Any] = dict(
        r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=0.1
    )
    settings.update(config)
    dtype = next(model.parameters()).dtype
    peft_model = get_peft_model(model, LoraConfig(**settings), adapter_name=adapter_name)
    if randomize:
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
    if dtype == torch.float64:
        peft_model.double()
    return peft_model.eval()


def saved_model(folder: Path, arch: str = "llama", *, chat: bool = False) -> tuple[Path, Path]:
    """Write a base model with its tokenizer, and an adapter that names it as its base.

    Returns:
        The folders of the base model and of the adapter.
    """
    base, adapter = folder / "model", folder / "adapter"
    tiny_causal_lm(arch).save_pretrained(base)
    tiny_tokenizer(chat=chat).save_pretrained(base)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(base)
    lora(loaded, arch).save_pretrained(str(adapter))
    return base, adapter


# Models that embed positions differently beyond a number of tokens.
ORIGINAL_LENGTH = 24  # positions beyond this length are embedded differently

# For the config of any decoder.
TINY_SIZES: dict[str, Any] = dict(
    vocab_size=384,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position_embeddings=128,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=1,
)
_LONGROPE = dict(
    rope_type="longrope",
    rope_theta=1e4,
    short_factor=[1.0, 1.5, 2.0, 3.0],
    long_factor=[4.0, 7.0, 9.0, 20.0],
    original_max_position_embeddings=ORIGINAL_LENGTH,
)
_DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)

# name -> (config class, what makes its positions depend on length, LoRA targets)
VARYING: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "phi3 longrope": (
        "Phi3Config",
        dict(rope_parameters=_LONGROPE, original_max_position_embeddings=ORIGINAL_LENGTH),
        ["qkv_proj", "o_proj", "down_proj"],
    ),
    "phimoe longrope": (
        "PhimoeConfig",
        dict(
            rope_parameters={**_LONGROPE, "short_mscale": 1.1, "long_mscale": 1.6},
            num_local_experts=2,
            num_experts_per_tok=2,
        ),
        ["q_proj", "k_proj", "v_proj", "o_proj"],
    ),
    "llama dynamic": (
        "LlamaConfig",
        dict(rope_parameters=_DYNAMIC, max_position_embeddings=ORIGINAL_LENGTH),
        ["q_proj", "v_proj"],
    ),
    "gemma3 dynamic": (
        "Gemma3TextConfig",
        dict(
            rope_parameters={
                "full_attention": dict(_DYNAMIC, factor=8.0),
                "sliding_attention": dict(rope_type="default", rope_theta=1e4),
            },
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=16,
            max_position_embeddings=ORIGINAL_LENGTH,
        ),
        ["q_proj", "k_proj", "o_proj"],
    ),
}


def varying_lm(name: str, dtype: torch.dtype = torch.float64) -> PeftModel:
    """With LoRA; positions are embedded by the length of the longest sequence of a batch."""
    config_class, own, targets = VARYING[name]
    config = getattr(transformers, config_class)(**{**TINY_SIZES, **own})
    torch.manual_seed(0)
    experts = {"experts_implementation": "eager"} if "moe" in name else {}
    model = transformers.AutoModelForCausalLM.from_config(config, **experts)
    _spread(model)
    return lora(model.to(dtype).eval(), "llama", target_modules=targets)
