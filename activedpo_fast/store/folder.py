"""The files of a store: read with their checksums, and replaced whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from activedpo_fast._files import checksum, is_temporary, reason_of, write_atomic
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.store.manifest import FORMAT, key_of, write_manifest
from activedpo_fast.store.shard_files import SHARDS, partial_shards
from activedpo_fast.store.shards import DamagedShard, Shard
from activedpo_fast.store.token_hashes import digest_of

POOL = "pool.jsonl"
TOKENS = "tokens.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
_TEMPORARY = ("manifest", "pool", "tokens")  # files that are renamed into place


def is_temporary_file(name: str) -> bool:
    """Return whether a process that writes a store has such a file for a moment."""
    return is_temporary(name, *_TEMPORARY)


def new_manifest(
    pool: PreferencePool, settings: Mapping[str, Any], skipped: list[int], dtype: str
) -> dict[str, Any]:
    """Return the manifest of a store without rows; the arguments are those of `create`."""
    if dtype not in DTYPES:
        raise ActiveDPOError(f"rows are stored as {' or '.join(DTYPES)}, not {dtype!r}")
    return {
        "format": FORMAT,
        "pool": pool.fingerprint(),
        "responses": pool.n_responses,
        "skipped": skipped,
        "settings": json.loads(json.dumps({**settings, "store_dtype": dtype})),
        "files": {POOL: checksum(pool.jsonl())},
    }


class StoreFolder:
    """A store's folder, and its manifest as it is on disk.

    Whoever writes holds the folder's lock.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored rows."""
        name = self.manifest["settings"]["store_dtype"]
        if name not in DTYPES:
            raise ActiveDPOError(
                f"{self.path} has rows of the dtype {name!r}, not one of {', '.join(DTYPES)}"
            )
        return DTYPES[name]

    @property
    def begun(self) -> bool:
        """Whether rows have been computed, or were about to be."""
        return "tokens" in self.manifest

    def pool(self) -> PreferencePool:
        """Return the pool of these rows."""
        self.read(POOL)  # checks it
        pool = PreferencePool.from_jsonl(self.path / POOL)
        if pool.fingerprint() != self.manifest["pool"]:
            raise ActiveDPOError(f"{self.path / POOL} has been changed since the rows were taken")
        return pool

    def missing_rows(self) -> list[int]:
        """Return the responses without a gradient row yet, as row numbers in pool order."""
        there = np.zeros(self.manifest["responses"], dtype=bool)
        for shard in self.shards():
            there[shard.rows] = True
        for rows, _ in self.partial().values():
            there[rows] = True
        return np.flatnonzero(~there).tolist()

    def is_whole(self) -> bool:
        """Return whether all rows are in finished shards, and no file of `fill` is gone."""
        tokens = (self.path / TOKENS).exists()
        return tokens and not self.missing_rows() and not self.partial()

    def shards(self) -> list[Shard]:
        """Return the shards by name, checked as far as `Shard.open` does."""
        paths = sorted(self.path.glob(SHARDS))
        if not paths:
            return []
        if not self.begun:
            raise DamagedShard(paths[0], "the store has no rows yet")
        key, found = key_of(self.manifest), list[Shard]()
        for path in paths:
            dim = found[0].layout.dim if found else None
            shard = Shard.open(path, key, dim=dim, dtype=self.dtype)
            if ((shard.rows < 0) | (shard.rows >= self.manifest["responses"])).any():
                raise DamagedShard(path, "it has rows that are not in the pool")
            found.append(shard)
        return found

    def partial(self) -> dict[Path, tuple[list[int], int]]:
        """Return the shards that are being filled; see `partial_shards`."""
        return partial_shards(self.path, key_of(self.manifest)) if self.begun else {}

    def temporary_files(self) -> list[Path]:
        """Return the files that a killed process left and that hold no rows."""
        return sorted(path for path in self.path.iterdir() if is_temporary_file(path.name))

    def read(self, name: str) -> bytes:
        """Return the content of a file whose checksum the manifest has, after comparing it.

        Raises:
            ActiveDPOError: it is gone, unreadable or changed.
        """
        path = self.path / name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ActiveDPOError(f"{path}: {reason_of(error)}") from error
        allowed = [self.manifest.get(key, {}).get(name) for key in ("files", "next_files")]
        if checksum(content) not in allowed:
            raise ActiveDPOError(
                f"{path} has been changed since it was written, its checksum does not match: put "
                "it back as it was, or delete it and run `activedpo features` again with the same "
                "options"
            )
        return content

    def tokens(self) -> torch.Tensor:
        """Return the hash of each item's tokens, int64 [P]."""
        return load(self.read(TOKENS))["items"]

    def remove_temporary_files(self) -> None:
        """Remove what a killed process left."""
        for path in self.temporary_files():
            path.unlink(missing_ok=True)

    def replace_pool(self, pool: PreferencePool) -> None:
        """Write the pool; at no moment does the manifest refuse what is there."""
        content = pool.jsonl()
        final = {**self.manifest, "files": {**self.manifest["files"], POOL: checksum(content)}}
        final.pop("next_files", None)
        if final["files"] != self.manifest["files"]:
            write_manifest(self.path, {**self.manifest, "next_files": {POOL: checksum(content)}})
        write_atomic(self.path / POOL, content)
        if final != self.manifest or (self.manifest.get("next_files")):
            write_manifest(self.path, final)
        self.manifest = final

    def write_tokens(self, hashes: torch.Tensor, filling: dict[str, Any]) -> None:
        """Write the hashes of all tokens, and with them how rows are computed (`filling`)."""
        content = save({"items": hashes})
        write_atomic(self.path / TOKENS, content)
        self.manifest = {
            **self.manifest,
            "files": {**self.manifest["files"], TOKENS: checksum(content)},
            "tokens": digest_of(hashes),
            "filling": filling,
        }
        write_manifest(self.path, self.manifest)
