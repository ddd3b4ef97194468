"""A pool tokenized by several processes together, each its own part of it."""

from __future__ import annotations

from array import array
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from activedpo_fast.distributed.pool_parts import PoolPart, PoolProcesses
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.tokens import (
    Noticed,
    TokenizedPool,
    TokenizedResponse,
    TruncationMode,
    tokenize_noticing,
)


def tokenize_in_parts(
    pool: PreferencePool,
    processing_class: PreTrainedTokenizerBase,
    processes: PoolProcesses,
    *,
    max_length: int | None,
    truncation_mode: TruncationMode,
    chat_template_kwargs: dict[str, Any] | None,
    decoder_start_token_id: int | None = None,
    show_progress: bool | None = None,
) -> TokenizedPool:
    """Return what `tokenize_pool` does, in every process; the first one warns.

    Tokenizing a million prompts takes most of an hour of one core, and longer than their gradients
    on many GPUs. A pool of fewer prompts than processes is tokenized by each of them.

    Raises:
        ActiveDPOError: of `tokenize_pool`, in all processes; prompts with images.
    """
    if pool.has_images:
        raise ActiveDPOError("pools with images are tokenized whole, by tokenize_pool")
    alone = processes.size == 1 or len(pool) < processes.size
    part = PoolPart(range(len(pool)), range(pool.n_responses)) if alone else processes.part(pool)
    own, noticed = processes.check(
        lambda: tokenize_noticing(
            pool if alone else pool.subset(part.items),
            processing_class,
            max_length=max_length,
            truncation_mode=truncation_mode,
            chat_template_kwargs=chat_template_kwargs,
            decoder_start_token_id=decoder_start_token_id,
            show_progress=show_progress,
        )
    )
    if not alone:
        own = _together(own, pool, part.items.start, processes)
        noticed = Noticed(*map(processes.total, noticed))
    if processes.rank == 0:
        noticed.warn(own, max_length, truncation_mode)
    return own


def _together(
    own: TokenizedPool, pool: PreferencePool, first: int, processes: PoolProcesses
) -> TokenizedPool:
    """Return the tokens of all parts; `own` begins at the item `first`."""
    mine = [np.asarray(s.input_ids) for s in own.sequences]
    ids = processes.gather(torch.from_numpy(np.concatenate(mine))).numpy()
    lengths = processes.gather(_numbers([len(each) for each in mine])).tolist()
    starts = processes.gather(_numbers([s.completion_start for s in own.sequences])).tolist()
    skipped = processes.gather(_numbers(own.skipped) + first).tolist()
    bounds = pairwise(accumulate(lengths, initial=0))
    sequences = [
        TokenizedResponse(array("i", ids[begin:end].tobytes()), start)
        for (begin, end), start in zip(bounds, starts, strict=True)
    ]
    items = torch.repeat_interleave(pool.response_offsets.diff()).tolist()
    return replace(
        own, sequences=sequences, skipped=skipped, items=items, ids=pool.ids, numbers=None
    )


def _numbers(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
