"""Shards of a feature store: safetensors files of gradient rows, every byte of them checked.

A shard has `rows` (int64 [n], numbers in the pool), `logps` (float64 [n]), `checksums` (uint8
[n, 16]), `head` (uint8 [16]) and `gradients` ([n, k]), in this order, after a header that follows
from n, k and the dtype. The checksum of a row is the blake2b hash of its number, its log-prob and
its gradient; `head` is that of everything before it. Both are keyed by the store, so that a shard
of another store is not taken for one of this.

A shard is filled in place under another name, `rows-00000.partial`, and renamed when it is full. A
row whose checksum matches was written whole, whatever ended the process.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from activedpo_fast._files import reason_of, sync
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.store.row_checks import RowChecks, row_checksum

SUM = 16  # bytes of a checksum
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64"}
_READ_BYTES = 2**24
_HEADER_LIMIT = 10_000  # bytes; ours have a few hundred


class DamagedShard(ActiveDPOError):
    """A shard that is not what was written; its rows can be computed again."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(
            f"{path} is damaged or of another store ({why}): delete it and run `activedpo "
            "features` again with the same options, which computes only its rows again"
        )


@dataclass(frozen=True)
class ShardLayout:
    """Where the tensors of a shard of n rows of k numbers are, in bytes from its beginning."""

    n: int
    dim: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return self.dim * self.dtype.itemsize

    @property
    def header(self) -> bytes:
        begin, entries = 0, {}
        for name, dtype, shape, size in (
            ("rows", "I64", [self.n], 8 * self.n),
            ("logps", "F64", [self.n], 8 * self.n),
            ("checksums", "U8", [self.n, SUM], SUM * self.n),
            ("head", "U8", [SUM], SUM),
            ("gradients", _NAMES[self.dtype], [self.n, self.dim], self.row_bytes * self.n),
        ):
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}
            begin += size
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)  # numbers begin at a multiple of their size
        return struct.pack("<Q", len(text)) + text

    @property
    def rows(self) -> int:
        return len(self.header)

    @property
    def logps(self) -> int:
        return self.rows + 8 * self.n

    @property
    def checksums(self) -> int:
        return self.logps + 8 * self.n

    @property
    def head(self) -> int:
        return self.checksums + SUM * self.n

    @property
    def gradients(self) -> int:
        return self.head + SUM

    @property
    def size(self) -> int:
        return self.gradients + self.row_bytes * self.n


@dataclass(frozen=True)
class Shard:
    """What a shard has beside its gradients; see the module."""

    path: Path
    layout: ShardLayout
    rows: np.ndarray  # int64 [n]
    logps: np.ndarray  # float64 [n]
    checksums: np.ndarray  # uint8 [n, SUM]

    @classmethod
    def open(cls, path: Path, key: bytes, *, dim: int | None, dtype: torch.dtype) -> Shard:
        """Read and check everything except the gradients, which are checked when they are read.

        Args:
            key: of the store. dim: k; None for that of the file.

        Raises:
            DamagedShard: anything differs from what was written.
            ActiveDPOError: the file cannot be read.
        """
        try:
            with open(path, "rb") as file:
                descriptor = file.fileno()
                layout = _layout(lambda count, at: os.pread(descriptor, count, at))
                size = os.fstat(descriptor).st_size
                if layout is None or layout.size != size:
                    raise DamagedShard(path, f"its header does not fit its {size} bytes")
                if layout.dtype != dtype or (dim or layout.dim) != layout.dim:
                    raise DamagedShard(path, "its rows are not like those of the store")
                content = file.read(layout.gradients)
        except OSError as error:
            raise ActiveDPOError(f"{path} cannot be read: {reason_of(error)}") from None
        if len(content) < layout.gradients:
            raise DamagedShard(path, "it was cut short")
        if not content.startswith(layout.header):
            raise DamagedShard(path, "its header has changed")
        if _head_sum(content[: layout.head], key) != content[layout.head :]:
            raise DamagedShard(path, "the checksum of its row numbers and log-probs does not match")
        return cls(path, layout, *_head_arrays(content, layout))

    def checks(self, key: bytes) -> RowChecks:
        return RowChecks(_prefixes(self.rows, self.logps), self.checksums, key)


