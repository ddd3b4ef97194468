"""Tiny random models of real architectures: transformers' own classes, only their sizes small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 128
PAD, END = 1, 0
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position_embeddings=128,
    bos_token_id=END,
    eos_token_id=END,
    pad_token_id=PAD,
)
_OWN_HEADS: dict[str, Any] = dict(num_key_value_heads=4)  # a key for each head
_EXPERTS: dict[str, Any] = dict(
    num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
)
_LATENT: dict[str, Any] = dict(
    num_key_value_heads=4,
    head_dim=4,
    moe_intermediate_size=16,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    num_experts_per_tok=2,
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=4,
    first_k_dense_replace=1,
)
_GPT: dict[str, Any] = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128)
_STATES: dict[str, Any] = dict(state_size=8, conv_kernel=4, expand=2)
_ENCODER_DECODER: dict[str, Any] = dict(
    d_model=32,
    encoder_layers=1,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    decoder_start_token_id=PAD,
)
_T5: dict[str, Any] = dict(
    d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=PAD
)
_VISION: dict[str, Any] = dict(
    model_type="clip_vision_model",
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)
_LLAVA: dict[str, Any] = dict(
    text_config={"model_type": "llama", **SIZES},
    vision_config=_VISION,
    image_token_index=VOCABULARY - 1,
)

_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Architecture:
    """An architecture.

    Attributes:
        config: the name of its class of configs, without "Config".
        options: what differs from `SIZES`; None leaves an option out.
        attention: the linear layers of its attention, or of what it has instead.
        task: the name of the class of models, without "For" and what is before; by default the
            causal language model.
    """

    config: str
    options: Mapping[str, Any] = field(default_factory=dict)
    attention: Sequence[str] = _QKVO
    task: str = "CausalLM"

    def build(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Return the model, the same each time, in eval mode."""
        options = {name: v for name, v in {**SIZES, **self.options}.items() if v is not None}
        config = getattr(transformers, f"{self.config}Config")(**options)
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, f"AutoModelFor{self.task}").from_config(
            config, dtype=dtype
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:  # at initialization all tokens are almost equally likely
                    parameter.mul_(4.0)
        return model.eval()


ARCHITECTURES: dict[str, Architecture] = {
    "Llama": Architecture("Llama"),
    "Mistral": Architecture("Mistral", dict(sliding_window=12)),
    "Qwen 2": Architecture("Qwen2"),
    "Qwen 3": Architecture("Qwen3"),
    "Gemma": Architecture("Gemma"),
    "Gemma 2": Architecture("Gemma2", dict(sliding_window=12, query_pre_attn_scalar=8)),
    "Gemma 3 (text)": Architecture("Gemma3Text", dict(sliding_window=12)),
    "Gemma 4 (text)": Architecture(
        "Gemma4Text",
        dict(
            sliding_window=12,
            global_head_dim=8,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=8,
        ),
    ),
    "Phi": Architecture("Phi", dict(_OWN_HEADS), ("q_proj", "k_proj", "v_proj", "dense")),
    "Phi-3": Architecture("Phi3", {}, ("qkv_proj", "o_proj")),
    "SmolLM 3": Architecture("SmolLM3"),
    "OLMo 2": Architecture("Olmo2"),
    "OLMo 3": Architecture("Olmo3", dict(sliding_window=12)),
    "Cohere": Architecture("Cohere"),
    "Cohere 2": Architecture("Cohere2", dict(sliding_window=12)),
    "StableLM": Architecture("StableLm"),
    "Granite": Architecture("Granite"),
    "GLM-4": Architecture("Glm4"),
    "EXAONE 4": Architecture("Exaone4", dict(sliding_window=12)),
    "Nemotron": Architecture("Nemotron"),
    "StarCoder 2": Architecture("Starcoder2", dict(sliding_window=12)),
    "GPT-2": Architecture("GPT2", _GPT, ("c_attn", "c_proj")),
    "GPT-Neo": Architecture(
        "GPTNeo",
        dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=12),
        ("q_proj", "k_proj", "v_proj", "out_proj"),
    ),
    "GPT-J": Architecture(
        "GPTJ", dict(_GPT, rotary_dim=4), ("q_proj", "k_proj", "v_proj", "out_proj")
    ),
    "GPT-NeoX": Architecture("GPTNeoX", {}, ("query_key_value", "dense")),
    "OPT": Architecture(
        "OPT", dict(ffn_dim=48, word_embed_proj_dim=32), ("q_proj", "k_proj", "v_proj", "out_proj")
    ),
    "Falcon": Architecture("Falcon", dict(head_dim=None), ("query_key_value", "dense")),
    "BLOOM": Architecture("Bloom", dict(n_layer=2, n_head=4), ("query_key_value", "dense")),
    "MPT": Architecture(
        "Mpt", dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=128), ("Wqkv", "out_proj")
    ),
    "Mixtral": Architecture("Mixtral", _EXPERTS),
    "Qwen 3 MoE": Architecture("Qwen3Moe", _EXPERTS),
    "Qwen 2 MoE": Architecture("Qwen2Moe", dict(_EXPERTS, shared_expert_intermediate_size=16)),
    "OLMoE": Architecture("Olmoe", _EXPERTS),
    "Granite MoE": Architecture("GraniteMoe", _EXPERTS),
    "gpt-oss": Architecture("GptOss", dict(_EXPERTS, sliding_window=12)),
    "GLM-4 MoE": Architecture("Glm4Moe", dict(_LATENT, head_dim=8)),
    "DeepSeek-V2": Architecture(
        "DeepseekV2", _LATENT, ("q_a_proj", "q_b_proj", "kv_b_proj", "o_proj")
    ),
    "DeepSeek-V3": Architecture(
        "DeepseekV3", _LATENT, ("q_a_proj", "q_b_proj", "kv_b_proj", "o_proj")
    ),
    "Llama 4 (text)": Architecture(
        "Llama4Text", dict(_EXPERTS, intermediate_size_mlp=48, attention_chunk_size=16)
    ),
    "Qwen 3 Next": Architecture(
        "Qwen3Next",
        dict(
            _EXPERTS,
            shared_expert_intermediate_size=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
    "LFM 2": Architecture(
        "Lfm2",
        dict(layer_types=["conv", "full_attention"], block_ff_dim=48),
        ("q_proj", "k_proj", "v_proj", "out_proj"),
    ),
    "Mamba": Architecture("Mamba", _STATES, ("in_proj", "x_proj")),
    "Mamba 2": Architecture(
        "Mamba2", dict(_STATES, num_heads=8, head_dim=8, n_groups=1), ("in_proj",)
    ),
    "Jamba": Architecture(
        "Jamba",
        dict(
            _EXPERTS,
            mamba_d_state=8,
            mamba_d_conv=4,
            use_mamba_kernels=False,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
        ),
    ),
    "RecurrentGemma": Architecture(
        "RecurrentGemma",
        dict(lru_width=32, attention_window_size=12, block_types=["recurrent", "attention"]),
    ),
    "Llava": Architecture("Llava", _LLAVA, task="ImageTextToText"),
    "T5": Architecture("T5", _T5, ("q", "k", "v", "o"), "Seq2SeqLM"),
    "BART": Architecture(
        "Bart", _ENCODER_DECODER, ("q_proj", "k_proj", "v_proj", "out_proj"), "Seq2SeqLM"
    ),
    "Pegasus": Architecture(
        "Pegasus", _ENCODER_DECODER, ("q_proj", "k_proj", "v_proj", "out_proj"), "Seq2SeqLM"
    ),
}
