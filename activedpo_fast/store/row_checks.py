"""Checksums of rows, compared when the rows are read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import Any

import numpy as np
import torch

_HASHED_BY_ONE = 2**22  # bytes that are not worth threads


def row_checksum(key: bytes, prefix: Any, row: Any) -> bytes:
    """Return the checksum of a row's bytes, after those of `prefix`; 16 bytes."""
    digest = hashlib.blake2b(prefix, key=key, digest_size=16)
    digest.update(row)
    return digest.digest()


class RowChecks:
    """Checksums of rows, each compared the first time that its row is read.

    Args:
        prefixes: uint8 [R, p], bytes that are hashed before those of a row.
        checksums: uint8 [R, 16], `row_checksum` of every row.
        key: of the hashes.
    """

    def __init__(self, prefixes: np.ndarray, checksums: np.ndarray, key: bytes) -> None:
        self._prefixes = prefixes
        self._checksums = checksums
        self._key = key
        self._position = np.arange(len(checksums))
        self._matched = np.zeros(len(checksums), dtype=bool)

    @classmethod
    def joined(cls, parts: Sequence[RowChecks]) -> RowChecks:
        """Return the checks of the rows of several parts with one key, one after the other."""
        return cls(
            np.concatenate([part._prefixes for part in parts]),
            np.concatenate([part._checksums for part in parts]),
            parts[0]._key,
        )

    def select(self, numbers: np.ndarray) -> RowChecks:
        """Return the checks of some rows; what one has found, the other knows."""
        other = copy(self)
        other._position = self._position[numbers]
        return other

    def unread(self, numbers: np.ndarray) -> np.ndarray:
        """Return those of the rows that have not been compared yet, each once, ascending."""
        return np.unique(numbers[~self._matched[self._position[numbers]]])

    def first_wrong(self, numbers: np.ndarray, rows: np.ndarray) -> int | None:
        """Compare rows, uint8 [m, bytes]; return which of the m is the first that differs."""
        positions = self._position[numbers]
        wanted = np.flatnonzero(~self._matched[positions])

        def wrong(n: int) -> bool:
            at = positions[n]
            found = row_checksum(self._key, self._prefixes[at].tobytes(), rows[n].data)
            return bool(found != self._checksums[at].tobytes())

        if wanted.size * rows.shape[1] < _HASHED_BY_ONE:
            found = [n for n in wanted.tolist() if wrong(n)]
        else:
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing frees the GIL
                found = [
                    n
                    for n, is_wrong in zip(wanted.tolist(), pool.map(wrong, wanted), strict=True)
                    if is_wrong
                ]
        if found:
            return found[0]
        self._matched[positions[wanted]] = True
        return None
