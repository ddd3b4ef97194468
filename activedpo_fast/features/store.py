"""Gradient rows on disk: written in shards as they are computed, resumable, whole or absent."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save_file

from activedpo_fast._files import atomic_path, write_atomic
from activedpo_fast.data import PreferencePool
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.features.extractor import FeatureExtractor, GradientRows
from activedpo_fast.tokenization import TokenizedPool

logger = logging.getLogger(__name__)

_FORMAT = 2  # 1 had another sjlt
_MANIFEST = "manifest.json"
_POOL = "pool.jsonl"
_SHARD = "rows-{:05d}.safetensors"


class FeatureStore:
    """A folder with the gradient rows of one pool, one model and one sketch.

    `manifest.json` holds the settings and is what makes a folder a store; `pool.jsonl` is the pool;
    `rows-*.safetensors` are shards with `rows` (int64), `gradients` and `logps`. Every file is
    renamed into place when whole, so a killed run leaves a store that can be continued.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        pool: PreferencePool,
        settings: Mapping[str, Any],
        *,
        skipped: list[int],
    ) -> FeatureStore:
        """Start a store at `path`, or reopen the one that is there to continue it.

        Args:
            settings: JSON values that the rows depend on (model, sketch, beta, tokenization).
            skipped: positions of items that DPOTrainer would drop; never candidates.

        Raises:
            ActiveDPOError: the folder holds something else, or a store made with other settings.
        """
        folder = Path(path)
        manifest = {
            "format": _FORMAT,
            "pool": pool.fingerprint(),
            "responses": pool.n_responses,
            "skipped": skipped,
            "settings": dict(settings),
        }
        if (folder / _MANIFEST).exists():
            store = cls.open(folder, complete=False)
            _require_same(folder, store.manifest, manifest)
            return store
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ActiveDPOError(f"{folder} exists and is not a feature store: choose another path")
        folder.mkdir(parents=True, exist_ok=True)
        pool.to_jsonl(folder / _POOL)
        write_atomic(folder / _MANIFEST, json.dumps(manifest, indent=2) + "\n")
        return cls(folder, manifest)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, complete: bool = True) -> FeatureStore:
        """Open the store at `path`; with `complete`, refuse one whose rows are not all there."""
        folder = Path(path)
        try:
            manifest = json.loads((folder / _MANIFEST).read_text())
        except FileNotFoundError:
            raise ActiveDPOError(f"{folder} is not a feature store: no {_MANIFEST} in it") from None
        except (OSError, ValueError) as error:
            raise ActiveDPOError(f"{folder / _MANIFEST} cannot be read: {error}") from None
        if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
            raise ActiveDPOError(f"{folder} is a feature store of an unknown format")
        store = cls(folder, manifest)
        if complete and (missing := len(store.missing_rows())):
            raise ActiveDPOError(
                f"{folder} is incomplete, {missing} of {manifest['responses']} rows are missing: "
                "run `activedpo features` again with the same options to finish it"
            )
        return store

    def pool(self) -> PreferencePool:
        """The pool whose rows these are."""
        pool = PreferencePool.from_jsonl(self.path / _POOL)
        if pool.fingerprint() != self.manifest["pool"]:
            raise ActiveDPOError(f"{self.path / _POOL} has been changed since the rows were taken")
        return pool

    def missing_rows(self) -> list[int]:
        """The responses, as row numbers in pool order, that have no gradient row yet."""
        there: set[int] = set()
        for shard in self._shards():
            with _opened(shard) as tensors:
                there.update(tensors.get_tensor("rows").tolist())
        return [row for row in range(self.manifest["responses"]) if row not in there]

    def fill(
        self,
        extractor: FeatureExtractor,
        tokenized: TokenizedPool,
        *,
        rows_per_shard: int = 512,
        show_progress: bool | None = None,
    ) -> None:
        """Compute and write the missing rows; what is written stays if this is interrupted."""
        missing = self.missing_rows()
        if not missing:
            return
        if len(missing) < self.manifest["responses"]:
            done = self.manifest["responses"] - len(missing)
            logger.warning("continuing %s: %d rows are there already", self.path, done)
        waiting: list[GradientRows] = []
        try:
            for part in extractor.iter_gradients(tokenized, missing, show_progress=show_progress):
                waiting.append(part)
                if sum(len(w.rows) for w in waiting) >= rows_per_shard:
                    self._write(waiting)
                    waiting = []
        finally:
            if waiting:
                self._write(waiting)

    def load(self) -> GradientRows:
        """All rows in pool order."""
        shards = [_read(shard) for shard in self._shards()]
        order = torch.cat([shard["rows"] for shard in shards]).argsort()
        return GradientRows(
            torch.arange(len(order)),
            torch.cat([shard["gradients"] for shard in shards])[order],
            torch.cat([shard["logps"] for shard in shards])[order],
        )

    def export(self, path: str | os.PathLike[str]) -> None:
        """Write the rows as one float32 matrix `features` [R, k], in pool order, unnormalised."""
        gradients = self.load().gradients.float().contiguous()
        # safetensors metadata is text only
        metadata = {"settings": json.dumps(self.manifest["settings"], sort_keys=True)}
        with atomic_path(path) as temporary:
            save_file({"features": gradients}, temporary, metadata=metadata)

    def _shards(self) -> list[Path]:
        return sorted(self.path.glob(_SHARD.format(0).replace("00000", "*")))

    def _write(self, parts: list[GradientRows]) -> None:
        taken = [int(shard.stem.rpartition("-")[2]) for shard in self._shards()]
        shard = self.path / _SHARD.format(max(taken, default=-1) + 1)
        with atomic_path(shard) as temporary:
            save_file(
                {
                    "rows": torch.cat([part.rows for part in parts]),
                    "gradients": torch.cat([part.gradients for part in parts]),
                    "logps": torch.cat([part.logps for part in parts]),
                },
                temporary,
            )


def _read(shard: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(shard)
    except (OSError, SafetensorError) as error:
        raise ActiveDPOError(f"{shard} cannot be read ({error}): delete it and run again") from None


def _opened(shard: Path) -> Any:
    try:
        return safe_open(shard, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ActiveDPOError(f"{shard} cannot be read ({error}): delete it and run again") from None


def _require_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if found["pool"] != wanted["pool"]:
        raise ActiveDPOError(f"{folder} holds the rows of another pool: choose another path")
    for name, old, new in _differences(found["settings"], wanted["settings"]):
        raise ActiveDPOError(
            f"{folder} was made with {name} = {old!r}, not {new!r}: choose another path"
        )


def _differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            yield name, found.get(name), wanted.get(name)
