"""A journal: an append-only file of what was answered, on disk before the next question.

Several processes may use one journal at once. Each change is made while the file is locked, after
what the others appended has been read.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from activedpo_fast._files import check_characters, parse_json, reason_of
from activedpo_fast.errors import ActiveDPOError

_BEGINS = b'{"'  # of every entry


class Journal:
    """An append-only file of JSON objects, one per line. `locked` creates it.

    Raises:
        ActiveDPOError: from `locked` and `append`: the file cannot be read or written, a line is
            not a JSON object, or the file was removed, replaced or cut since the last call. A file
            of something else is left as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_to = 0  # bytes
        self._lines = 0
        self._identity: tuple[int, int] | None = None  # device and inode
        self._file: int | None = None  # while it is locked

    @contextmanager
    def locked(self) -> Iterator[list[dict[str, Any]]]:
        """Lock the file and yield the entries that were appended since the last call."""
        create = os.O_CREAT if self._identity is None else 0
        try:
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | create, 0o666)
        except OSError as error:
            raise ActiveDPOError(f"{self.path}: {reason_of(error)}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._file = file
            yield self._new_entries(file)
        finally:
            self._file = None
            os.close(file)  # and unlock

    def append(self, *entries: dict[str, Any]) -> None:
        """Append entries, inside `locked`, and return when they are on disk."""
        if self._file is None:
            raise RuntimeError("append needs the lock")
        data = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode()
        size = os.fstat(self._file).st_size
        rest = data
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
            if size == 0:
                _sync_folder(self.path.parent)
        except OSError as error:  # a full disk: leave no half of an entry
            os.ftruncate(self._file, size)
            raise ActiveDPOError(f"{self.path}: {reason_of(error)}") from None
        self._read_to = size + len(data)
        self._lines += len(entries)

    def _new_entries(self, file: int) -> list[dict[str, Any]]:
        status = os.fstat(file)
        identity = status.st_dev, status.st_ino
        if self._identity not in (None, identity) or status.st_size < self._read_to:
            raise ActiveDPOError(
                f"{self.path} was replaced or cut while it was in use: put it back as it was, then "
                "run the command again"
            )
        self._identity = identity
        data = os.pread(file, status.st_size - self._read_to, self._read_to)
        *lines, rest = data.split(b"\n")
        whole = self._read_to + len(data) - len(rest)
        only_unended = _is_json(rest)
        if only_unended:
            lines.append(rest)
        entries = [
            _parse(line, f"{self.path}, line {n}")
            for n, line in enumerate(lines, start=self._lines + 1)
        ]
        if only_unended:
            whole += len(rest) + os.write(file, b"\n")
        elif rest:
            if not _is_begun(rest):
                raise ActiveDPOError(
                    f"{self.path} is no journal: its last line is no JSON object: give another file"
                )
            # The machine stopped during a write. Nobody was told that this entry was saved.
            os.ftruncate(file, whole)
        self._lines += len(lines)
        self._read_to = whole
        return entries


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        entry = parse_json(line.decode(), place)
    except UnicodeDecodeError as error:
        raise ActiveDPOError(f"{place}: not UTF-8 (byte {error.start + 1})") from None
    if not isinstance(entry, dict):
        raise ActiveDPOError(f"{place}: not a JSON object")
    check_characters(entry, place)
    return entry


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _is_begun(line: bytes) -> bool:
    """Return whether a line without an end can be the beginning of an entry, as `append` writes."""
    return line.startswith(_BEGINS) or _BEGINS.startswith(line)


def _sync_folder(folder: Path) -> None:
    """Wait until the name of a new file is on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
