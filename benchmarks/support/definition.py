"""The gradients by their definition: one response at a time, without padding, by autograd."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from activedpo_fast.pool.tokens import TokenizedPool, TokenizedResponse


def defined_gradients(
    model: nn.Module, tokenized: TokenizedPool, parameters: Mapping[str, nn.Parameter]
) -> Tensor:
    """Return ∇ log π(y|x) of all `parameters`, flattened and concatenated, float64 [R, D]."""
    rows = []
    for sequence in tokenized.sequences:
        logp = _logp(model, sequence)
        gradients = torch.autograd.grad(logp, list(parameters.values()), allow_unused=True)
        parts = zip(parameters.values(), gradients, strict=True)
        whole = [(torch.zeros_like(p) if g is None else g).double().flatten() for p, g in parts]
        rows.append(torch.cat(whole))
    return torch.stack(rows)


def _logp(model: Any, sequence: TokenizedResponse) -> Tensor:
    """Return log π(y|x), a scalar."""
    ids = torch.tensor([list(sequence.input_ids)])
    start = sequence.completion_start
    response = ids[0, start:]
    if model.config.is_encoder_decoder:
        prompt = ids[:, : start - 1]  # the decoder's first token comes after it
        inputs = {
            "input_ids": prompt,
            "attention_mask": torch.ones_like(prompt),
            "decoder_input_ids": ids[:, start - 1 : -1],
        }
        logits = model(**inputs, use_cache=False).logits[0]
    else:
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = model(**inputs, use_cache=False).logits[0, -len(response) - 1 : -1]
    if not isinstance(logits, Tensor) or len(logits) != len(response):
        raise RuntimeError(f"{type(model).__name__} did not return logits for every token")
    return logits.log_softmax(dim=-1).gather(1, response[:, None]).sum()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest over rows of ‖found − expected‖ / ‖expected‖; rows [R, D]."""
    difference = (found.double() - expected.double()).norm(dim=1)
    return float((difference / expected.double().norm(dim=1).clamp(min=1e-300)).max())
