"""log π(y|x) of padded batches, as DPOTrainer sums it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from activedpo_fast.features.batching import Batch


def response_logps(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Σ_t log π(y_t | x, y_<t) over the scored tokens.

    Args:
        model: a causal LM; its logits are used as they are (soft-capping and scaling included).
        batch: on the model's device.

    Returns:
        [B], float32, or float64 where the logits are; part of the autograd graph.
    """
    # The head is needed from the token before the first scored one; what comes earlier in every
    # sequence of the batch is left out where the model can.
    any_scored = batch.scored.any(dim=0).nonzero()
    length = batch.input_ids.shape[1]
    first = int(any_scored[0]) if len(any_scored) else length - 1
    first = max(first, 1)
    kept = length - first + 1
    inputs = _model_inputs(batch)
    if length > 1 and _accepts(model, "logits_to_keep"):
        inputs["logits_to_keep"] = kept
    logits = model(**inputs).logits[:, -kept:-1]
    if logits.dtype != torch.float64:
        logits = logits.float()
    targets = batch.input_ids[:, first:]
    token_logps = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
    return (token_logps * batch.scored[:, first:]).sum(dim=1)


def last_hidden(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The last layer's hidden state at each sequence's last token, [B, hidden].

    "Last layer" is what the LM head reads, after the final norm (`hidden_states[-1]` of
    transformers).
    """
    states = model(**_model_inputs(batch), output_hidden_states=True).hidden_states[-1]
    positions = torch.arange(batch.input_ids.shape[1], device=states.device)
    last = (batch.attention_mask * positions).argmax(dim=1)
    return states[torch.arange(len(last), device=states.device), last]


def _model_inputs(batch: Batch) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "use_cache": False,
    }
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    return inputs


def _accepts(model: nn.Module, argument: str) -> bool:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return argument in inspect.signature(base.forward).parameters
