"""An encoder and a decoder, run on a batch: the prompts by the one, the responses by the other.

The encoder's output takes the place that a prompt's keys and values have in a decoder-only model:
it is computed once for a prompt, and the decoder reads it for each of its responses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from activedpo_fast.gradients.batches import Batch


def encode_prompts(encoder: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the encoder's output for the prompts [P, L, h], part of the autograd graph."""
    output = encoder(input_ids=batch.prompt_ids, attention_mask=batch.prompt_mask)
    states: torch.Tensor = output.last_hidden_state
    return states


def decoder_inputs(batch: Batch, states: torch.Tensor) -> dict[str, Any]:
    """Return the decoder's inputs; states [B, L, h] are the encoder's for each response."""
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "encoder_hidden_states": states,
        "encoder_attention_mask": batch.prompts_of_responses()[1],
        "use_cache": False,
    }


def whole_inputs(batch: Batch) -> dict[str, Any]:
    """Return the model's inputs for every response with its prompt."""
    prompt_ids, prompt_mask = batch.prompts_of_responses()
    return {
        "input_ids": prompt_ids,
        "attention_mask": prompt_mask,
        "decoder_input_ids": batch.input_ids,
        "decoder_attention_mask": batch.attention_mask,
        "use_cache": False,
    }


def head_inputs(ids: torch.Tensor, hidden: torch.Tensor) -> dict[str, Any]:
    """Return inputs with which the encoder does not run; the decoder's output is replaced."""
    return {"decoder_input_ids": ids, "encoder_outputs": BaseModelOutput(last_hidden_state=hidden)}
