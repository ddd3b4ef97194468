"""`FeatureStore`: a folder of gradient rows, created, opened, and checked when it is read."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError

from activedpo_fast._files import FilePath, atomic_path, write_atomic
from activedpo_fast._locks import locked_folder
from activedpo_fast.distributed.launcher import require_one_process
from activedpo_fast.distributed.pool_parts import PoolProcesses
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.gradient_rows import GradientRows
from activedpo_fast.pool.pool import PreferencePool, as_pool
from activedpo_fast.pool.tokens import TokenizedPool
from activedpo_fast.progress import progress_bar
from activedpo_fast.store.comparing import (
    changed_columns,
    check_store_folder,
    pool_difference,
    require_same_settings,
)
from activedpo_fast.store.filling import KEPT, fill_missing
from activedpo_fast.store.folder import POOL, TOKENS, StoreFolder, new_manifest
from activedpo_fast.store.joining import join_stores
from activedpo_fast.store.manifest import MANIFEST, key_of, read_manifest, write_manifest
from activedpo_fast.store.row_checks import RowChecks
from activedpo_fast.store.row_order import incomplete, row_order
from activedpo_fast.store.rows import StoredRows
from activedpo_fast.store.token_hashes import digest_of, token_hashes

if TYPE_CHECKING:
    import datasets
    import torch.distributed as dist

    from activedpo_fast.gradients.extractor import FeatureExtractor

_CHUNK_BYTES = 2**26  # rows exported at once


class FeatureStore(StoreFolder):
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
        super().__init__(path, manifest)
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
        group: dist.ProcessGroup | None = None,
    ) -> FeatureStore:
        """Create a store at `path`, or reopen an existing one to continue it.

        When it is reopened, the other columns of `pool` are updated in the store: gradient rows do
        not depend on them. (A row's own chat template arguments count as part of its text.)

        Args:
            settings: JSON values that the rows depend on (model, sketch, beta, tokenization).
            skipped: positions of items that DPOTrainer would drop; never candidates.
            dtype: the dtype of the stored rows, rounded to nearest: "float32", "bfloat16" or
                "float64". It counts as a setting, `store_dtype`.
            group: the processes that fill the store together, see `fill`. All call this with the
                same arguments; only the first one reads and writes the folder.

        Raises:
            ActiveDPOError: the folder holds something else, or a store made with other settings or
                of another pool; another process is writing to it; an unknown dtype; several
                processes without a `group`, or other arguments in one of them.
        """
        if group is None:
            require_one_process("FeatureStore.create")
        folder, processes = Path(path), PoolProcesses(group, KEPT)
        made_of = processes.check(lambda: as_pool(pool))
        manifest = processes.check(lambda: new_manifest(made_of, settings, skipped, dtype))
        if processes.size > 1:
            _require_same_manifest(manifest, processes)
        return processes.check(
            lambda: (
                cls(folder, manifest) if processes.rank else cls._begin(folder, made_of, manifest)
            )
        )

    @classmethod
    def _begin(cls, folder: Path, pool: PreferencePool, manifest: dict[str, Any]) -> FeatureStore:
        """Write the files of a store without rows, or reopen the one that is there."""
        check_store_folder(folder, pool)
        with locked_folder(folder):
            if (folder / MANIFEST).exists():
                store = cls.open(folder, complete=False)
                store.remove_temporary_files()
                store._reopen(pool, manifest)
                return store
            # Write the manifest first: it identifies what a killed process leaves as a store.
            store = cls(folder, manifest)
            store.remove_temporary_files()
            write_manifest(folder, manifest)
            write_atomic(folder / POOL, pool.jsonl())
            return store

    def _reopen(self, pool: PreferencePool, manifest: dict[str, Any]) -> None:
        """Compare the store with what it is to hold; write the pool, or its columns if they differ.

        Raises:
            ActiveDPOError: other settings, or another pool.
        """
        begun = (self.path / POOL).exists()  # False if killed while creating the store
        if self.manifest["pool"] != manifest["pool"]:
            how = f" ({pool_difference(self.pool(), pool)})" if begun else ""
            raise ActiveDPOError(
                f"{self.path} holds the rows of another pool{how}: choose another path"
            )
        require_same_settings(self.path, self.manifest["settings"], manifest["settings"])
        self.columns_taken = changed_columns(self.pool(), pool) if begun else []
        if not begun or self.columns_taken or "next_files" in self.manifest:
            self.replace_pool(pool)

    @classmethod
    def open(cls, path: FilePath, *, complete: bool = True) -> FeatureStore:
        """Open the store at `path`; with `complete`, refuse one with missing rows."""
        folder = Path(path)
        store = cls(folder, read_manifest(folder))
        if not complete:
            return store
        missing = len(store.missing_rows())
        if missing or store.partial():
            raise incomplete(folder, store.shards(), missing, store.manifest["responses"])
        if not (folder / POOL).exists():
            raise ActiveDPOError(
                f"{folder / POOL} is gone: run `activedpo features` again with the same options, "
                "which writes it again"
            )
        return store

    def fill(
        self,
        extractor: FeatureExtractor,
        tokenized: TokenizedPool,
        *,
        rows_per_shard: int | None = None,
        show_progress: bool | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Compute and write the missing rows; written rows are kept on interruption.

        A killed process loses at most the rows of one batch. The batches are planned of the whole
        pool, and their size is recorded, so that an interrupted store ends with the same bytes as
        another, as long as memory suffices for it. `rows_per_shard`, by default 512 or 1/128 of a
        large pool, counts when the first rows are computed.

        The processes of a `torch.distributed` group, gloo or NCCL, share the work if all of them
        call `create` and this with it, such as `group=dist.group.WORLD`; `show_progress` should be
        False in all but the first. They take whole batches in turn, and the first one writes: the
        files are those of a single process. Any other number of processes may go on.

        Raises:
            ActiveDPOError: the tokens differ from those of the first rows or of other processes, or
                the extractor does (its sketch, β, precision or weights); another process is writing
                to the store; several processes without a `group`; errors of the extractor, in any
                process.
        """
        if group is None:
            require_one_process("FeatureStore.fill")
        processes = PoolProcesses(group, KEPT)
        with processes.in_first(lambda: locked_folder(self.path)):
            processes.check(lambda: self.check_tokens(tokenized))
            fill_missing(
                self,
                extractor,
                tokenized,
                processes,
                rows_per_shard=rows_per_shard,
                show_progress=show_progress,
            )

    @classmethod
    def join(
        cls, path: FilePath, stores: Sequence[FilePath], *, show_progress: bool | None = False
    ) -> FeatureStore:
        """Write a store at `path` with the rows of several stores of parts of a pool, and open it.

        Its pool has the items of all, in the order in which the stores are given. An item that is
        in several is kept once, if everything about it is the same in them. Rows are copied, and
        compared with their checksums; `path` appears when everything is written.

        Raises:
            ActiveDPOError: `path` is not a new or empty folder; a store is incomplete or damaged;
                two stores differ in a setting, which is named, or in an item that both have.

        Examples:
            >>> from activedpo_fast import FeatureExtractor, FeatureStore, Sketch
            >>> extractor = FeatureExtractor(model, Sketch(dim=1024))
            >>> for name, part in (("first", pool[:2]), ("second", pool[2:])):
            ...     store = FeatureStore.create(name, part, {"model": "my-model"}, skipped=[])
            ...     store.fill(extractor, selector.tokenize(part))
            >>> store = FeatureStore.join("both", ["first", "second"])
            >>> store.pool()
            PreferencePool(4 prompts, 10 responses)
        """
        if not stores:
            raise ActiveDPOError("there are no stores to join")
        join_stores(Path(path), [cls.open(store) for store in stores], show_progress=show_progress)
        return cls.open(path)

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
            before = self.tokens()
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
            return GradientRows(everything, rows.take(everything), self.logps())

    def logps(self) -> torch.Tensor:
        """Return log π(y|x) of every response, float64 [R], in pool order."""
        shards = self.shards()
        order = row_order(self.path, shards, self.manifest["responses"])
        return torch.from_numpy(np.concatenate([shard.logps for shard in shards])[order])

    def non_finite(self) -> list[int]:
        """Return the positions of items with a response that `skip_non_finite` has skipped."""
        offsets, found = self.pool().response_offsets, set[int]()
        for shard in self.shards():
            bad = torch.from_numpy(shard.rows[np.isnan(shard.logps)])
            found.update((torch.searchsorted(offsets, bad, right=True) - 1).tolist())
        return sorted(found)

    def rows_on_disk(self) -> StoredRows:
        """Return the gradient rows in pool order, [R, k], read on demand.

        Each row is compared with its checksum the first time that it is read.
        """
        shards = self.shards()
        order = row_order(self.path, shards, self.manifest["responses"])
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
            raise ActiveDPOError(f"{self.path / POOL} has another number of responses")
        self.read(TOKENS)
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


def _require_same_manifest(manifest: dict[str, Any], processes: PoolProcesses) -> None:
    """Raise `ActiveDPOError`, on all processes, unless all would make the same store."""
    settings = manifest["settings"]
    processes.require_same({"set of settings": repr(list(settings))})
    given = {
        name: repr(value)
        for name, value in settings.items()
        if f"{name}_fingerprint" not in settings  # a location
    }
    skipped = repr(manifest["skipped"])
    processes.require_same({"pool": manifest["pool"], **given, "list of skipped items": skipped})
