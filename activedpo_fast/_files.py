"""Atomic file writes, and early checks that files can be read and written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from activedpo_fast.errors import ActiveDPOError

FilePath = str | os.PathLike[str]


@contextmanager
def atomic_path(path: FilePath) -> Iterator[Path]:
    """Yield a temporary path next to `path`; on success, fsync it and rename it to `path`.

    A reader sees the old file or the new one, never a partial one. On an exception the temporary
    file is removed and `path` is left as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Keep the suffix: some writers choose the format by it.
    handle, name = tempfile.mkstemp(
        prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: FilePath, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path` atomically."""
    content = data.encode() if isinstance(data, str) else data
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def read_json(path: Path) -> Any:
    """Return the value in a JSON file; `ActiveDPOError` if it is unreadable or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ActiveDPOError(f"{path}: {reason_of(error)}") from error
    except ValueError as error:
        raise ActiveDPOError(f"{path}: broken JSON: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_file_target(path: FilePath | None) -> None:
    """Raise `ActiveDPOError` if `path` cannot be written, before hours of work on its content.

    None (no file wanted) passes.
    """
    if path is None:
        return
    target = Path(path)
    if target.is_dir():
        raise ActiveDPOError(f"{target} is a folder, not a file to write to")
    _check_writable(target, _nearest(target.absolute().parent))


def check_folder_target(path: FilePath) -> None:
    """Raise `ActiveDPOError` if `path` is not, and cannot become, a writable folder."""
    target = Path(path)
    if os.path.exists(target) and not target.is_dir():
        raise ActiveDPOError(f"{target} is a file, not a folder to write to")
    _check_writable(target, _nearest(target.absolute()))


def _nearest(path: Path) -> Path:
    """Return `path`, or its nearest existing parent."""
    # os.path: no error for a folder without search permission.
    return next(there for there in (path, *path.parents) if os.path.exists(there))


def _check_writable(target: Path, nearest: Path) -> None:
    if not nearest.is_dir() or not _may(nearest, os.W_OK | os.X_OK):
        raise ActiveDPOError(f"{target} cannot be written: {nearest} is not a writable folder")


def check_readable(paths: Iterable[Path]) -> None:
    """Raise `ActiveDPOError` for an existing file that this user may not read."""
    for path in paths:
        if path.is_file() and not _may(path, os.R_OK):
            raise ActiveDPOError(f"{path}: permission denied")


def _may(path: Path, mode: int) -> bool:
    # Check the effective user, as `open` does, if the system supports it.
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def reason_of(error: OSError) -> str:
    """Return the system's reason why a file cannot be read or written, to follow its name."""
    return (error.strerror or (str(error).splitlines() or [type(error).__name__])[0]).lower()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message, or its type if it has no message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
