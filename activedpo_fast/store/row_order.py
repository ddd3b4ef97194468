"""Where the rows of a pool are in the shards of a store: each row once, and none missing."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.store.shards import Shard

logger = logging.getLogger(__name__)


def row_order(folder: Path, shards: list[Shard], responses: int) -> np.ndarray:
    """Return the position of each row of the pool in the concatenated shards, int64 [R].

    A row that stands twice counts once, if both are equal.

    Raises:
        ActiveDPOError: rows are missing, or a row stands twice with different numbers.
    """
    numbers = np.concatenate([np.empty(0, np.int64), *(shard.rows for shard in shards)])
    found, order = np.unique(numbers, return_index=True)
    if len(found) != responses:
        raise incomplete(folder, shards, responses - len(found), responses)
    if len(numbers) > len(found):
        _check_repeated(shards, numbers, order)
    return order


def incomplete(folder: Path, shards: list[Shard], missing: int, responses: int) -> ActiveDPOError:
    """Return the error of a store with missing rows; it names shards that are copies of others."""
    copies, first = [], dict[bytes, Path]()
    for shard in shards:
        known = first.setdefault(shard.checksums.tobytes(), shard.path)
        if known != shard.path:
            copies.append(f"; {shard.path.name} is a copy of {known.name}")
    return ActiveDPOError(
        f"{folder} is incomplete, {missing} of {responses} rows are "
        "missing: run `activedpo features` again with the same options to finish it"
        + "".join(copies)
    )


def _check_repeated(shards: list[Shard], numbers: np.ndarray, order: np.ndarray) -> None:
    checksums = np.concatenate([shard.checksums for shard in shards])
    paths = [shard.path for shard in shards for _ in range(shard.layout.n)]
    named: set[Path] = set()
    for again in np.setdiff1d(np.arange(len(numbers)), order).tolist():
        first = int(order[numbers[again]])
        if not np.array_equal(checksums[again], checksums[first]):
            raise ActiveDPOError(
                f"row {numbers[again]} is in {paths[first]} and in {paths[again]}, with other "
                "numbers: delete one of the files and run `activedpo features` again"
            )
        if paths[again] not in named:
            named.add(paths[again])
            logger.warning("%s repeats rows of %s: it is a copy", paths[again], paths[first])
