"""Operations and bytes of one round with a large pool, counted from tokens. Nothing is measured.

Operations are counted as in `benchmarks.selection.paper`: 2 for each weight and token that passes
one way. Gradients of LoRA's own weights, the sketches and attention's products are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Round:
    """One round. Lengths are about those of TL;DR, in tokens.

    dim, row_bytes: k, and the bytes of a number, of gradient rows. rate: useful operations per
    second of one GPU: an H100's dense bfloat16 peak at 40%.
    """

    weights: float = 8.03e9
    prompts: int = 1_000_000
    responses: int = 4
    prompt_tokens: int = 350
    response_tokens: int = 50
    picks: int = 10_000
    preselect: int = 4
    dim: int = 8192
    row_bytes: int = 2
    gpus: int = 64
    rate: float = 989e12 * 0.4

    @property
    def rows(self) -> int:
        return self.prompts * self.responses

    @property
    def pairs(self) -> int:
        return self.prompts * self.responses * (self.responses - 1) // 2

    @property
    def store_bytes(self) -> int:
        return self.rows * self.dim * self.row_bytes


def gpu_seconds(r: Round) -> dict[str, float]:
    """Seconds of each stage on all GPUs, if they share it evenly."""
    forward = r.prompt_tokens + r.responses * r.response_tokens
    every = r.responses * (r.prompt_tokens + r.response_tokens)  # back through each prompt
    own = r.responses * r.response_tokens
    # At worst, each pair that is chosen first is of another prompt.
    again = r.preselect * r.picks * 3 * (r.prompt_tokens + r.response_tokens)
    tokens = {
        "sample": r.prompts * forward,
        "rows, exact": r.prompts * (forward + every),
        "rows, own tokens": r.prompts * (forward + own),
        "rows, two stages": r.prompts * (forward + own) + again,
    }
    return {name: 2 * r.weights * n / (r.rate * r.gpus) for name, n in tokens.items()}


def bytes_of(r: Round) -> dict[str, Any]:
    """What a round keeps and moves, in bytes."""
    return {
        "tokens": r.rows * (r.prompt_tokens + r.response_tokens) * 4,
        "rows, all": r.store_bytes,
        "rows, one GPU": r.store_bytes / r.gpus,
        "pairs": r.pairs * 2 * 8,
    }
