"""Joining the stores of parts of a pool into one: rows are copied, whole or not at all."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from activedpo_fast._files import (
    check_folder_target,
    is_temporary,
    sync,
    temporary_name,
    write_atomic,
)
from activedpo_fast._locks import locked_folder
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.gradient_rows import GradientRows
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.progress import progress_bar
from activedpo_fast.store.comparing import changed_columns, first_difference
from activedpo_fast.store.filling import default_rows_per_shard
from activedpo_fast.store.folder import POOL, StoreFolder, new_manifest
from activedpo_fast.store.manifest import key_of
from activedpo_fast.store.rows import StoredRows
from activedpo_fast.store.shard_files import write_rows

if TYPE_CHECKING:
    from activedpo_fast.store.store import FeatureStore

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 2**26  # rows copied at once


class _Part(NamedTuple):
    """A store that is joined, as far as it is read at first."""

    path: Path
    skipped: list[int]
    pool: PreferencePool
    tokens: Tensor  # int64 [P], a hash of each item's
    logps: Tensor  # float64 [R]
    rows: StoredRows

    def rows_of(self, items: list[int]) -> Tensor:
        """Return the numbers of the responses of some items, int64 [m], ascending."""
        counts = self.pool.response_offsets.diff()
        wanted = torch.zeros(len(self.pool), dtype=torch.bool)
        wanted[items] = True
        return torch.repeat_interleave(wanted, counts).nonzero().flatten()


def join_stores(
    output: Path, stores: Sequence[FeatureStore], *, show_progress: bool | None
) -> None:
    """Write to `output` the rows of all stores; see `FeatureStore.join`."""
    _check_output(output, stores)
    for other in stores[1:]:
        _require_same_kind(stores[0], other)
    with ExitStack() as stack:
        parts = [
            _Part(
                store.path,
                store.manifest["skipped"],
                store.pool(),
                store.tokens(),
                store.logps(),
                stack.enter_context(store.rows_on_disk()),
            )
            for store in stores
        ]
        kept = _kept_items(parts)
        with _new_folder(output) as folder:
            _write(folder, stores[0], parts, kept, show_progress)


def _check_output(output: Path, stores: Sequence[FeatureStore]) -> None:
    check_folder_target(output)
    if output.exists() and any(output.iterdir()):
        raise ActiveDPOError(f"{output} exists and is not empty: choose another path")
    for store in stores:
        if output.resolve().is_relative_to(store.path.resolve()):
            raise ActiveDPOError(f"{output} is inside {store.path}: choose another path")


def _require_same_kind(first: StoreFolder, other: StoreFolder) -> None:
    """Raise `ActiveDPOError`, naming the first difference, unless rows of both go together."""
    one, two = first.manifest, other.manifest
    differs = first_difference(two["settings"], one["settings"]) or first_difference(
        two["filling"]["extractor"], one["filling"]["extractor"]
    )
    if differs is not None:
        raise ActiveDPOError(
            f"{other.path} was made {differs} as {first.path} was: only stores of one model with "
            "the same settings can be joined"
        )


def _kept_items(parts: Sequence[_Part]) -> list[list[int]]:
    """Return the positions of each part's items that no earlier part has.

    Raises:
        ActiveDPOError: an item is in two parts and differs in anything.
    """
    first_with: dict[str, tuple[_Part, int]] = {}
    kept, repeated = [], 0
    for part in parts:
        mine = []
        for position, id in enumerate(part.pool.ids):
            earlier, there = first_with.setdefault(id, (part, position))
            if earlier is part:
                mine.append(position)
                continue
            _require_same_item(earlier, there, part, position)
            repeated += 1
        kept.append(mine)
    if repeated:
        logger.info("%d prompts are in several stores, with the same rows: kept once", repeated)
    return kept


def _require_same_item(one: _Part, first: int, two: _Part, second: int) -> None:
    before, now = one.pool.subset([first]), two.pool.subset([second])
    columns = changed_columns(before, now)
    differs = None
    if before.fingerprint() != now.fingerprint():
        differs = "other texts"
    elif columns:
        differs = f"another {columns[0]!r}"
    elif one.tokens[first] != two.tokens[second]:
        differs = "other tokens (does the chat template say the date?)"
    else:
        same = _same_rows(one, one.rows_of([first]), two, two.rows_of([second]))
        if not all(same):
            differs = f"other numbers for response {same.index(False) + 1}"
    if differs is not None:
        raise ActiveDPOError(
            f"item {before.ids[0]!r} is in {one.path} and in {two.path}, with {differs}: make one "
            "of the stores without it, or give it another id"
        )


def _same_rows(one: _Part, first: Tensor, two: _Part, second: Tensor) -> list[bool]:
    """Return which rows of two parts have the same bytes, as have their log-probs."""

    def content(part: _Part, ids: Tensor) -> list[bytes]:
        numbers = part.rows.take(ids).view(torch.uint8).numpy()
        logps = part.logps[ids].numpy()
        return [row.tobytes() + logp.tobytes() for row, logp in zip(numbers, logps, strict=True)]

    return [a == b for a, b in zip(content(one, first), content(two, second), strict=True)]


def _write(
    folder: Path,
    first: StoreFolder,
    parts: Sequence[_Part],
    kept: Sequence[list[int]],
    show_progress: bool | None,
) -> None:
    """Write the store of the kept items; its settings are those of the first."""
    pool = PreferencePool(
        part.pool[position] for part, mine in zip(parts, kept, strict=True) for position in mine
    )
    skipped = [
        pool.position(part.pool.ids[position])
        for part, mine in zip(parts, kept, strict=True)
        for position in sorted(set(mine).intersection(part.skipped))
    ]
    settings = first.manifest["settings"]
    store = StoreFolder(folder, new_manifest(pool, settings, skipped, settings["store_dtype"]))
    write_atomic(folder / POOL, pool.jsonl())
    rows_per_shard = default_rows_per_shard(pool.n_responses)
    store.write_tokens(
        torch.cat([part.tokens[mine] for part, mine in zip(parts, kept, strict=True)]),
        {**first.manifest["filling"], "rows_per_shard": rows_per_shard},
    )
    with progress_bar(show_progress, total=pool.n_responses, desc="joining", unit="row") as bar:

        def copied() -> Iterator[GradientRows]:
            for rows in _rows(parts, kept):
                yield rows
                bar.update(len(rows.rows))

        write_rows(
            folder,
            copied(),
            pool.n_responses,
            key=key_of(store.manifest),
            rows_per_shard=rows_per_shard,
            dtype=store.dtype,
        )


def _rows(parts: Sequence[_Part], kept: Sequence[list[int]]) -> Iterator[GradientRows]:
    """Yield the rows of the kept items, numbered from 0."""
    done = 0
    for part, mine in zip(parts, kept, strict=True):
        for ids in part.rows_of(mine).split(max(1, _CHUNK_BYTES // part.rows.row_bytes)):
            if len(ids):
                yield GradientRows(
                    torch.arange(done, done + len(ids)), part.rows.take(ids), part.logps[ids]
                )
                done += len(ids)


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder next to `path`, which becomes `path` at the end, or is removed.

    What a killed process has left of such a folder is removed, too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.iterdir():
        if is_temporary(left.name, path.stem) and left.is_dir() and not left.is_symlink():
            with suppress(ActiveDPOError), locked_folder(left):  # else another process writes it
                shutil.rmtree(left)
    temporary = path.parent / temporary_name(path)
    try:
        with locked_folder(temporary):
            yield temporary
        sync(temporary)
        temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
