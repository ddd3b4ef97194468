"""Hashes of token ids: rows of the same texts may be of other tokens."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

from activedpo_fast.pool.tokens import TokenizedPool


def token_hashes(tokenized: TokenizedPool) -> torch.Tensor:
    """Return 64-bit hashes of each item's token ids, response starts and images, int64 [P]."""
    digests: dict[int, Any] = {}
    for row, sequence in enumerate(tokenized.sequences):
        item = digests.setdefault(tokenized.item_of(row), hashlib.blake2b(digest_size=8))
        ids = [len(sequence.input_ids), sequence.completion_start, *sequence.input_ids]
        item.update(np.asarray(ids, dtype="<i8").tobytes())
        if sequence.images is not None:
            item.update(sequence.images.digest())
    found = b"".join(digest.digest() for digest in digests.values())
    return torch.from_numpy(np.frombuffer(found, dtype="<i8").astype(np.int64))


def digest_of(hashes: torch.Tensor) -> str:
    """Return one hash of all of them, hex."""
    return hashlib.sha256(hashes.numpy().astype("<i8").tobytes()).hexdigest()
