"""Responses in batches for the peers, their log-likelihood, and rows in pool order."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from activedpo_fast.pool.tokens import TokenizedPool, TokenizedResponse

# Padded. On two cores, all batched peers were at least as fast with this as with bergson's default
# of 2048.
TOKENS_A_BATCH = 1024
GRADIENT_BYTES = 2**28  # whole gradients held at a time
IGNORED = -100  # the label that cross_entropy ignores


def scored_labels(response: TokenizedResponse) -> list[int]:
    start = max(response.completion_start, 1)
    return [IGNORED] * start + list(response.input_ids[start:])


def dimension(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in trainable(model).values())


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def rows_at_once(dim: int) -> int:
    return max(1, GRADIENT_BYTES // (4 * dim))


def plan_batches(tokenized: TokenizedPool, dim: int) -> list[list[int]]:
    """Rows by batch: of similar length, within TOKENS_A_BATCH and GRADIENT_BYTES."""
    lengths = [len(response.input_ids) for response in tokenized.sequences]
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        longest = lengths[batches[-1][0]] if batches else 0
        if (
            not batches
            or longest * (len(batches[-1]) + 1) > TOKENS_A_BATCH
            or len(batches[-1]) == rows_at_once(dim)
        ):
            batches.append([])
        batches[-1].append(row)
    return batches


def collate(tokenized: TokenizedPool, rows: list[int]) -> tuple[Tensor, Tensor]:
    """Token ids and labels, int64 [n, T], padded on the right.

    A causal model needs no attention mask for that: no scored token sees the padding.
    """
    responses = [tokenized.sequences[row] for row in rows]
    longest = max(len(response.input_ids) for response in responses)

    def pad(values: Sequence[int], by: int) -> list[int]:
        return [*values] + [by] * (longest - len(values))

    ids = torch.tensor([pad(response.input_ids, 0) for response in responses])
    return ids, torch.tensor([pad(scored_labels(response), IGNORED) for response in responses])


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of log π over the scored tokens of all rows; logits [n, T, vocabulary]."""
    return -F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def private_copy(model: nn.Module) -> Any:
    """A copy for hooks and flags, which shares the storage of all parameters."""
    shared = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, memo=shared)


class RowsInOrder:
    """Collects batches of rows into one tensor in pool order."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._all: Tensor | None = None

    def put(self, rows: list[int], values: Tensor) -> None:
        if self._all is None:
            self._all = torch.zeros(self._count, values.shape[1])
        self._all[rows] = values

    def result(self) -> Tensor:
        assert self._all is not None, "no batch was computed"
        return self._all