class PartialShard:
    """A shard that is being filled, row after row.

    Args:
        path: an existing file, which is gone on with, or a new one.
        key: of the store.
        layout: of a new shard; None for one that was begun.

    Attributes:
        rows: the numbers of the rows that it has.
    """

    def __init__(self, path: Path, key: bytes, layout: ShardLayout | None = None) -> None:
        self.path = path
        self._key = key
        flags = os.O_RDWR | (0 if layout is None else os.O_CREAT | os.O_TRUNC)
        self._descriptor = os.open(path, flags | os.O_NOFOLLOW, 0o666)
        self.rows: list[int] = []
        try:
            if layout is not None:
                self.layout = layout
                self._make_room(layout.size)
                self._put(layout.header, 0)
            else:
                self.layout, self.rows = self._found()
        except BaseException:
            self.close()
            raise

    @classmethod
    def contents(cls, path: Path, key: bytes) -> tuple[list[int], int] | None:
        """Return the rows that a shard has, and its room for more; None if it was not begun."""
        shard = cls.__new__(cls)
        shard.path, shard._key = path, key
        try:
            shard._descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError as error:
            raise ActiveDPOError(f"{path} cannot be read: {reason_of(error)}") from None
        with shard:
            try:
                shard.layout, shard.rows = shard._found()
            except DamagedShard:
                return None
            return shard.rows, shard.room

    @property
    def count(self) -> int:
        return len(self.rows)

    @property
    def room(self) -> int:
        return self.layout.n - self.count

    def append(self, rows: Tensor, gradients: Tensor, logps: Tensor) -> None:
        """Write rows: int64 [m], [m, k] in the shard's dtype, float64 [m]; m is up to `room`."""
        numbers, probs = rows.numpy(), logps.double().numpy()
        content = gradients.contiguous().view(torch.uint8).numpy()
        prefixes = _prefixes(numbers, probs)
        sums = b"".join(
            row_checksum(self._key, prefix, row)
            for prefix, row in zip(prefixes, content, strict=True)
        )
        at, layout = self.count, self.layout
        self._put(content.tobytes(), layout.gradients + layout.row_bytes * at)
        self._put(probs.astype("<f8").tobytes(), layout.logps + 8 * at)
        self._put(numbers.astype("<i8").tobytes(), layout.rows + 8 * at)
        self._put(sums, layout.checksums + SUM * at)
        self.rows += numbers.tolist()

    def finish(self, path: Path) -> None:
        """Rename the full shard to `path`, after it is stored."""
        assert self.room == 0
        head = os.pread(self._descriptor, self.layout.head, 0)
        self._put(_head_sum(head, self._key), self.layout.head)
        os.fsync(self._descriptor)
        self.close()
        self.path.rename(path)
        sync(path.parent)

    def __enter__(self) -> PartialShard:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _make_room(self, size: int) -> None:
        try:
            os.ftruncate(self._descriptor, size)
        except OSError as error:
            raise ActiveDPOError(f"{self.path} cannot be written: {reason_of(error)}") from None

    def _put(self, content: bytes, offset: int) -> None:
        view = memoryview(content)
        while view:
            try:
                written = os.pwrite(self._descriptor, view, offset)
            except OSError as error:
                raise ActiveDPOError(f"{self.path} cannot be written: {reason_of(error)}") from None
            view, offset = view[written:], offset + written

    def _found(self) -> tuple[ShardLayout, list[int]]:
        """Return the layout of the file, and the numbers of its rows up to the first not whole.

        Raises:
            DamagedShard: it was not begun.
        """
        size = os.fstat(self._descriptor).st_size
        layout = _layout(lambda count, at: os.pread(self._descriptor, count, at))
        if layout is None or layout.size != size:
            raise DamagedShard(self.path, "it was not begun")
        content = os.pread(self._descriptor, layout.gradients, 0)
        if not content.startswith(layout.header):
            raise DamagedShard(self.path, "it was not begun")
        rows, logps, checksums = _head_arrays(content, layout)
        prefixes = _prefixes(rows, logps)
        for n, gradient in enumerate(self._gradients(layout)):
            if row_checksum(self._key, prefixes[n], gradient) != checksums[n].tobytes():
                return layout, rows[:n].tolist()
        return layout, rows.tolist()

    def _gradients(self, layout: ShardLayout) -> Iterator[bytes]:
        size = layout.row_bytes
        at_once = max(1, _READ_BYTES // size)
        for start in range(0, layout.n, at_once):
            count = min(at_once, layout.n - start)
            part = os.pread(self._descriptor, count * size, layout.gradients + start * size)
            yield from (part[at : at + size] for at in range(0, len(part), size))


def _layout(read: Callable[[int, int], bytes]) -> ShardLayout | None:
    """Return the layout that a header claims; None if it cannot be one. It is not trusted yet.

    Args:
        read: returns up to so many bytes from an offset of the file on.
    """
    length = read(8, 0)
    (count,) = struct.unpack("<Q", length) if len(length) == 8 else (0,)
    if not 0 < count < _HEADER_LIMIT:
        return None
    try:
        entry = json.loads(read(count, 8))["gradients"]
        n, dim = entry["shape"]
        name = entry["dtype"]
    except (ValueError, LookupError, TypeError):
        return None
    dtype = next((known for known, of in _NAMES.items() if of == name), None)
    if dtype is None or not all(type(number) is int and 0 < number < 2**40 for number in (n, dim)):
        return None
    return ShardLayout(n, dim, dtype)


def _head_arrays(content: bytes, layout: ShardLayout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n = layout.n
    return (
        np.frombuffer(content, "<i8", n, layout.rows).astype(np.int64),
        np.frombuffer(content, "<f8", n, layout.logps).astype(np.float64),
        np.frombuffer(content, np.uint8, SUM * n, layout.checksums).reshape(n, SUM),
    )


def _head_sum(content: bytes, key: bytes) -> bytes:
    return hashlib.blake2b(content, key=key, digest_size=SUM).digest()


def _prefixes(rows: np.ndarray, logps: np.ndarray) -> np.ndarray:
    """Return what precedes the gradients in the hashed bytes of rows, uint8 [n, 16]."""
    parts = [rows.astype("<i8"), logps.astype("<f8")]
    return np.concatenate([part.view(np.uint8).reshape(-1, 8) for part in parts], axis=1)
