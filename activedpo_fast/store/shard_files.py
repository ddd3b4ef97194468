"""The files of shards in a store: rows are appended as they come, to one shard until it is full."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from activedpo_fast.gradients.gradient_rows import GradientRows
from activedpo_fast.store.shards import PartialShard, ShardLayout

SHARDS = "rows-*.safetensors"
_SHARD = "rows-{:05d}.safetensors"
_PARTIAL = "rows-{:05d}.partial"


def partial_shards(folder: Path, key: bytes) -> dict[Path, tuple[list[int], int]]:
    """Return the shards that are being filled: the rows that they have, and their room for more.

    One that was killed before it was begun counts as nothing.
    """
    paths = sorted(folder.glob("rows-*.partial"))
    found = {path: PartialShard.contents(path, key) for path in paths}
    return {path: content for path, content in found.items() if content is not None}


def write_rows(
    folder: Path,
    parts: Iterable[GradientRows],
    expected: int,
    *,
    key: bytes,
    rows_per_shard: int,
    dtype: torch.dtype,
) -> None:
    """Append rows to the shard with the lowest number that is not full, and so on.

    Args:
        parts: rows that no shard has; their gradients have `dtype`.
        expected: how many rows there are in all `parts`.
    """
    shards = partial_shards(folder, key)
    for path, (_, room) in shards.items():
        if room == 0:  # killed between its last row and its new name
            with PartialShard(path, key) as full:
                full.finish(path.with_suffix(".safetensors"))
    partial: PartialShard | None = None
    try:
        for part in parts:
            at = 0
            while at < len(part.rows):
                if partial is None:
                    layout = ShardLayout(rows_per_shard, part.gradients.shape[1], dtype)
                    partial = _next_shard(folder, key, layout, expected)
                piece = slice(at, at + partial.room)
                count = len(part.rows[piece])
                partial.append(part.rows[piece], part.gradients[piece], part.logps[piece])
                at, expected = at + count, expected - count
                if partial.room == 0:
                    partial.finish(partial.path.with_suffix(".safetensors"))
                    partial = None
    finally:
        if partial is not None:
            partial.close()


def _next_shard(folder: Path, key: bytes, layout: ShardLayout, expected: int) -> PartialShard:
    """Return the shard to fill next; a new one has `layout`, or less if fewer rows are expected."""
    number = 0
    while (folder / _SHARD.format(number)).exists():
        number += 1
    path = folder / _PARTIAL.format(number)
    shards = partial_shards(folder, key)
    if path in shards:
        return PartialShard(path, key)
    for_others = sum(room for _, room in shards.values())
    n = max(1, min(layout.n, expected - for_others))
    return PartialShard(path, key, ShardLayout(n, layout.dim, layout.dtype))
