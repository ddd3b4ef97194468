"""Running a model on batches, and again, alone, on each response whose numbers are not finite."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from weakref import WeakSet

import torch
from torch import nn

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.batches import Layout, group_rows
from activedpo_fast.gradients.running import BatchResult, RunBatch, planned_batches, run_batches
from activedpo_fast.gradients.token_budget import TokenBudget
from activedpo_fast.models.adapters import causal_lm
from activedpo_fast.models.positions import LengthClass, length_class
from activedpo_fast.pool.tokens import TokenizedPool

logger = logging.getLogger(__name__)
of_rows = logging.getLogger(f"{__name__}.rows")  # about single responses


class ModelRunner:
    """Runs models on responses of a pool, batch by batch.

    Args:
        pad_token_id, max_tokens_per_batch: see `FeatureExtractor`.
    """

    def __init__(self, pad_token_id: int, max_tokens_per_batch: int | None) -> None:
        self._pad_token_id = pad_token_id
        self._max_tokens_per_batch = max_tokens_per_batch
        self._said_lengths: WeakSet[nn.Module] = WeakSet()

    def copy(self) -> ModelRunner:
        """Return one that has warned of the same models."""
        twin = copy.copy(self)
        twin._said_lengths = self._said_lengths.copy()
        return twin

    def budget(self, model: nn.Module, tokens: int | None = None) -> TokenBudget:
        """Return the limit of a batch: `tokens`, or the runner's."""
        return TokenBudget(tokens or self._max_tokens_per_batch, next(model.parameters()).device)

    def run(
        self,
        tokenized: TokenizedPool,
        rows: Sequence[int],
        run_batch: RunBatch,
        model: nn.Module,
        layout: Layout,
        title: str,
        show_progress: bool | None,
        whole_items: bool = False,
        budget: TokenBudget | None = None,
        planned: Sequence[int] | None = None,
    ) -> Iterator[BatchResult]:
        """Yield the results of `run_batch`, finite or not; see `run_batches`."""
        classify = length_class(model)
        if (
            classify is not None
            and model not in self._said_lengths
            and _say_lengths_apart(model, tokenized, classify)
        ):
            self._said_lengths.add(model)
        return run_batches(
            tokenized,
            rows,
            run_batch,
            layout,
            budget or self.budget(model),
            length_class=classify,
            pad_token_id=self._pad_token_id,
            title=title,
            show_progress=show_progress,
            whole_items=whole_items,
            planned=planned,
        )

    def planned(
        self, tokenized: TokenizedPool, model: nn.Module, layout: Layout, max_tokens: int
    ) -> Iterator[list[int]]:
        """Yield the responses of every batch of the whole pool, in the order that `run` has."""
        everything = range(len(tokenized.sequences))
        for groups in planned_batches(
            tokenized, everything, layout, max_tokens, length_class=length_class(model)
        ):
            yield [row for group in groups for row in group.rows]

    def run_alone(
        self,
        tokenized: TokenizedPool,
        rows: torch.Tensor,
        run_batch: RunBatch,
        model: nn.Module,
        *,
        layout: Layout = Layout.ALONE,
        skip: bool = False,
    ) -> Iterator[BatchResult]:
        """Run `run_batch` alone on each response that was not finite in a batch.

        With `skip`, gradient rows that are still not finite become zeros, their log-probs NaN.

        A model with a nearly infinite mask gives NaN at padding that can attend to nothing else.
        """
        if len(rows) == 0:
            return
        of_rows.warning(
            "%d responses are not finite in a batch (first: %s); each is run alone",
            len(rows),
            tokenized.place(int(rows[0])),
        )
        budget = self.budget(model)
        for result in (
            result
            for row in rows.tolist()
            for result in self.run(
                tokenized, [row], run_batch, model, layout, "", False, budget=budget
            )
        ):
            finite = bool(finite_rows(result).all())
            if skip and not finite:
                of_rows.warning(
                    "%s: what the model gives for it is not finite (NaN or infinite): it is kept "
                    "out of V and of the picks",
                    tokenized.place(int(result[0][0])),
                )
                numbers, gradients, logps = result
                yield numbers, torch.zeros_like(gradients), torch.full_like(logps, torch.nan)
                continue
            if not finite:
                raise ActiveDPOError(
                    f"{tokenized.place(int(result[0][0]))}: what the model gives for it is not "
                    "finite (NaN or infinite), also when it runs alone; use a dtype with a wider "
                    "range, leave the item out, or skip it (--skip-non-finite, "
                    "FeatureExtractor(skip_non_finite=True))"
                )
            yield result


def finite_rows(result: BatchResult) -> torch.Tensor:
    """Return which rows have only finite numbers, bool [n], on the device of the first numbers."""
    of_parts = [
        part.isfinite().flatten(1).all(dim=1) if part.dim() > 1 else part.isfinite()
        for part in result[1:]
    ]
    device = of_parts[0].device  # parts of a model that is split over several have their own
    return torch.stack([finite.to(device) for finite in of_parts]).all(dim=0)


def whole_items(finite: torch.Tensor, rows: torch.Tensor, tokenized: TokenizedPool) -> torch.Tensor:
    """Return `finite` [n], False for all rows of an item if it is for one of them."""
    if finite.all():
        return finite
    items = torch.tensor([tokenized.item_of(row) for row in rows.tolist()])
    return ~torch.isin(items, items[~finite])


def _say_lengths_apart(model: nn.Module, tokenized: TokenizedPool, classify: LengthClass) -> bool:
    """Log a warning if responses are kept apart by length; return whether it was logged."""
    groups = group_rows(tokenized, range(len(tokenized.sequences)), Layout.SHARED, classify)
    apart = sum(len(group.rows) for group in groups if group.kind != 0)
    if apart:
        logger.warning(
            "%s embeds positions by the longest sequence of a batch: %d of %d responses are longer "
            "than its original length; they share a batch or a prompt's pass only where that "
            "changes nothing, which is slower",
            type(causal_lm(model)).__name__,
            apart,
            len(tokenized.sequences),
        )
    return apart > 0
