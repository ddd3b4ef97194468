"""Gradient rows on disk: written atomically in shards as they are computed, and resumable."""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from activedpo_fast._files import (
    FilePath,
    atomic_path,
    checksum,
    is_temporary,
    reason_of,
    write_atomic,
)
from activedpo_fast._locks import LOCK, locked_folder
from activedpo_fast.distributed.launcher import require_one_process
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.extractor import FeatureExtractor, GradientRows
from activedpo_fast.pool.pool import PreferencePool, as_pool
from activedpo_fast.pool.template import own_template_kwargs
from activedpo_fast.pool.tokens import TokenizedPool
from activedpo_fast.progress import progress_bar
from activedpo_fast.store.filling import SHARD, partial_shards, write_rows
from activedpo_fast.store.manifest import (
    FORMAT,
    MANIFEST,
    key_of,
    read_manifest,
    require_same_settings,
    write_manifest,
)
from activedpo_fast.store.rows import RowChecks, StoredRows
from activedpo_fast.store.shards import DamagedShard, Shard
from activedpo_fast.store.token_hashes import digest_of, token_hashes

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

_POOL = "pool.jsonl"
_TOKENS = "tokens.safetensors"
_TEMPORARY = ("manifest", "pool", "tokens")  # files that are renamed into place
_SHARD_ROWS = 512  # for a small pool
_SHARDS = 128  # for a large pool; all of them are open while rows are read from disk
_CHUNK_BYTES = 2**26  # rows exported at once

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class FeatureStore:
    """A folder with the gradient rows of one pool, one model and one sketch.

    `manifest.json` identifies a folder as a store. It holds the settings and, once the first rows
    are computed, a hash of all tokens and how batches are planned. `pool.jsonl` is the pool;
    `tokens.safetensors` has a hash of each item's tokens, int64 [P]; `rows-*.safetensors` are
    shards with `rows` (int64), `gradients` (in the store's dtype) and `logps`. Every file has a
    checksum, which is compared when it is read; every row has its own. Files are renamed into place
    when complete, and a shard that is being filled, `rows-*.partial`, keeps the rows that it has:
    a killed run is continued, and loses no more than a batch. One process at a time writes.

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
                of another pool; another process is writing to it; an unknown dtype; several
                processes.
        """
        require_one_process("FeatureStore.create")
        if dtype not in _DTYPES:
            raise ActiveDPOError(f"rows are stored as {' or '.join(_DTYPES)}, not {dtype!r}")
        folder = Path(path)
        pool = as_pool(pool)
        content = pool.jsonl()
        manifest = {
            "format": FORMAT,
            "pool": pool.fingerprint(),
            "responses": pool.n_responses,
            "skipped": skipped,
            "settings": json.loads(json.dumps({**settings, "store_dtype": dtype})),
            "files": {_POOL: checksum(content)},
        }
        check_store_folder(folder, pool)
        with locked_folder(folder):
            if (folder / MANIFEST).exists():
                store = cls.open(folder, complete=False)
                store._remove_temporary_files()
                store._reopen(pool, manifest)
                return store
            # Write the manifest first: it identifies what a killed process leaves as a store.
            store = cls(folder, manifest)
            store._remove_temporary_files()
            write_manifest(folder, manifest)
            write_atomic(folder / _POOL, content)
            return store

    def _reopen(self, pool: PreferencePool, manifest: dict[str, Any]) -> None:
        """Compare the store with what it is to hold; write the pool, or its columns if they differ.

        Raises:
            ActiveDPOError: other settings, or another pool.
        """
        begun = (self.path / _POOL).exists()  # False if killed while creating the store
        if self.manifest["pool"] != manifest["pool"]:
            how = f" ({_difference(self.pool(), pool)})" if begun else ""
            raise ActiveDPOError(
                f"{self.path} holds the rows of another pool{how}: choose another path"
            )
        require_same_settings(self.path, self.manifest["settings"], manifest["settings"])
        if begun:
            self._take_columns(pool)
        else:
            self._replace_pool(pool)

    @classmethod
    def open(cls, path: FilePath, *, complete: bool = True) -> FeatureStore:
        """Open the store at `path`; with `complete`, refuse one with missing rows."""
        folder = Path(path)
        store = cls(folder, read_manifest(folder))
        if not complete:
            return store
        missing = len(store.missing_rows())
        if missing or store.partial():
            raise store._incomplete(missing)
        if not (folder / _POOL).exists():
            raise ActiveDPOError(
                f"{folder / _POOL} is gone: run `activedpo features` again with the same options, "
                "which writes it again"
            )
        return store

    def pool(self) -> PreferencePool:
        """Return the pool of these rows."""
        self._read(_POOL)  # checks it
        pool = PreferencePool.from_jsonl(self.path / _POOL)
        if pool.fingerprint() != self.manifest["pool"]:
            raise ActiveDPOError(f"{self.path / _POOL} has been changed since the rows were taken")
        return pool

    def missing_rows(self) -> list[int]:
        """Return the responses without a gradient row yet, as row numbers in pool order."""
        there = np.zeros(self.manifest["responses"], dtype=bool)
        for shard in self._shards():
            there[shard.rows] = True
        for rows, _ in self.partial().values():
            there[rows] = True
        return np.flatnonzero(~there).tolist()

    def is_whole(self) -> bool:
        """Return whether all rows are in finished shards, and no file of `fill` is gone."""
        tokens = (self.path / _TOKENS).exists()
        return tokens and not self.missing_rows() and not self.partial()

    def fill(
        self,
        extractor: FeatureExtractor,
        tokenized: TokenizedPool,
        *,
        rows_per_shard: int | None = None,
        show_progress: bool | None = None,
    ) -> None:
        """Compute and write the missing rows; written rows are kept on interruption.

        A killed process loses at most the rows of one batch. The batches are planned of the whole
        pool, and their size is recorded, so that an interrupted store ends with the same bytes as
        another, as long as memory suffices for it. `rows_per_shard`, by default 512 or 1/128 of a
        large pool, counts when the first rows are computed.

        Raises:
            ActiveDPOError: the tokens differ from those of the first rows, or the extractor does
                (its sketch, β, precision or weights); another process is writing to the store;
                several processes; errors of the extractor.
        """
        require_one_process("FeatureStore.fill")
        with locked_folder(self.path):
            self.check_tokens(tokenized)
            missing = self.missing_rows()
            if missing:
                filling = self._begin(extractor, tokenized, rows_per_shard)
                parts = extractor.iter_gradients(
                    tokenized,
                    missing,
                    max_tokens_per_batch=filling["max_tokens_per_batch"],
                    show_progress=show_progress,
                )
                self._write(self._as_stored(parts, tokenized), len(missing))
            elif self.partial():  # killed at the very end
                self._write((), 0)
                for path in self.partial():  # all its rows are in another shard
                    path.unlink()
            if not (self.path / _TOKENS).exists():  # it was deleted since
                self._write_tokens(tokenized, self.manifest["filling"])

    def _write(self, parts: Iterable[GradientRows], expected: int) -> None:
        if expected < self.manifest["responses"]:
            done = self.manifest["responses"] - expected
            logger.warning("continuing %s: %d rows already exist", self.path, done)
        write_rows(
            self.path,
            parts,
            expected,
            key=key_of(self.manifest),
            rows_per_shard=self.manifest["filling"]["rows_per_shard"],
            dtype=self._dtype,
        )

    @property
    def _dtype(self) -> torch.dtype:
        name = self.manifest["settings"]["store_dtype"]
        if name not in _DTYPES:
            raise ActiveDPOError(
                f"{self.path} has rows of the dtype {name!r}, not one of {', '.join(_DTYPES)}"
            )
        return _DTYPES[name]

    def _begin(
        self, extractor: FeatureExtractor, tokenized: TokenizedPool, rows_per_shard: int | None
    ) -> dict[str, Any]:
        """Record how rows are computed, or compare it with what is recorded; return it."""
        now = json.loads(json.dumps(extractor.identity()))
        layout = extractor.check(tokenized).name
        filling = self.manifest.get("filling")
        if filling is None:
            default = max(_SHARD_ROWS, self.manifest["responses"] // _SHARDS)
            filling = {
                "rows_per_shard": rows_per_shard or default,
                "max_tokens_per_batch": extractor.tokens_per_batch(tokenized),
                "layout": layout,
                "extractor": now,
            }
        else:
            require_same_settings(self.path, filling["extractor"], now, "filled")
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
                    self.path,
                )
            filling = used
        if "tokens" not in self.manifest or filling != self.manifest.get("filling"):
            self._write_tokens(tokenized, filling)
        return filling

    def _as_stored(
        self, parts: Iterable[GradientRows], tokenized: TokenizedPool
    ) -> Iterator[GradientRows]:
        """Yield rows in the store's dtype.

        Raises:
            ActiveDPOError: a number is beyond that dtype.
        """
        for part in parts:
            gradients = part.gradients.to(self._dtype)
            fits = gradients.isfinite().all(dim=1)
            if not fits.all():
                raise ActiveDPOError(
                    f"{tokenized.place(int(part.rows[~fits][0]))}: its gradient row has numbers "
                    f"beyond {self.manifest['settings']['store_dtype']}: store rows as float64"
                )
            yield GradientRows(part.rows, gradients, part.logps)

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
        hashes = token_hashes(tokenized)
        if self.manifest.get("tokens") in (None, digest_of(hashes)):
            return
        try:
            before = load(self._read(_TOKENS))["items"]
            differing = (before != hashes).nonzero().flatten().tolist()
        except (ActiveDPOError, LookupError, SafetensorError, RuntimeError):
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
            shards = self._shards()
            logps = np.concatenate([shard.logps for shard in shards])[self._order(shards)]
            return GradientRows(everything, rows.take(everything), torch.from_numpy(logps))

    def non_finite(self) -> list[int]:
        """Return the positions of items with a response that `skip_non_finite` has skipped."""
        offsets, found = self.pool().response_offsets, set[int]()
        for shard in self._shards():
            bad = torch.from_numpy(shard.rows[np.isnan(shard.logps)])
            found.update((torch.searchsorted(offsets, bad, right=True) - 1).tolist())
        return sorted(found)

    def rows_on_disk(self) -> StoredRows:
        """Return the gradient rows in pool order, [R, k], read on demand.

        Each row is compared with its checksum the first time that it is read.
        """
        shards = self._shards()
        order = self._order(shards)
        key = key_of(self.manifest)
        return StoredRows.open(
            [shard.path for shard in shards],
            order=torch.from_numpy(order),
            checks=RowChecks.joined([shard.checks(key) for shard in shards]),
        )

    def export(self, path: FilePath, *, show_progress: bool | None = False) -> None:
        """Write the rows as one float32 matrix `features` [R, k], in pool order, unnormalized."""
        if Path(path).suffix != ".safetensors":
            raise ActiveDPOError(f"{path}: the file of an export is a .safetensors file")
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
                with progress_bar(
                    show_progress, total=len(rows), desc="exporting", unit="row"
                ) as bar:
                    for _, part in rows.chunks(max(1, _CHUNK_BYTES // rows.row_bytes)):
                        file.write(part.float().numpy())  # type: ignore[arg-type]
                        bar.update(len(part))

    def verify(self, *, show_progress: bool | None = False) -> str:
        """Read everything, compare it with its checksums, and return what was found, in a line.

        Raises:
            ActiveDPOError: a file is damaged or gone, a row is missing or not finite; the message
                names the first.
        """
        complete = FeatureStore.open(self.path)
        if complete.pool().n_responses != self.manifest["responses"]:
            raise ActiveDPOError(f"{self.path / _POOL} has another number of responses")
        self._read(_TOKENS)
        zero = 0
        with complete.rows_on_disk() as rows:
            at_once = max(1, _CHUNK_BYTES // rows.row_bytes)
            with progress_bar(
                show_progress, total=len(rows), desc="verifying", unit="row"
            ) as progress:
                for start, part in rows.chunks(at_once):
                    bad = (~part.isfinite().all(dim=1)).nonzero().flatten().tolist()
                    if bad:
                        raise ActiveDPOError(f"row {start + bad[0]} of {self.path} is not finite")
                    zero += int((part == 0).all(dim=1).sum())
                    progress.update(len(part))
        zeros = f", {zero} of them all zeros" if zero else ""
        return f"all files of {self.path} are as written: {len(rows)} rows{zeros}"

    def _order(self, shards: list[Shard]) -> np.ndarray:
        """Return the position of each row of the pool in the concatenated shards, int64 [R].

        A row that stands twice counts once, if both are equal.
        """
        numbers = np.concatenate([np.empty(0, np.int64), *(shard.rows for shard in shards)])
        found, order = np.unique(numbers, return_index=True)
        if len(found) != self.manifest["responses"]:
            raise self._incomplete(self.manifest["responses"] - len(found))
        if len(numbers) > len(found):
            self._check_repeated(shards, numbers, order)
        return order

    def _incomplete(self, missing: int) -> ActiveDPOError:
        copies, first = [], dict[bytes, Path]()
        for shard in self._shards():
            known = first.setdefault(shard.checksums.tobytes(), shard.path)
            if known != shard.path:
                copies.append(f"; {shard.path.name} is a copy of {known.name}")
        return ActiveDPOError(
            f"{self.path} is incomplete, {missing} of {self.manifest['responses']} rows are "
            "missing: run `activedpo features` again with the same options to finish it"
            + "".join(copies)
        )

    def _check_repeated(self, shards: list[Shard], numbers: np.ndarray, order: np.ndarray) -> None:
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

    def _shards(self) -> list[Shard]:
        """Return the shards by name, checked as far as `Shard.open` does."""
        paths = sorted(self.path.glob(SHARD.format(0).replace("00000", "*")))
        if not paths:
            return []
        if not self._begun:
            raise DamagedShard(paths[0], "the store has no rows yet")
        key, found = key_of(self.manifest), list[Shard]()
        for path in paths:
            dim = found[0].layout.dim if found else None
            shard = Shard.open(path, key, dim=dim, dtype=self._dtype)
            if ((shard.rows < 0) | (shard.rows >= self.manifest["responses"])).any():
                raise DamagedShard(path, "it has rows that are not in the pool")
            found.append(shard)
        return found

    def partial(self) -> dict[Path, tuple[list[int], int]]:
        """Return the shards that are being filled; see `partial_shards`."""
        return partial_shards(self.path, key_of(self.manifest)) if self._begun else {}

    @property
    def _begun(self) -> bool:
        return "tokens" in self.manifest

    def _read(self, name: str) -> bytes:
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

    def _remove_temporary_files(self) -> None:
        """Remove what a killed process left; only while the folder is locked."""
        for path in self.temporary_files():
            path.unlink(missing_ok=True)

    def temporary_files(self) -> list[Path]:
        """Return the files that a killed process left and that hold no rows."""
        return sorted(path for path in self.path.iterdir() if is_temporary(path.name, *_TEMPORARY))

    def _take_columns(self, pool: PreferencePool) -> None:
        """Write the pool's columns if they differ from those in the store."""
        changed: set[str] = set()
        for old, new in zip(self.pool(), pool, strict=True):
            for name in {**new.extra, **old.extra}:
                # A table has null for a key that a JSON line omits.
                if _text(old.extra.get(name)) != _text(new.extra.get(name)):
                    changed.add(name)
        if changed:
            self._replace_pool(pool)
            self.columns_taken = sorted(changed)
        elif "next_files" in self.manifest:
            self._replace_pool(pool)

    def _replace_pool(self, pool: PreferencePool) -> None:
        """Write the pool; at no moment does the manifest refuse what is there."""
        content = pool.jsonl()
        final = {**self.manifest, "files": {**self.manifest["files"], _POOL: checksum(content)}}
        final.pop("next_files", None)
        if final["files"] != self.manifest["files"]:
            write_manifest(self.path, {**self.manifest, "next_files": {_POOL: checksum(content)}})
        write_atomic(self.path / _POOL, content)
        if final != self.manifest or (self.manifest.get("next_files")):
            write_manifest(self.path, final)
        self.manifest = final

    def _write_tokens(self, tokenized: TokenizedPool, filling: dict[str, Any]) -> None:
        hashes = token_hashes(tokenized)
        content = save({"items": hashes})
        write_atomic(self.path / _TOKENS, content)
        self.manifest = {
            **self.manifest,
            "files": {**self.manifest["files"], _TOKENS: checksum(content)},
            "tokens": digest_of(hashes),
            "filling": filling,
        }
        write_manifest(self.path, self.manifest)


def _text(value: Any) -> str:
    """Return a text that JSON values share only if they are equal; any text for non-JSON."""
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return repr(value)  # writing the pool refuses it, naming the column


def check_store_folder(folder: Path, pool: PreferencePool) -> None:
    """Raise `ActiveDPOError` if a folder holds something else than a store, or one begun."""
    if not (folder / MANIFEST).exists() and not _is_unused(folder, pool.jsonl()):
        raise ActiveDPOError(f"{folder} exists and is not a feature store: choose another path")


def _is_unused(folder: Path, pool: bytes) -> bool:
    """Return whether there is no folder, or only what a process left that began a store in it."""
    if not os.path.exists(folder):
        return True
    if not folder.is_dir():
        return False
    for path in folder.iterdir():
        if path.name == _POOL and path.is_file() and path.read_bytes() == pool:
            continue
        if path.name != LOCK and not is_temporary(path.name, *_TEMPORARY):
            return False
    return True


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
