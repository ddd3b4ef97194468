"""Running batches one after another, with smaller ones after memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.batches import (
    Batch,
    Group,
    Layout,
    collate,
    group_rows,
    padded_tokens,
    plan_batches,
)
from activedpo_fast.gradients.token_budget import TokenBudget, is_out_of_memory
from activedpo_fast.models.positions import LengthClass
from activedpo_fast.pool.tokens import TokenizedPool
from activedpo_fast.progress import progress_bar

# The results of a batch: its rows, int64 [n], then tensors [n, ...] on the CPU.
BatchResult = tuple[torch.Tensor, ...]
# (batch on the device, whether its prompts are shared)
RunBatch = Callable[[Batch, bool], BatchResult]


def planned_batches(
    tokenized: TokenizedPool,
    rows: Sequence[int],
    layout: Layout,
    max_tokens: int,
    *,
    length_class: LengthClass | None,
    whole_items: bool = False,
) -> Iterator[list[Group]]:
    """Plan the batches of `rows`; see `plan_batches` and `run_batches`."""
    groups = group_rows(tokenized, rows, layout, length_class)
    # With this budget, responses that run alone never share a batch.
    tokens = 1 if layout is Layout.ALONE else max_tokens
    return plan_batches(groups, tokens, split=not whole_items)


def run_batches(
    tokenized: TokenizedPool,
    rows: Sequence[int],
    run_batch: RunBatch,
    layout: Layout,
    budget: TokenBudget,
    *,
    length_class: LengthClass | None,
    pad_token_id: int,
    title: str = "",
    show_progress: bool | None = False,
    whole_items: bool = False,
    planned: Sequence[int] | None = None,
) -> Iterator[BatchResult]:
    """Run `run_batch` on every batch of `rows`; when memory runs out, replan with half the tokens.

    Args:
        planned: the responses that batches are planned of, `rows` among them; default: `rows`.
            Batches without any of `rows` are left out, the others run whole.
        length_class: which lengths may share a batch, see `models.positions`.
        whole_items: all responses of an item that are of one length class are in one batch.

    Raises:
        ActiveDPOError: not enough memory for the smallest batch.
    """
    wanted = set(rows)
    pending = list(rows if planned is None else planned)
    shared = layout in (Layout.SHARED, Layout.APART)
    with progress_bar(show_progress, total=len(rows), desc=title, unit="response") as progress:
        while pending:
            done: set[int] = set()
            at_first = budget.tokens
            for members in planned_batches(
                tokenized,
                pending,
                layout,
                at_first,
                length_class=length_class,
                whole_items=whole_items,
            ):
                found = wanted.intersection(row for group in members for row in group.rows)
                if not found:
                    done.update(row for group in members for row in group.rows)
                    continue
                try:
                    with budget.batch(padded_tokens(members)):
                        batch = collate(tokenized, members, pad_token_id=pad_token_id)
                        result = run_batch(batch.to(budget.device), shared)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    if len(members) == 1 and (whole_items or len(members[0].rows) == 1):
                        raise ActiveDPOError(
                            f"out of memory for {len(members[0].rows)} responses of one prompt "
                            f"({padded_tokens(members)} tokens); use a smaller max_length or a "
                            "device with more memory"
                        ) from error
                else:
                    done.update(batch.rows.tolist())
                    progress.update(len(found))
                    yield result
                    if budget.tokens != at_first:
                        break
                    continue
                # Outside the handler, whose traceback holds the batch's tensors.
                budget.halve(padded_tokens(members))
                # The plan of all is void: others would be computed for nothing.
                pending = [row for row in pending if row in wanted]
                break
            pending = [row for row in pending if row not in done]
