"""Which models are supported, decided by the kind of model before anything runs.

The self-check compares numbers, and two wrong numbers may agree: with tokens that see later ones,
hooks and autograd give the same wrong gradient. Models known to be wrong, or known to
fail, are refused here with a message that says what to do, even without `verify`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from peft import (
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from activedpo_fast.errors import ActiveDPOError, UnsupportedParameterError
from activedpo_fast.models.adapters import causal_lm, decoder_of
from activedpo_fast.models.encoder_decoder import (
    check_encoder_decoder,
    check_tokens_are_for,
    is_encoder_decoder,
)
from activedpo_fast.models.quantized import check_gradients_flow
from activedpo_fast.pool.tokens import TokenizedPool, scored_tokens

_WANTED = "pass a causal language model (AutoModelForCausalLM), or AutoModelForSeq2SeqLM"

# Wrappers by class name (their packages may be missing), and what to pass instead.
_WRAPPERS = {
    "DistributedDataParallel": "pass the model inside it, `.module`",
    "DataParallel": "pass the model inside it, `.module`",
    "DeepSpeedEngine": "pass the model inside it, `.module`",
    "OptimizedModule": "pass the model inside it, `._orig_mod`",
    "FullyShardedDataParallel": "it holds parts of the weights only: load the whole model",
}
_WHOLE = "features need the whole weights in every process: save the model and load it without"

_PEFT_TASKS = (
    (PeftModelForSeq2SeqLM, "sequence-to-sequence models"),
    (PeftModelForSequenceClassification, "sequence classifiers"),
    (PeftModelForTokenClassification, "token classifiers"),
    (PeftModelForQuestionAnswering, "question answering"),
)
_HEADS = {
    "ForSequenceClassification": "a sequence classifier",
    "ForTokenClassification": "a token classifier",
    "ForQuestionAnswering": "a model for question answering",
    "ForMultipleChoice": "a model for multiple choice",
    "ForBlockDiffusion": "a diffusion model",
}
# In transformers' list of causal LMs, but each token sees later ones.
_NEVER_CAUSAL = frozenset({"XLNetLMHeadModel", "CpmAntForCausalLM"})

# Names of modules and buffers that have one row for each position (GPT-2, GPT-J, OPT, ...).
_POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings", "positions_embed")
_POSITION_BUFFERS = ("embed_positions", "pos_encoding")


def require_supported(
    model: nn.Module,
    tokenized: TokenizedPool | None = None,
    *,
    pad_token_id: int = 0,
    gradients: bool = False,
) -> None:
    """Raise unless features of the responses can be computed with `model`.

    Args:
        tokenized: responses whose tokens have to be within the model's vocabulary and positions.
        gradients: whether gradients are needed, not only log-probs or hidden states.

    Raises:
        ActiveDPOError: an unsupported kind of model or placement of its weights, tokens that it has
            no row for, or a CUDA graph that is being captured.
        UnsupportedParameterError: an adapter whose per-sample gradients cannot be computed.
    """
    _check_no_graph_is_captured()
    _check_wrappers(model)
    _check_kind(model)
    _check_activated_lora(model)
    _check_weights(model)
    if gradients:
        _check_gradients(model)
    _check_tokens(model, tokenized, pad_token_id)


def position_limit(model: nn.Module) -> int | None:
    """Return how many positions the model can compute; None if there is no limit.

    Learned or tabulated absolute positions are limited (GPT-2, OPT, GPT-J). For rotary positions,
    `config.max_position_embeddings` only says what the model was trained with.
    """
    base = causal_lm(model)
    config: Any = getattr(base, "config", None)
    if getattr(config, "model_type", None) == "mpt":
        return int(config.max_seq_len)  # ALiBi, but its table has that many columns
    return positions_of(decoder_of(base) if isinstance(base, PreTrainedModel) else base)


def positions_of(decoder: nn.Module) -> int | None:
    """Return how many positions a stack of layers can compute; None if there is no limit."""
    limits = [
        _rows(table)
        for name, table in decoder.named_modules()
        if _is_position_table(name, _POSITION_TABLES) and isinstance(table, nn.Embedding)
    ]
    limits += [
        len(table)
        for name, table in decoder.named_buffers()
        if _is_position_table(name, _POSITION_BUFFERS) and table.dim() == 2
    ]
    return min(limits, default=None)


def known_tokens(model: nn.Module) -> int | None:
    """Return how many token ids the model has embeddings for; None if unknown."""
    base: Any = causal_lm(model)
    return _count(base.get_input_embeddings(), "num_embeddings")


def _rows(table: nn.Embedding) -> int:
    # OPT and BART leave the first rows unused, RoBERTa those up to the padding row.
    offset = getattr(table, "offset", 0)
    padding = -1 if table.padding_idx is None else table.padding_idx
    return table.num_embeddings - (offset if isinstance(offset, int) else 0) - (padding + 1)


def _is_position_table(path: str, names: tuple[str, ...]) -> bool:
    # A table with an adapter is inside its PEFT layer.
    return path.removesuffix(".base_layer").rsplit(".", 1)[-1] in names and not any(
        part in path for part in ("vision", "visual", "audio", "image")
    )


def _check_no_graph_is_captured() -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise ActiveDPOError(
            "a CUDA graph is being captured, which cannot hold features: their computation reads "
            "numbers back from the GPU; compute them outside of torch.cuda.graph"
        )


def _check_wrappers(model: nn.Module) -> None:
    for path, module in model.named_modules():
        for name in _class_names(module):
            what = _WRAPPERS.get(name)
            # A compiled part of the model runs as it is; only the whole model must be unwrapped.
            if what is not None and (path == "" or name == "FullyShardedDataParallel"):
                raise ActiveDPOError(f"{path or 'the model'} is wrapped in {name}: {what}")


def _check_kind(model: nn.Module) -> None:
    base = causal_lm(model)
    name = type(base).__name__
    config: Any = getattr(base, "config", None)
    with_encoder = is_encoder_decoder(model)
    for peft_class, task in _PEFT_TASKS:
        if isinstance(model, peft_class) and not (
            with_encoder and peft_class is PeftModelForSeq2SeqLM
        ):
            raise ActiveDPOError(
                f"the adapter is for {task} ({peft_class.__name__}): make it with "
                f"task_type={'SEQ_2_SEQ_LM' if with_encoder else 'CAUSAL_LM'!r}"
            )
    if not isinstance(base, PreTrainedModel):
        return  # a user-defined module: left to the self-check
    for ending, what in _HEADS.items():
        if any(known.endswith(ending) for known in _class_names(base)):
            raise ActiveDPOError(f"{name} is {what}: {_WANTED}")
    if with_encoder:
        check_encoder_decoder(model)
        return
    causal = _names(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    known = [
        known
        for known in _class_names(base)
        if known in causal or known in _names(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    ]
    if known and known[0] not in causal:
        raise ActiveDPOError(f"{name} is a masked language model: {_WANTED}")
    from_transformers = any(
        known.__module__.startswith("transformers.models.") for known in type(base).__mro__
    )
    if from_transformers and base.get_output_embeddings() is None:
        raise ActiveDPOError(f"{name} has no language model head: {_WANTED}")
    reason = _why_not_causal(known[0] if known else name, config)
    if reason is not None:
        raise ActiveDPOError(
            f"{name}: {reason}, so that each token would see those after it, and log π(y|x) is not "
            f"defined: {_WANTED}"
        )


def _why_not_causal(name: str, config: Any) -> str | None:
    text = config.get_text_config()
    if name in _NEVER_CAUSAL:
        return "it attends to both sides"
    if getattr(text, "is_causal", True) is False:
        return "its config says is_causal=False"
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return f"its config says use_bidirectional_attention={text.use_bidirectional_attention!r}"
    if text.model_type == "xlm" and not text.causal:
        return "its config says causal=False"
    encoders = {*auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"} - {"xlm"}
    if text.model_type in encoders and not getattr(text, "is_decoder", True):
        return "its config says is_decoder=False"
    return None


def _check_activated_lora(model: nn.Module) -> None:
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and any("ALora" in kind for _, kind in _variants(layer)):
            raise UnsupportedParameterError(
                f"{path}: Activated LoRA is not supported, its layers see only the tokens after "
                "the invocation; train without alora_invocation_tokens"
            )


def _check_weights(model: nn.Module) -> None:
    distributed: Any = sys.modules.get("torch.distributed.tensor")
    for name, parameter in model.named_parameters():
        if distributed is not None and isinstance(parameter, distributed.DTensor):
            raise ActiveDPOError(
                f"{name!r} is sharded over processes (a DTensor, of FSDP2 or tensor parallelism); "
                f"{_WHOLE} sharding"
            )
        if hasattr(parameter, "ds_id"):
            raise ActiveDPOError(f"{name!r} is a ZeRO-3 shard of DeepSpeed; {_WHOLE} ZeRO-3")
        if type(parameter).__name__ == "FlatParameter":
            raise ActiveDPOError(f"{name!r} is a flat parameter of FSDP; {_WHOLE} sharding")
        if parameter.is_meta:
            raise ActiveDPOError(
                f"{name!r} is on the meta device: its weights are offloaded to the CPU or to disk, "
                "or were never loaded; load the whole model on one device (no device_map that "
                "offloads), in bfloat16 or quantized if it does not fit"
            )
        if parameter.numel() == 0:
            raise ActiveDPOError(
                f"{name!r} is empty, as the shards of a distributed model are; {_WHOLE} sharding"
            )


def _check_gradients(model: nn.Module) -> None:
    tensor_parallel = getattr(causal_lm(model), "_tp_size", None) or 1
    if tensor_parallel > 1:
        raise ActiveDPOError(
            f"the model is split over {tensor_parallel} processes (tensor parallelism); {_WHOLE} "
            "tp_plan"
        )
    _check_modules_are_called(model)
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ActiveDPOError(
                f"{name!r} was made inside torch.inference_mode(), where no gradient can be taken: "
                "load the model outside of it"
            )
    check_gradients_flow(model)


def _check_modules_are_called(model: nn.Module) -> None:
    """Refuse Unsloth's kernels, which read the weights of LoRA's layers and do not call these."""
    for path, module in model.named_modules():
        own = (value for value in vars(module).values() if callable(value))
        for function in (module.forward, *own):
            function = getattr(function, "__func__", function)
            name = getattr(function, "__name__", type(function).__name__)
            # Code that it generates is in modules of other names, such as `Linear_peft_forward`.
            if f"{getattr(function, '__module__', '')}".startswith("unsloth") or name.startswith(
                "unsloth"
            ):
                raise UnsupportedParameterError(
                    f"{path or 'the model'} runs Unsloth's {name!r}, which does not call the "
                    "layers whose gradients are captured: save the adapter, and load the model "
                    "and the adapter by transformers and PEFT in a process without Unsloth"
                )


def _variants(layer: LoraLayer) -> Iterator[tuple[str, str]]:
    for adapter, variant in getattr(layer, "lora_variant", {}).items():
        if adapter in layer.active_adapters:
            kind = variant if isinstance(variant, type) else type(variant)
            yield adapter, kind.__name__


def _check_tokens(model: nn.Module, tokenized: TokenizedPool | None, pad_token_id: int) -> None:
    base: Any = causal_lm(model)
    if not isinstance(base, PreTrainedModel):
        return
    known = known_tokens(base)
    what = "add the token by model.resize_token_embeddings(len(tokenizer))"
    if known is not None and not 0 <= pad_token_id < known:
        raise ActiveDPOError(
            f"the pad token id {pad_token_id} is beyond the {known} tokens that the model has "
            f"embeddings for: {what}, or use another pad token, such as tokenizer.pad_token = "
            "tokenizer.eos_token"
        )
    if tokenized is None or not tokenized.sequences:
        return
    check_tokens_are_for(model, tokenized)
    predicted = _count(base.get_output_embeddings(), "out_features")
    limits = _position_limits(base, tokenized)
    as_in = "" if tokenized.encoder_decoder else ", as for DPOTrainer"
    for row, sequence in enumerate(tokenized.sequences):
        ids = np.asarray(sequence.input_ids)  # a view of an array: pools have millions of tokens
        prompt = sequence.completion_start - 1 if tokenized.encoder_decoder else 0
        lengths = (len(ids) - prompt, prompt)
        for length, (limit, where) in zip(lengths, limits, strict=True):
            if limit is not None and length > limit:
                raise ActiveDPOError(
                    f"{tokenized.place(row)} has {length} tokens {where}, and the model has "
                    f"{limit} positions: set max_length to {limit} or less{as_in}"
                )
        if known is not None and len(ids) and not 0 <= ids.min() <= ids.max() < known:
            token = ids.max() if ids.max() >= known else ids.min()
            raise ActiveDPOError(
                f"{tokenized.place(row)} has the token id {token}, beyond the {known} tokens that "
                f"the model has embeddings for: is it the model's tokenizer? {what}"
            )
        scored = ids[len(ids) - scored_tokens(sequence) :]
        if predicted is not None and len(scored) and scored.max() >= predicted:
            raise ActiveDPOError(
                f"{tokenized.place(row)} has the token id {scored.max()}, beyond the {predicted} "
                f"tokens that the model's head predicts: {what}"
            )


def _position_limits(base: Any, tokenized: TokenizedPool) -> list[tuple[int | None, str]]:
    """Return how many positions there are for the decoder's tokens and for the encoder's."""
    if not tokenized.encoder_decoder:
        return [(position_limit(base), "with its prompt"), (None, "")]
    return [
        (positions_of(base.get_decoder()), "beside its prompt"),
        (positions_of(base.get_encoder()), "in its prompt"),
    ]


def _count(module: Any, attribute: str) -> int | None:
    """Return the number of rows of an embedding or a head, also inside a PEFT layer."""
    if module is None:
        return None
    if hasattr(module, "get_base_layer"):
        module = module.get_base_layer()
    count, weight = getattr(module, attribute, None), getattr(module, "weight", None)
    if not isinstance(count, int):
        return None
    # A head that PEFT ties to an adapter's embedding has its two numbers exchanged.
    if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.dim() == 2:
        return len(weight)
    return count


def _class_names(module: nn.Module) -> list[str]:
    return [known.__name__ for known in type(module).__mro__]


def _names(mapping: Mapping[str, str | tuple[str, ...]]) -> set[str]:
    found: set[str] = set()
    for names in mapping.values():
        found.update([names] if isinstance(names, str) else names)
    return found
