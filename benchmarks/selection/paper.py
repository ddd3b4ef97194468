"""The estimated cost of a round of the paper's size with Llama-2-7B.

Nothing here is measured. Floating-point operations are counted from tokens, 2 for each weight in a
forward pass and as many again where a backward pass goes through (weights are frozen, so that the
half of it that would be their gradients falls away; LoRA's own are left out), and divided by one
rate. Attention's own products are left out too: with sequences of 400 tokens they are a few
percent. What is left out would make the round longer and the share of the selection smaller.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Assumptions:
    """The round: candidates, labeled pairs and training as in the paper's setting; the rest ours.

    prompt_tokens, response_tokens: about what TL;DR has. epochs: of DPO on all labels so far.
    rate: useful operations per second: dense bfloat16 of one A100 (312e12) at 40%, also for
    sampling, which reaches less.
    """

    weights: float = 6.74e9
    prompts: int = 1_000
    responses: int = 3
    labeled: int = 2_000
    batch: int = 50
    prompt_tokens: int = 350
    response_tokens: int = 50
    epochs: int = 1
    peak: float = 312e12
    utilization: float = 0.4


def paper_round(assumed: Assumptions = Assumptions()) -> dict[str, Any]:
    """{"assumed": ..., "seconds": {stage: seconds}}, stages as in the ledger of a round."""
    a = assumed
    candidates = _row_passes(a, a.prompts, a.responses)
    history = _row_passes(a, a.labeled, 2)
    sampled = a.prompts * (a.prompt_tokens + a.responses * a.response_tokens)
    # Two sequences a pair; forward and back for the policy, forward for the reference.
    trained = 3 * 2 * (a.labeled + a.batch) * (a.prompt_tokens + a.response_tokens) * a.epochs
    passes = {
        "generate": sampled,
        "gradients": candidates,
        "gradients of labeled pairs": history,
        "train": trained,
    }
    second = a.peak * a.utilization / (2 * a.weights)  # tokens that pass once, one way
    return {"assumed": asdict(a), "seconds": {k: v / second for k, v in passes.items()}}


def _row_passes(a: Assumptions, prompts: int, responses: int) -> int:
    """Tokens passed one way for gradient rows: a prompt goes forward once, and back per row."""
    forward = prompts * (a.prompt_tokens + responses * a.response_tokens)
    backward = prompts * responses * (a.prompt_tokens + a.response_tokens)
    return forward + backward
