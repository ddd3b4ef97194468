"""Encoder-decoder models: which are supported, and the token that their decoder begins with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.models.adapters import causal_lm
from activedpo_fast.models.positions import length_class
from activedpo_fast.pool.encoder_decoder_tokens import label_ids
from activedpo_fast.pool.tokenizers import leaves_tokenizer
from activedpo_fast.pool.tokens import TokenizedPool, check_tokenizer, scored_tokens


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether the model's config says so; classifiers of such models among them."""
    config = getattr(causal_lm(model), "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))


@leaves_tokenizer(1)
def decoder_start_token_id(
    model: nn.Module, processing_class: PreTrainedTokenizerBase
) -> int | None:
    """Return the token before a response's first in the decoder's input; None without an encoder.

    It is the model's own. mBART's is the last token of the labels, which is the language of the
    tokenizer (`tgt_lang`).

    Raises:
        ActiveDPOError: not a tokenizer, or one without EOS; as `begins_decoder`.
    """
    if not is_encoder_decoder(model):
        return None
    check_tokenizer(processing_class, chat=False)
    return begins_decoder(model, label_ids(processing_class, [""])[0])


def begins_decoder(model: nn.Module, labels: list[int]) -> int:
    """Return the first token of the decoder's input in training on `labels`.

    Raises:
        ActiveDPOError: the model's config does not name it.
    """
    base: Any = causal_lm(model)
    try:
        if not hasattr(base, "prepare_decoder_input_ids_from_labels"):
            return int(base.config.decoder_start_token_id)
        shifted = base.prepare_decoder_input_ids_from_labels(labels=torch.tensor([labels]))
    except (AttributeError, TypeError, ValueError) as error:
        raise ActiveDPOError(
            f"the config of {type(base).__name__} does not say which token its decoder begins "
            "with: set decoder_start_token_id and pad_token_id in model.config"
        ) from error
    return int(shifted[0, 0])


def check_encoder_decoder(model: nn.Module) -> None:
    """Raise `ActiveDPOError` unless this is an encoder for text, a decoder and its head."""
    base: Any = causal_lm(model)
    name, wanted = type(base).__name__, "pass an encoder-decoder language model for text"
    if base.main_input_name != "input_ids":
        raise ActiveDPOError(f"{name}: its encoder reads {base.main_input_name}: {wanted}")
    if base.get_output_embeddings() is None:
        raise ActiveDPOError(f"{name} has no language model head: {wanted}")
    decoder = base.get_decoder()
    own_head = decoder.get_output_embeddings() if isinstance(decoder, PreTrainedModel) else None
    if decoder is base or own_head is not None:
        # Two models in one: what the decoder reads is not just the encoder's output.
        raise ActiveDPOError(f"{name} has no decoder apart from its head: {wanted}")
    if length_class(base) is not None:
        raise ActiveDPOError(
            f"{name} embeds positions by the longest sequence of a batch, which is supported for "
            "decoder-only models alone"
        )


def check_tokens_are_for(model: nn.Module, tokenized: TokenizedPool) -> None:
    """Raise `ActiveDPOError` if responses are tokenized for another kind of model than this one."""
    if tokenized.encoder_decoder != is_encoder_decoder(model):
        has, made = "an encoder-decoder", "a decoder-only"
        if tokenized.encoder_decoder:
            has, made = made, has
        raise ActiveDPOError(
            f"the tokens are for {made} model, and {type(causal_lm(model)).__name__} is {has} "
            "model: tokenize with ActiveDPOSelector.tokenize, or pass tokenize_pool the "
            "decoder_start_token_id that activedpo_fast.models.encoder_decoder gives"
        )
    if not tokenized.encoder_decoder:
        return
    starts = {begins_decoder(model, labels) for labels in ([5, 6], [5, 7])}
    found = {
        sequence.input_ids[sequence.completion_start - 1]
        for sequence in tokenized.sequences
        if scored_tokens(sequence)
    }
    # mBART's depends on the labels.
    if len(starts) == 1 and not found <= starts:
        raise ActiveDPOError(
            f"the decoder's tokens begin with {min(found - starts)}, those of "
            f"{type(causal_lm(model)).__name__} with {starts.pop()}: tokenize for this model"
        )


def refuse_encoder_decoder(model: nn.Module, what: str) -> None:
    """Raise `ActiveDPOError` for an encoder-decoder model, saying `what` cannot be done with it."""
    if is_encoder_decoder(model):
        raise ActiveDPOError(
            f"{type(causal_lm(model)).__name__} is an encoder-decoder model, {what}: select with "
            "ActiveDPOSelector from responses that you sampled, and train on its picks yourself"
        )
