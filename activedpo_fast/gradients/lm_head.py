"""log π of scored tokens from hidden states, one chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from activedpo_fast import ops

# Number of logits held at a time: 16 MiB in float32 on the CPU; on other devices, enough to keep
# the device busy.
_CHUNK_CPU, _CHUNK = 1 << 22, 1 << 26

Head = Callable[[torch.Tensor], torch.Tensor]
# (token ids [1, N], hidden states [1, N, h]) -> keyword arguments of a model
HeadInputs = Callable[[torch.Tensor, torch.Tensor], dict[str, Any]]


@contextmanager
def language_model_head(
    model: nn.Module, decoder: nn.Module, output: Any, inputs: HeadInputs
) -> Iterator[Head]:
    """Yield the part of `model` after its `decoder` as a function of hidden states.

    The function is head(hidden [1, N, h]) -> logits [1, N, V]. It is the model's own forward pass,
    with the decoder's part replaced by an output of the same type as `output` that holds `hidden`.
    It includes scaling, soft-capping, biases and adapters of the head.

    Args:
        inputs: gives the model's inputs for N tokens, whose ids are of no effect, and `hidden`.
    """
    states: list[torch.Tensor] = []

    def give_back(*args: Any, **kwargs: Any) -> Any:
        return type(output)(last_hidden_state=states[0])

    def head(hidden: torch.Tensor) -> torch.Tensor:
        states[:] = [hidden]
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        logits: torch.Tensor = model(**inputs(ids, hidden), use_cache=False).logits
        return logits.to(hidden.device)

    # A decoder may have its own `forward` (accelerate's hooks, a patch); it is restored.
    own = vars(decoder)
    before = own.get("forward")
    decoder.forward = give_back
    try:
        yield head
    finally:
        if before is None:
            own.pop("forward", None)
        else:
            own["forward"] = before


def chunked_logps(
    head: Head,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocabulary: int,
    weights: torch.Tensor | None,
    around: Callable[[int, int], AbstractContextManager[Any]],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute log π of N tokens and the gradient of their weighted sum, chunk by chunk.

    Args:
        head: hidden states [1, n, h] -> logits [1, n, V].
        hidden: [N, h], detached. targets: int64 [N]. vocabulary: V, or approximately.
        weights: [N], or None for no gradient.
        around: gives a context manager for tokens i..j, entered around their part of the head.

    Returns:
        The log-probs [N], and ∂ Σ weight · log π / ∂ hidden [N, h] (None without weights).
    """
    # A batch may have nothing to score if prompts fill the whole length.
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logps: list[torch.Tensor] = [hidden.new_empty(0, dtype=exact)]
    gradient = None if weights is None else torch.zeros_like(hidden)
    numbers = _CHUNK_CPU if hidden.device.type == "cpu" else _CHUNK
    step = max(1, numbers // vocabulary)
    for start in range(0, len(hidden), step):
        end = min(start + step, len(hidden))
        with around(start, end), torch.set_grad_enabled(weights is not None):
            leaf = hidden[start:end].detach().requires_grad_(weights is not None)
            logits = head(leaf.unsqueeze(0))[0]
            if weights is None or gradient is None:
                logps.append(ops.response_logps(logits, targets[start:end]))
                continue
            part, logit_gradient = ops.response_logp_grad(
                logits.detach(), targets[start:end], weights[start:end]
            )
            logps.append(part)
            if logits.requires_grad:
                logits.backward(logit_gradient)
            del logits, logit_gradient
            if leaf.grad is not None:
                gradient[start:end] = leaf.grad
    return torch.cat(logps), gradient
