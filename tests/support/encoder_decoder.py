"""Tiny encoder-decoder models, and the plain definition of their rows."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from activedpo_fast.models.encoder_decoder import decoder_start_token_id
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.tokens import TokenizedPool, tokenize_pool
from tests.support.models import VOCAB_SIZE, tiny_tokenizer

_SPECIAL: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE, pad_token_id=1, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1
)
_BART: dict[str, Any] = dict(
    _SPECIAL,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=2,
    encoder_ffn_dim=40,
    decoder_ffn_dim=48,
    max_position_embeddings=64,
    forced_eos_token_id=0,
)
_T5: dict[str, Any] = dict(_SPECIAL, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
_GEMMA: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    query_pre_attn_scalar=8,
    sliding_window=16,
)
_OF_BART = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
_OF_T5 = ["q", "k", "v", "o", "wi_0", "wo"]

# name -> (class of the config, its arguments, modules that LoRA targets)
MODELS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "t5": ("T5Config", _T5, ["q", "k", "v", "o", "wi", "wo"]),
    "flan-t5": (
        "T5Config",
        dict(_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        [*_OF_T5, "lm_head"],
    ),
    "mt5": ("MT5Config", _T5, _OF_T5),
    "umt5": ("UMT5Config", _T5, _OF_T5),
    "bart": ("BartConfig", dict(_BART, decoder_start_token_id=0), _OF_BART),
    "mbart": ("MBartConfig", dict(_BART, scale_embedding=True), _OF_BART),
    "pegasus": ("PegasusConfig", dict(_BART, decoder_start_token_id=1), _OF_BART),
    "marian": ("MarianConfig", dict(_BART, decoder_start_token_id=1), _OF_BART),
    "m2m100": ("M2M100Config", dict(_BART, decoder_start_token_id=0), _OF_BART),
    "led": (
        "LEDConfig",
        dict(
            _BART,
            attention_window=8,
            max_encoder_position_embeddings=64,
            max_decoder_position_embeddings=64,
        ),
        r".*decoder.*(q_proj|v_proj|fc1)",
    ),
    "longt5": ("LongT5Config", dict(_T5, local_radius=3), ["q", "v", "wo"]),
    "t5gemma": (
        "T5GemmaConfig",
        dict(_SPECIAL, encoder=_GEMMA, decoder=dict(_GEMMA, cross_attention_hidden_size=32)),
        ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"],
    ),
}


def tiny_model(name: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A random model of the named kind, in eval mode, with weights far enough from zero."""
    config_class, own, _ = MODELS[name]
    config = getattr(transformers, config_class)(**{**own, **overrides})
    torch.manual_seed(0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn_like(parameter) * 0.25)
    return model.to(dtype).eval()


def with_lora(model: Any, name: str, **config: Any) -> PeftModel:
    """LoRA with B ≠ 0, as after some training."""
    settings: dict[str, Any] = dict(
        r=3, target_modules=MODELS[name][2], task_type="SEQ_2_SEQ_LM", lora_dropout=0.1
    )
    dtype = next(model.parameters()).dtype
    adapted = get_peft_model(model, LoraConfig(**{**settings, **config})).to(dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.1)
    return adapted.eval()  # type: ignore[no-any-return]


def tokenized(
    model: nn.Module, pool: PreferencePool, tokenizer: Any = None, **options: Any
) -> TokenizedPool:
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    start = decoder_start_token_id(model, tokenizer)
    return tokenize_pool(pool, tokenizer, decoder_start_token_id=start, **options)


def loop_rows(
    model: nn.Module, texts: list[tuple[list[int], list[int]]], parameters: dict[str, nn.Parameter]
) -> tuple[torch.Tensor, torch.Tensor]:
    """∇ log π(y|x) by `torch.autograd.grad`, one (prompt, labels) at a time.

    The model itself makes the decoder's input of the labels, as in training. Returns the gradients
    of all `parameters`, flattened and concatenated [R, D], and log π [R].
    """
    rows, logps = [], []
    for prompt, response in texts:
        ids, labels = torch.tensor([prompt]), torch.tensor([response])
        log_probs = torch.log_softmax(model(input_ids=ids, labels=labels).logits[0], dim=-1)
        logp = log_probs[torch.arange(len(response)), labels[0]].sum()
        gradients = torch.autograd.grad(logp, list(parameters.values()), allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(parameters.values(), gradients, strict=True)
                ]
            )
        )
        logps.append(logp.detach())
    return torch.stack(rows), torch.stack(logps)
