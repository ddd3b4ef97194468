"""Gradient rows that stay on disk and are read on demand."""

from __future__ import annotations

import os
import stat
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from activedpo_fast._files import FilePath
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.store.row_checks import RowChecks
from activedpo_fast.store.safetensors_layout import MatrixLayout, dtype_name, read_layout

_BUFFERS_PER_READ = 1024  # IOV_MAX of Linux and macOS
_VERIFIED_AT_ONCE = 2**26  # bytes; few enough that the system still has them when C++ reads them
_ROWS_AT_ONCE = 2**16  # sorted and read together; bounds the bookkeeping for short rows


class StoredRows:
    """A matrix [R, k] in safetensors files, whose rows are only in memory when requested.

    Rows are read with `preadv` into fresh tensors, not mapped: mapped pages would count as resident
    memory. Reading is thread-safe and, as no file position is used, safe after a fork.

    Created by `open`. The files stay open until this object and all objects made from it by
    `select` are closed or garbage-collected.

    Attributes:
        shape: (R, k).
        dtype: float16, bfloat16, float32 or float64.
        device: always the CPU.
        row_bytes: bytes per row; nbytes: of all rows.
        file_of_row: int32 [R], which of `descriptors` has the row.
        offset_of_row: int64 [R], the byte offset of the row in that file. `descriptors` and these
            two stay the same tensors, so that C++ can hold their addresses.
    """

    ndim = 2
    device = torch.device("cpu")

    def __init__(
        self,
        files: _Files,
        file_of_row: Tensor,
        offset_of_row: Tensor,
        dim: int,
        dtype: torch.dtype,
        checks: RowChecks | None = None,
    ) -> None:
        self._files: _Files | None = files
        self._checks = checks
        self._descriptors = torch.tensor(files.descriptors, dtype=torch.int32)
        self.file_of_row = file_of_row
        self.offset_of_row = offset_of_row
        self.shape = (len(file_of_row), dim)
        self.dtype = dtype
        self.row_bytes = dim * dtype.itemsize

    @classmethod
    def open(
        cls,
        paths: Sequence[FilePath],
        tensor: str = "gradients",
        order: Tensor | None = None,
        checks: RowChecks | None = None,
    ) -> StoredRows:
        """Open the rows of the matrices called `tensor` in safetensors files.

        Args:
            paths: one or more; all of their matrices have the same k and dtype.
            order: int64 [R], the position of each row in the concatenated files; default: the order
                in the files.
            checks: of the rows in the concatenated files; None if there are none.

        Raises:
            ActiveDPOError: a file cannot be read, is not a complete safetensors file, has no such
                floating-point matrix, or one with another k or dtype; row numbers do not fit.
        """
        files = _Files()
        try:
            layouts = [files.open(Path(path)).layout(tensor) for path in paths]
        except BaseException:
            files.close()
            raise
        if not layouts:
            raise ActiveDPOError("there are no files to read rows from")
        first = layouts[0]
        for path, layout in zip(files.paths, layouts, strict=True):
            if (layout.dim, layout.dtype) != (first.dim, first.dtype):
                raise ActiveDPOError(
                    f"{path} has rows of {layout.dim} {dtype_name(layout.dtype)} numbers, "
                    f"{files.paths[0]} of {first.dim} {dtype_name(first.dtype)}"
                )
        counts = torch.tensor([layout.rows for layout in layouts])
        row_bytes = first.dim * first.dtype.itemsize
        rows = cls(
            files,
            torch.repeat_interleave(torch.arange(len(layouts), dtype=torch.int32), counts),
            torch.cat([layout.begin + row_bytes * torch.arange(layout.rows) for layout in layouts]),
            first.dim,
            first.dtype,
            checks,
        )
        return rows if order is None else rows.select(order)

    def __len__(self) -> int:
        return self.shape[0]

    def is_floating_point(self) -> bool:
        return True

    @property
    def nbytes(self) -> int:
        return len(self) * self.row_bytes

    @property
    def descriptors(self) -> Tensor:
        """Open file descriptors, int32 [n_files]; valid while this object is open and alive."""
        self._open_files()
        return self._descriptors

    def take(self, ids: Tensor) -> Tensor:
        """Return the rows numbered `ids`, int64 [m], in that order: [m, k] in the stored dtype.

        Raises:
            ActiveDPOError: a number that is not a row; a file that is unreadable or truncated; a
                row that differs from its checksum.
        """
        files = self._open_files()
        numbers = self._checked(ids)
        taken = torch.empty(len(numbers), self.shape[1], dtype=self.dtype)
        for start in range(0, len(numbers), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            self._read(files, numbers[part], taken[part])
            self._check(files, numbers[part], taken[part])
        return taken

    def verify(self, ids: Tensor) -> None:
        """Compare rows with their checksums unless that has been done, for readers in C++.

        Raises:
            ActiveDPOError: as `take`.
        """
        if self._checks is None:
            return
        unread = torch.from_numpy(self._checks.unread(self._checked(ids)))
        for part in unread.split(max(1, _VERIFIED_AT_ONCE // self.row_bytes)):
            self.take(part)

    def chunks(self, rows_per_chunk: int) -> Iterator[tuple[int, Tensor]]:
        """Yield all rows in order, up to `rows_per_chunk` at a time: (first number, [m, k])."""
        if rows_per_chunk < 1:
            raise ActiveDPOError(f"rows_per_chunk must be 1 or more, not {rows_per_chunk}")
        for start in range(0, len(self), rows_per_chunk):
            yield start, self.take(torch.arange(start, min(start + rows_per_chunk, len(self))))

    def select(self, ids: Tensor) -> StoredRows:
        """Return the rows numbered `ids`, int64 [m], as stored rows of the same open files."""
        numbers = torch.from_numpy(self._checked(ids))
        return StoredRows(
            self._open_files(),
            self.file_of_row[numbers],
            self.offset_of_row[numbers],
            self.shape[1],
            self.dtype,
            None if self._checks is None else self._checks.select(numbers.numpy()),
        )

    def close(self) -> None:
        """Release the files; may be called more than once."""
        self._files = None

    def __enter__(self) -> StoredRows:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("StoredRows cannot be pickled or copied: open the files again instead")

    def __repr__(self) -> str:
        return f"StoredRows(shape={self.shape}, dtype={self.dtype})"

    def _open_files(self) -> _Files:
        if self._files is None:
            raise ActiveDPOError("these stored rows have been closed")
        return self._files

    def _checked(self, ids: Tensor) -> np.ndarray:
        if ids.ndim != 1 or ids.dtype != torch.int64:
            raise ActiveDPOError(
                f"row numbers must be int64 [m], not {ids.dtype} {list(ids.shape)}"
            )
        numbers = ids.cpu().numpy()
        outside = numbers[(numbers < 0) | (numbers >= len(self))]
        if len(outside):
            raise ActiveDPOError(f"there is no row {outside[0]}, only {len(self)} rows")
        return numbers

    def _read(self, files: _Files, numbers: np.ndarray, taken: Tensor) -> None:
        """Read the rows `numbers`, one or more, into `taken`."""
        # Read in disk order: rows that are adjacent on disk are read at once.
        file, offset = self.file_of_row.numpy()[numbers], self.offset_of_row.numpy()[numbers]
        order = np.lexsort((offset, file))
        file, offset = file[order], offset[order]
        new = np.ones(len(order), dtype=bool)
        new[1:] = (np.diff(file) != 0) | (np.diff(offset) != 0)
        target = order[new]
        self._read_sorted(files, file[new], offset[new], target, taken)
        if len(target) < len(order):
            source = target[np.cumsum(new) - 1]
            taken[torch.from_numpy(order[~new])] = taken[torch.from_numpy(source[~new])]

    def _check(self, files: _Files, numbers: np.ndarray, taken: Tensor) -> None:
        if self._checks is None:
            return
        content = taken.view(torch.uint8).numpy()
        wrong = self._checks.first_wrong(numbers, content)
        if wrong is not None:
            path = files.paths[int(self.file_of_row[int(numbers[wrong])])]
            raise ActiveDPOError(
                f"{path} is damaged, the checksum of row {numbers[wrong]} does not match: delete "
                "the file and run `activedpo features` again with the same options, which computes "
                "only its rows again"
            )

    def _read_sorted(
        self, files: _Files, file: np.ndarray, offset: np.ndarray, target: np.ndarray, taken: Tensor
    ) -> None:
        """Read distinct rows, sorted by file and offset, into the rows `target` of `taken`."""
        size = self.row_bytes
        memory = memoryview(taken.view(torch.uint8).numpy().reshape(-1))  # type: ignore[arg-type]
        # A run is contiguous on disk; a piece of it is contiguous in memory, too.
        starts_run = np.ones(len(target), dtype=bool)
        starts_run[1:] = (np.diff(file) != 0) | (np.diff(offset) != size)
        starts_piece = starts_run.copy()
        starts_piece[1:] |= np.diff(target) != 1
        pieces = np.flatnonzero(starts_piece)
        begins = size * target[pieces]
        ends = begins + size * np.diff(pieces, append=len(target))
        buffers = [memory[a:b] for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]

        runs = np.flatnonzero(starts_run)
        lengths = size * np.diff(runs, append=len(target))
        places = list(
            zip(file[runs].tolist(), offset[runs].tolist(), lengths.tolist(), strict=True)
        )
        if len(places) > 1:
            # Requesting many places at once may more than double a disk's speed.
            for number, position, length in places:
                files.announce(number, position, length)
        of_run = pairwise([*np.searchsorted(pieces, runs).tolist(), len(pieces)])
        for (number, position, _), (a, b) in zip(places, of_run, strict=True):
            files.read(number, position, buffers[a:b])


class _Files:
    """Files open for reading, closed when this object is garbage-collected."""

    def __init__(self) -> None:
        self.paths: list[Path] = []
        self.descriptors: list[int] = []
        self.close = weakref.finalize(self, _close, self.descriptors)

    def open(self, path: Path) -> _File:
        try:
            descriptor = os.open(path, os.O_RDONLY)
            self.paths.append(path)
            self.descriptors.append(descriptor)
            status = os.fstat(descriptor)
        except OSError as error:
            raise ActiveDPOError(f"{path} cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode):
            raise ActiveDPOError(f"{path} cannot be read: not a file")
        return _File(self, len(self.paths) - 1, status.st_size)

    def announce(self, number: int, offset: int, count: int) -> None:
        """Ask the system to read ahead, if it supports that."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # a file system that does not support it
                os.posix_fadvise(self.descriptors[number], offset, count, os.POSIX_FADV_WILLNEED)

    def read(self, number: int, offset: int, buffers: list[memoryview]) -> None:
        """Fill `buffers`, one after the other, with the bytes from `offset` of a file on."""
        done = 0
        while done < len(buffers):
            try:
                count = os.preadv(
                    self.descriptors[number], buffers[done : done + _BUFFERS_PER_READ], offset
                )
            except OSError as error:
                raise ActiveDPOError(
                    f"{self.paths[number]} cannot be read: {error.strerror}"
                ) from None
            if count == 0:
                raise ActiveDPOError(
                    f"{self.paths[number]} has been cut short: it ends at byte "
                    f"{offset}, within its rows"
                )
            offset += count
            while done < len(buffers) and count >= len(buffers[done]):
                count -= len(buffers[done])
                done += 1
            if count:
                buffers[done] = buffers[done][count:]


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


class _File(NamedTuple):
    files: _Files
    number: int
    size: int

    def layout(self, tensor: str) -> MatrixLayout:
        return read_layout(self.files.paths[self.number], self.size, self._read, tensor)

    def _read(self, offset: int, count: int) -> bytes:
        content = bytearray(count)
        self.files.read(self.number, offset, [memoryview(content)])
        return bytes(content)
