"""Padded batches of tokenized responses under a token budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.tokenization import TokenizedResponse


@dataclass(frozen=True)
class Batch:
    """Some responses, padded to one length T.

    Attributes:
        rows: int64 [B], which responses of the tokenized pool these are.
        input_ids, attention_mask: int64 [B, T].
        scored: bool [B, T], True where the token's log-prob counts (response tokens; never the
            first token of a sequence, which nothing predicts).
        position_ids: int64 [B, T] for left padding, None for right padding, where the model's
            own default is the same.
    """

    rows: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    scored: torch.Tensor
    position_ids: torch.Tensor | None

    def to(self, device: torch.device) -> Batch:
        move = {
            name: value.to(device)
            for name in ("input_ids", "attention_mask", "scored", "position_ids")
            if (value := getattr(self, name)) is not None
        }
        return Batch(**{"rows": self.rows, "position_ids": None, **move})


def collate(
    sequences: Sequence[TokenizedResponse],
    rows: Sequence[int],
    *,
    pad_token_id: int,
    padding_side: str = "right",
) -> Batch:
    """Pad the named `rows` of `sequences` on `padding_side` ("right" as DPOTrainer does)."""
    if padding_side not in ("left", "right"):
        raise ActiveDPOError(f"padding_side must be 'left' or 'right', not {padding_side!r}")
    length = max(len(sequences[row].input_ids) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    scored = torch.zeros_like(input_ids, dtype=torch.bool)
    for index, row in enumerate(rows):
        sequence = sequences[row]
        count = len(sequence.input_ids)
        start = length - count if padding_side == "left" else 0
        input_ids[index, start : start + count] = torch.tensor(sequence.input_ids)
        attention_mask[index, start : start + count] = 1
        scored[index, start + max(sequence.completion_start, 1) : start + count] = True
    position_ids = None
    if padding_side == "left":
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return Batch(torch.tensor(rows, dtype=torch.int64), input_ids, attention_mask, scored,
                 position_ids)


def plan_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Group row numbers, longest first, so that no padded batch exceeds `max_tokens` tokens.

    A single sequence longer than the budget gets a batch of its own. Equal lengths keep pool
    order, so the plan is a function of the lengths alone.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batch: list[int] = []
    for row in order:
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
