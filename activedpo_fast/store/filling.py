"""Filling a store: missing rows are computed, and written as they come."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.rows import GradientRows
from activedpo_fast.pool.tokens import TokenizedPool
from activedpo_fast.store.comparing import require_same_settings
from activedpo_fast.store.folder import TOKENS, StoreFolder
from activedpo_fast.store.manifest import key_of
from activedpo_fast.store.shard_files import write_rows

if TYPE_CHECKING:
    from activedpo_fast.gradients.extractor import FeatureExtractor

logger = logging.getLogger(__name__)

_SHARD_ROWS = 512  # for a small pool
_SHARDS = 128  # for a large pool; all of them are open while rows are read from disk


def fill_missing(
    store: StoreFolder,
    extractor: FeatureExtractor,
    tokenized: TokenizedPool,
    *,
    rows_per_shard: int | None,
    show_progress: bool | None,
) -> None:
    """Compute and write the rows that a store does not have; see `FeatureStore.fill`.

    Raises:
        ActiveDPOError: the extractor differs from that of the first rows, or fails.
    """
    missing = store.missing_rows()
    if missing:
        filling = _begin(store, extractor, tokenized, rows_per_shard)
        parts = extractor.iter_gradients(
            tokenized,
            missing,
            max_tokens_per_batch=filling["max_tokens_per_batch"],
            show_progress=show_progress,
        )
        _write(store, _as_stored(store, parts, tokenized), len(missing))
    elif store.partial():  # killed at the very end
        _write(store, (), 0)
        for path in store.partial():  # all its rows are in another shard
            path.unlink()
    if not (store.path / TOKENS).exists():  # it was deleted since
        store.write_tokens(tokenized, store.manifest["filling"])


def _begin(
    store: StoreFolder,
    extractor: FeatureExtractor,
    tokenized: TokenizedPool,
    rows_per_shard: int | None,
) -> dict[str, Any]:
    """Record how rows are computed, or compare it with what is recorded; return it."""
    now = json.loads(json.dumps(extractor.identity()))
    layout = extractor.check(tokenized).name
    filling = store.manifest.get("filling")
    if filling is None:
        default = max(_SHARD_ROWS, store.manifest["responses"] // _SHARDS)
        filling = {
            "rows_per_shard": rows_per_shard or default,
            "max_tokens_per_batch": extractor.tokens_per_batch(tokenized),
            "layout": layout,
            "extractor": now,
        }
    else:
        require_same_settings(store.path, filling["extractor"], now, "filled")
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
        store.write_tokens(tokenized, filling)
    return filling


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
