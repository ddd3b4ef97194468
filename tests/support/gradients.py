"""The plain definition that captured gradients are tested against: one backward pass per
response."""

from __future__ import annotations

import torch
from torch import nn

from activedpo_fast.pool.tokens import TokenizedResponse


def loop_gradients(
    model: nn.Module, sequences: list[TokenizedResponse], parameters: dict[str, nn.Parameter]
) -> tuple[torch.Tensor, torch.Tensor]:
    """∇ log π(y|x) by `torch.autograd.grad`, one sequence at a time and without padding.

    Returns the gradients of all `parameters`, flattened and concatenated [R, D], and log π [R].
    """
    rows, logps = [], []
    for sequence in sequences:
        ids = torch.tensor([sequence.input_ids])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        log_probs = torch.log_softmax(logits[0, -ids.shape[1] : -1], dim=-1)  # virtual tokens first
        logp = log_probs.new_zeros(())
        for position in range(max(sequence.completion_start, 1), ids.shape[1]):
            logp = logp + log_probs[position - 1, ids[0, position]]
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


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest over rows of ‖found − expected‖ / ‖expected‖."""
    difference = (found.double() - expected.double()).norm(dim=1)
    return float((difference / expected.double().norm(dim=1).clamp(min=1e-300)).max())
