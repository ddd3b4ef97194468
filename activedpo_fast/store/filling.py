"""Filling a store: missing rows are computed, and written as they come.

Several processes compute them, and the first writes: they take the batches of the one plan in turn,
so that the rows, their order and the files are those of a single process.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from activedpo_fast.distributed.pool_parts import PoolProcesses
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.gradient_rows import GradientRows
from activedpo_fast.pool.tokens import TokenizedPool
from activedpo_fast.progress import progress_bar
from activedpo_fast.store.comparing import require_same_settings
from activedpo_fast.store.folder import TOKENS, StoreFolder
from activedpo_fast.store.manifest import key_of
from activedpo_fast.store.shard_files import write_rows
from activedpo_fast.store.token_hashes import digest_of, token_hashes

if TYPE_CHECKING:
    from activedpo_fast.gradients.extractor import FeatureExtractor

logger = logging.getLogger(__name__)

# What an error means for the work of several processes.
KEPT = "rows that were written are kept"
_SHARD_ROWS = 512  # for a small pool
_SHARDS = 128  # for a large pool; all of them are open while rows are read from disk


def default_rows_per_shard(responses: int) -> int:
    """Return how many rows a full shard of a store of so many responses has."""
    return max(_SHARD_ROWS, responses // _SHARDS)


def fill_missing(
    store: StoreFolder,
    extractor: FeatureExtractor,
    tokenized: TokenizedPool,
    processes: PoolProcesses,
    *,
    rows_per_shard: int | None,
    show_progress: bool | None,
) -> None:
    """Compute and write the rows that a store does not have; see `FeatureStore.fill`.

    Only the first process reads and writes files.

    Raises:
        ActiveDPOError: the extractor differs from that of the first rows or of other processes, or
            fails.
    """
    missing = processes.of_first(store.missing_rows)
    if missing:
        _require_same_rows(extractor, tokenized, processes)
        (tokens,) = processes.of_first(lambda: _begin(store, extractor, tokenized, rows_per_shard))
        batches = extractor.batches(tokenized, missing, tokens)
        mine = [row for batch in batches[processes.rank :: processes.size] for row in batch]
        own = extractor.iter_gradients(
            tokenized, mine, max_tokens_per_batch=tokens, show_progress=False
        )
        with progress_bar(
            show_progress, total=len(missing), desc="gradient features", unit="response"
        ) as progress:
            stored = _as_stored(store, own, tokenized)
            parts = _of_all(stored, store.dtype, processes, progress.update)
            if processes.rank == 0:
                _write(store, parts, len(missing))
            else:
                deque(parts, maxlen=0)
    else:
        first = processes.rank == 0
        processes.check(lambda: _require_recorded(store, extractor) if first else None)
    if not missing and processes.rank == 0 and store.partial():  # killed at the very end
        _write(store, (), 0)
        for path in store.partial():  # all its rows are in another shard
            path.unlink()
    if processes.rank == 0 and not (store.path / TOKENS).exists():  # it was deleted since
        store.write_tokens(token_hashes(tokenized), store.manifest["filling"])


def _require_recorded(store: StoreFolder, extractor: FeatureExtractor) -> None:
    """Raise `ActiveDPOError` if the extractor would compute other rows than the store has."""
    filling = store.manifest.get("filling")
    if filling is not None:
        now = json.loads(json.dumps(extractor.identity()))
        require_same_settings(store.path, filling["extractor"], now, "filled")


def _require_same_rows(
    extractor: FeatureExtractor, tokenized: TokenizedPool, processes: PoolProcesses
) -> None:
    """Raise `ActiveDPOError`, on all processes, unless they would all compute the same rows."""
    layout = processes.check(lambda: extractor.check(tokenized))
    if processes.size > 1:
        identity = {name: repr(value) for name, value in extractor.identity().items()}
        tokens = digest_of(token_hashes(tokenized))
        processes.require_same({**identity, "tokens": tokens, "way to batch": layout.name})


def _of_all(
    own: Iterator[GradientRows],
    dtype: torch.dtype,
    processes: PoolProcesses,
    update: Callable[[int], object],
) -> Iterator[GradientRows]:
    """Yield, in the first process, what every process computes, one batch of each at a time.

    Args:
        own: the rows of this process, with gradients of `dtype`.
        update: is told how many rows all have computed.
    """
    # A batch of which no row is finite gives no rows at first: each is run alone.
    nonempty = (part for part in own if len(part.rows))
    while True:
        part = processes.check(lambda: next(nonempty, None)) or _no_rows(dtype)
        count = processes.total(len(part.rows))
        if count == 0:
            return
        columns = (part.rows[:, None], part.gradients, part.logps[:, None])
        for rows, gradients, logps in zip(*map(processes.to_first, columns), strict=True):
            yield GradientRows(rows[:, 0], gradients, logps[:, 0])
        update(count)


def _no_rows(dtype: torch.dtype) -> GradientRows:
    return GradientRows(
        torch.empty(0, dtype=torch.int64),
        torch.empty(0, 0, dtype=dtype),
        torch.empty(0, dtype=torch.float64),
    )


def _begin(
    store: StoreFolder,
    extractor: FeatureExtractor,
    tokenized: TokenizedPool,
    rows_per_shard: int | None,
) -> tuple[int]:
    """Record how rows are computed, or compare it with what is recorded.

    Returns:
        The padded tokens of a batch.
    """
    _require_recorded(store, extractor)
    layout = extractor.check(tokenized).name
    filling = store.manifest.get("filling")
    if filling is None:
        filling = {
            "rows_per_shard": rows_per_shard or default_rows_per_shard(store.manifest["responses"]),
            "max_tokens_per_batch": extractor.tokens_per_batch(tokenized),
            "layout": layout,
            "extractor": json.loads(json.dumps(extractor.identity())),
        }
    else:
        given = extractor.max_tokens_per_batch
        used = {
            **filling,
            "layout": layout,
            "max_tokens_per_batch": given or filling["max_tokens_per_batch"],
        }
        if used != filling:
            logger.warning(
                "%s: batches are not those of the first rows: the last bits of the rows may "
                "differ from those of a store that was made at once",
                store.path,
            )
        filling = used
    if "tokens" not in store.manifest or filling != store.manifest.get("filling"):
        store.write_tokens(token_hashes(tokenized), filling)
    return (filling["max_tokens_per_batch"],)


def _as_stored(
    store: StoreFolder, parts: Iterable[GradientRows], tokenized: TokenizedPool
) -> Iterator[GradientRows]:
    """Yield rows in the store's dtype.

    Raises:
        ActiveDPOError: a number is beyond that dtype.
    """
    for part in parts:
        gradients = part.gradients.to(store.dtype)
        fits = gradients.isfinite().all(dim=1)
        if not fits.all():
            raise ActiveDPOError(
                f"{tokenized.place(int(part.rows[~fits][0]))}: its gradient row has numbers "
                f"beyond {store.manifest['settings']['store_dtype']}: store rows as float64"
            )
        yield GradientRows(part.rows, gradients, part.logps)


def _write(store: StoreFolder, parts: Iterable[GradientRows], expected: int) -> None:
    if expected < store.manifest["responses"]:
        done = store.manifest["responses"] - expected
        logger.warning("continuing %s: %d rows already exist", store.path, done)
    write_rows(
        store.path,
        parts,
        expected,
        key=key_of(store.manifest),
        rows_per_shard=store.manifest["filling"]["rows_per_shard"],
        dtype=store.dtype,
    )
