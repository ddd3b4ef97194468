"""Gradient rows on disk: written atomically in shards as they are computed, and resumable."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from activedpo_fast._files import FilePath, atomic_path, write_atomic
from activedpo_fast.distributed.launcher import require_one_process
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.extractor import FeatureExtractor, GradientRows
from activedpo_fast.pool.pool import PreferencePool, as_pool
from activedpo_fast.pool.template import own_template_kwargs
from activedpo_fast.pool.tokens import TokenizedPool
from activedpo_fast.store.rows import StoredRows

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

_FORMAT = 4  # 1 had a different sjlt, 2 a different kronecker, 3 no token hashes
_MANIFEST = "manifest.json"
_POOL = "pool.jsonl"
_TOKENS = "tokens.safetensors"
_SHARD = "rows-{:05d}.safetensors"
_SHARD_ROWS = 512  # for a small pool
_SHARDS = 128  # for a large pool; all of them are open while rows are read from disk
_CHUNK_BYTES = 2**26  # rows exported at once

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class FeatureStore:
    """A folder with the gradient rows of one pool, one model and one sketch.

    `manifest.json` identifies a folder as a store. It holds the settings and, once the first rows
    are computed, a hash of all tokens. `pool.jsonl` is the pool; `tokens.safetensors` has a hash of
    each item's tokens, int64 [P]; `rows-*.safetensors` are shards with `rows` (int64), `gradients`
    (in the store's dtype) and `logps`. Every file is renamed into place when complete, so a killed
    run leaves a store that can be continued.

    Attributes:
        columns_taken: the pool's columns that `create` has updated.

    Examples:
        >>> from activedpo_fast import FeatureExtractor, FeatureStore, Sketch
        >>> sketch, tokens = Sketch(dim=1024), selector.tokenize(pool)
        >>> settings = {"model": "my-model", **vars(sketch)}
        >>> store = FeatureStore.create("rows", pool, settings, skipped=tokens.skipped)
        >>> store.fill(FeatureExtractor(model, sketch), tokens)
        >>> with FeatureStore.open("rows").rows_on_disk() as rows:
        ...     rows.shape
        (10, 1024)
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.columns_taken: list[str] = []

    @classmethod
    def create(
        cls,
        path: FilePath,
        pool: PreferencePool | datasets.Dataset,
        settings: Mapping[str, Any],
        *,
        skipped: list[int],
        dtype: str = "float32",
    ) -> FeatureStore:
        """Create a store at `path`, or reopen an existing one to continue it.

        When it is reopened, the other columns of `pool` are updated in the store: gradient rows do
        not depend on them. (A row's own chat template arguments count as part of its text.)

        Args:
            settings: JSON values that the rows depend on (model, sketch, beta, tokenization).
            skipped: positions of items that DPOTrainer would drop; never candidates.
            dtype: the dtype of the stored rows, rounded to nearest: "float32", "bfloat16" or
                "float64". It counts as a setting, `store_dtype`.

        Raises:
            ActiveDPOError: the folder holds something else, or a store made with other settings or
                of another pool; an unknown dtype; several processes.
        """
        require_one_process("FeatureStore.create")
        if dtype not in _DTYPES:
            raise ActiveDPOError(f"rows are stored as {' or '.join(_DTYPES)}, not {dtype!r}")
        folder = Path(path)
        pool = as_pool(pool)
        manifest = {
            "format": _FORMAT,
            "pool": pool.fingerprint(),
            "responses": pool.n_responses,
            "skipped": skipped,
            "settings": {**settings, "store_dtype": dtype},
        }
        if (folder / _MANIFEST).exists():
            store = cls.open(folder, complete=False)
            begun = (folder / _POOL).exists()  # False if killed while creating the store
            if store.manifest["pool"] != manifest["pool"]:
                how = f" ({_difference(store.pool(), pool)})" if begun else ""
                raise ActiveDPOError(
                    f"{folder} holds the rows of another pool{how}: choose another path"
                )
            _require_same(folder, store.manifest, manifest)
            if begun:
                store._take_columns(pool)
            else:
                pool.to_jsonl(folder / _POOL)
            return store
        if os.path.exists(folder) and not (folder.is_dir() and _is_unused(folder)):
            raise ActiveDPOError(f"{folder} exists and is not a feature store: choose another path")
        folder.mkdir(parents=True, exist_ok=True)
        # Write the manifest first: it identifies what a killed process leaves as a store.
        write_atomic(folder / _MANIFEST, json.dumps(manifest, indent=2) + "\n")
        pool.to_jsonl(folder / _POOL)
        return cls(folder, manifest)

    @classmethod
    def open(cls, path: FilePath, *, complete: bool = True) -> FeatureStore:
        """Open the store at `path`; with `complete`, refuse one with missing rows."""
        folder = Path(path)
        try:
            manifest = json.loads((folder / _MANIFEST).read_text())
        except FileNotFoundError:
            raise ActiveDPOError(f"{folder} is not a feature store: no {_MANIFEST} in it") from None
        except (OSError, ValueError) as error:
            raise ActiveDPOError(f"{folder / _MANIFEST} cannot be read: {error}") from None
        found = manifest.get("format") if isinstance(manifest, dict) else None
        if isinstance(found, int) and found < _FORMAT:
            raise ActiveDPOError(
                f"{folder} is a feature store that an older version made (format "
                f"{found}, now {_FORMAT}), whose rows may be of other tokens: "
                "take them again into another folder"
            )
        if found != _FORMAT:
            raise ActiveDPOError(f"{folder} is a feature store of an unknown format")
        store = cls(folder, manifest)
        if complete and (missing := len(store.missing_rows())):
            raise ActiveDPOError(
                f"{folder} is incomplete, {missing} of {manifest['responses']} rows are missing: "
                "run `activedpo features` again with the same options to finish it"
            )
        return store

    def pool(self) -> PreferencePool:
        """Return the pool of these rows."""
        pool = PreferencePool.from_jsonl(self.path / _POOL)
        if pool.fingerprint() != self.manifest["pool"]:
            raise ActiveDPOError(f"{self.path / _POOL} has been changed since the rows were taken")
        return pool

    def missing_rows(self) -> list[int]:
        """Return the responses without a gradient row yet, as row numbers in pool order."""
        there = torch.zeros(self.manifest["responses"], dtype=torch.bool)
        for shard in self._shards():
            there[self._tensor(shard, "rows")] = True
        return (~there).nonzero().flatten().tolist()

    def fill(
        self,
        extractor: FeatureExtractor,
        tokenized: TokenizedPool,
        *,
        rows_per_shard: int | None = None,
        show_progress: bool | None = None,
    ) -> None:
        """Compute and write the missing rows; written rows are kept on interruption.

        A killed process loses less than one shard: `rows_per_shard` rows, by default 512 or 1/128
        of a large pool.

        Raises:
            ActiveDPOError: the tokens differ from those of the first rows; several processes;
                errors of the extractor.
        """
        require_one_process("FeatureStore.fill")
        self.check_tokens(tokenized)
        missing = self.missing_rows()
        if not missing:
            return
        if "tokens" not in self.manifest:
            self._write_tokens(tokenized)
        if len(missing) < self.manifest["responses"]:
            done = self.manifest["responses"] - len(missing)
            logger.warning("continuing %s: %d rows already exist", self.path, done)
        if rows_per_shard is None:
            rows_per_shard = max(_SHARD_ROWS, self.manifest["responses"] // _SHARDS)
        dtype = _DTYPES[self.manifest["settings"]["store_dtype"]]
        waiting: list[GradientRows] = []
        count = 0
        try:
            for part in extractor.iter_gradients(tokenized, missing, show_progress=show_progress):
                gradients = part.gradients.to(dtype)
                fits = gradients.isfinite().all(dim=1)
                if not fits.all():
                    place = tokenized.place(int(part.rows[~fits][0]))
                    raise ActiveDPOError(
                        f"{place}: its gradient row has numbers beyond "
                        f"{self.manifest['settings']['store_dtype']}: store rows as float64"
                    )
                waiting.append(GradientRows(part.rows, gradients, part.logps))
                count += len(part.rows)
                if count >= rows_per_shard:
                    self._write(waiting)
                    waiting, count = [], 0
        finally:
            if waiting:
                self._write(waiting)

    def check_tokens(self, tokenized: TokenizedPool) -> None:
        """Raise `ActiveDPOError`, naming a prompt, unless existing rows are of these tokens.

        The same texts may give other tokens: with a chat template that includes today's date, or
        with another version of a library.
        """
        if len(tokenized.sequences) != self.manifest["responses"]:
            raise ActiveDPOError(
                f"{len(tokenized.sequences)} tokenized responses are not the "
                f"{self.manifest['responses']} of the pool of {self.path}"
            )
        hashes = _token_hashes(tokenized)
        if self.manifest.get("tokens") in (None, _digest(hashes)):
            return
        try:
            with safe_open(self.path / _TOKENS, framework="pt") as tensors:
                differing = (tensors.get_tensor("items") != hashes).nonzero().flatten().tolist()
        except (OSError, SafetensorError, RuntimeError):
            differing = []  # the file only serves to name the prompts
        which = f", first that of {self.pool()[differing[0]].id!r}" if differing else ""
        raise ActiveDPOError(
            f"{self.path}: the tokenizer or its chat template gives other tokens than when the "
            f"store was begun, for {len(differing) or 'some'} prompts{which} (does the template "
            "say the date?): the rows would not go together; choose another path"
        )

    def load(self) -> GradientRows:
        """Load all rows into memory, in pool order."""
        with self.rows_on_disk() as rows:
            everything = torch.arange(len(rows))
            logps = torch.cat([self._tensor(shard, "logps") for shard in self._shards()])
            return GradientRows(everything, rows.take(everything), logps[self._order()])

    def rows_on_disk(self) -> StoredRows:
        """Return the gradient rows in pool order, [R, k], read on demand."""
        return StoredRows.open(self._shards(), order=self._order())

    def export(self, path: FilePath) -> None:
        """Write the rows as one float32 matrix `features` [R, k], in pool order, unnormalized."""
        # safetensors metadata is text only
        metadata = {"settings": json.dumps(self.manifest["settings"], sort_keys=True)}
        with self.rows_on_disk() as rows, atomic_path(path) as temporary:
            header = {
                "__metadata__": metadata,
                "features": {
                    "dtype": "F32",
                    "shape": list(rows.shape),
                    "data_offsets": [0, 4 * rows.shape[0] * rows.shape[1]],
                },
            }
            with open(temporary, "wb") as file:
                text = json.dumps(header).encode()
                text += b" " * (-len(text) % 8)  # numbers begin at a multiple of their size
                file.write(struct.pack("<Q", len(text)) + text)
                for _, part in rows.chunks(max(1, _CHUNK_BYTES // rows.row_bytes)):
                    file.write(part.float().numpy())  # type: ignore[arg-type]

    def _order(self) -> torch.Tensor:
        """Return the position of each row of the pool in the concatenated shards."""
        numbers = torch.cat(
            [
                torch.empty(0, dtype=torch.int64),
                *(self._tensor(shard, "rows") for shard in self._shards()),
            ]
        )
        found, order = numbers.sort()
        if not torch.equal(found, torch.arange(self.manifest["responses"])):
            raise ActiveDPOError(
                f"{self.path} does not have every row of its pool just once: build it again"
            )
        return order

    def _shards(self) -> list[Path]:
        return sorted(self.path.glob(_SHARD.format(0).replace("00000", "*")))

    def _tensor(self, shard: Path, name: str) -> torch.Tensor:
        """Return `rows` or `logps` of a shard."""
        try:
            with safe_open(shard, framework="pt") as tensors:
                rows, wanted = tensors.get_tensor("rows"), tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ActiveDPOError(
                f"{shard} cannot be read ({error}): delete it and run again"
            ) from None
        responses = self.manifest["responses"]
        if rows.dtype != torch.int64 or bool(((rows < 0) | (rows >= responses)).any()):
            raise ActiveDPOError(
                f"{shard} has rows that are not in the pool: delete it and run again"
            )
        found: torch.Tensor = wanted
        return found

    def _take_columns(self, pool: PreferencePool) -> None:
        """Write the pool's columns if they differ from those in the store."""
        changed: set[str] = set()
        for old, new in zip(self.pool(), pool, strict=True):
            for name in {**new.extra, **old.extra}:
                # A table has null for a key that a JSON line omits.
                if _text(old.extra.get(name)) != _text(new.extra.get(name)):
                    changed.add(name)
        if changed:
            pool.to_jsonl(self.path / _POOL)
            self.columns_taken = sorted(changed)

    def _write_tokens(self, tokenized: TokenizedPool) -> None:
        hashes = _token_hashes(tokenized)
        with atomic_path(self.path / _TOKENS) as temporary:
            save_file({"items": hashes}, temporary)
        self.manifest = {**self.manifest, "tokens": _digest(hashes)}
        write_atomic(self.path / _MANIFEST, json.dumps(self.manifest, indent=2) + "\n")

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


def _token_hashes(tokenized: TokenizedPool) -> torch.Tensor:
    """Return 64-bit hashes of each item's token ids and response starts, int64 [P]."""
    digests: dict[int, Any] = {}
    for row, sequence in enumerate(tokenized.sequences):
        item = digests.setdefault(tokenized.item_of(row), hashlib.blake2b(digest_size=8))
        ids = [len(sequence.input_ids), sequence.completion_start, *sequence.input_ids]
        item.update(np.asarray(ids, dtype="<i8").tobytes())
    found = b"".join(digest.digest() for digest in digests.values())
    return torch.from_numpy(np.frombuffer(found, dtype="<i8").astype(np.int64))


def _digest(hashes: torch.Tensor) -> str:
    return hashlib.sha256(hashes.numpy().astype("<i8").tobytes()).hexdigest()


def _text(value: Any) -> str:
    """Return a text that JSON values share only if they are equal; any text for non-JSON."""
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return repr(value)  # writing the pool refuses it, naming the column


def _is_unused(folder: Path) -> bool:
    """Return whether a folder is empty, except for files of a process killed while starting it."""
    manifest = Path(_MANIFEST)
    return all(
        path.name.startswith(f".{manifest.stem}-") and path.suffix == manifest.suffix
        for path in folder.iterdir()
    )


def _require_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise `ActiveDPOError` for the first setting that differs.

    The location of a model, adapter or tokenizer does not count if it has a fingerprint.
    """
    before, now = found["settings"], wanted["settings"]
    for name, old, new in _differences(before, now):
        if {f"{name}_fingerprint"} <= before.keys() & now.keys():
            continue
        what = name.removesuffix("_fingerprint")
        if what != name:
            where = (
                f"{now[what]} has changed since"
                if before[what] == now[what]
                else f"{before[what]!r}, not {now[what]!r}"
            )
            raise ActiveDPOError(
                f"{folder} was made with another {what} ({where}): choose another path"
            )
        raise ActiveDPOError(
            f"{folder} was made with {name} = {old!r}, not {new!r}: choose another path"
        )


def _difference(old: PreferencePool, new: PreferencePool) -> str:
    """Return how two pools differ, by their first differing item."""
    for n, (a, b) in enumerate(zip(old, new, strict=False), start=1):
        if a.id != b.id:
            return f"item {n} was {a.id!r}, now {b.id!r}"
        if (a.prompt, a.responses) != (b.prompt, b.responses):
            return f"the texts of item {a.id!r} have changed"
        if own_template_kwargs(a.extra) != own_template_kwargs(b.extra):
            return f"item {a.id!r} has another 'chat_template_kwargs'"
    return f"of {len(old)} prompts, now {len(new)}"


def _differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    # In the order of the settings: chosen settings come before those derived from them.
    for name in dict.fromkeys([*wanted, *found]):
        if found.get(name) != wanted.get(name):
            yield name, found.get(name), wanted.get(name)
