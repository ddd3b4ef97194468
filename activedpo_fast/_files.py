"""Atomic file writes, bounded reads, and early checks that files can be read and written."""

from __future__ import annotations

import codecs
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from activedpo_fast._limits import check_limit, limit
from activedpo_fast.errors import ActiveDPOError

_LONGEST_NAME = 255  # bytes
_NEW_SECONDS = 60  # an empty file as young as that may not be locked yet

FilePath = str | os.PathLike[str]


@contextmanager
def atomic_path(path: FilePath) -> Iterator[Path]:
    """Yield a temporary path next to `path`; on success, fsync it and rename it to `path`.

    A reader sees the old file or the new one, never a partial one. On an exception the temporary
    file is removed and `path` is left as it was. Where `path` is a link, the file that it names is
    replaced.

    Raises:
        ActiveDPOError: `path` is there and is not a regular file (a device, a pipe, a folder), or
            it is a link to nothing.
    """
    target = regular_target(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    temporary = target.parent / temporary_name(target)
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    descriptor = os.open(temporary, flags, 0o666)  # the system takes off the umask
    try:
        _try_lock(descriptor)  # not abandoned
        yield temporary
        sync(temporary)
        temporary.replace(target)
        sync(target.parent)
    except OSError as error:
        if error.filename is not None:
            raise
        # A full disk: the system names no file where it fails while writing.
        raise ActiveDPOError(f"{path} cannot be written: {reason_of(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


def _remove_abandoned(target: Path) -> None:
    """Remove temporary files for `target` whose process has been killed: nobody locks them."""
    with os.scandir(target.parent) as entries:
        found = [entry.path for entry in entries if is_temporary(entry.name, target.stem)]
    for path in found:
        with suppress(OSError):  # its process has just removed it
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                status = os.fstat(descriptor)
                new = status.st_size == 0 and time.time() - status.st_mtime < _NEW_SECONDS
                if not new and stat.S_ISREG(status.st_mode) and _try_lock(descriptor):
                    os.unlink(path)
            finally:
                os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process has it, or the file system has no locks
        return False
    return True


def temporary_name(target: Path) -> str:
    """Return an unpredictable name for a file that is renamed to `target` when it is whole."""
    # Keep the suffix: some writers choose the format by it. Names have at most 255 bytes.
    return f".{target.stem[:40]}-{secrets.token_hex(8)}{target.suffix[:40]}"


def is_temporary(name: str, *stems: str) -> bool:
    """Return whether `temporary_name` makes such names, for targets with one of these stems."""
    return any(
        re.fullmatch(rf"\.{re.escape(stem[:40])}-[0-9a-f]{{16}}(\..*)?", name) for stem in stems
    )


def sync(path: Path) -> None:
    """Have the disk store a file, or a folder's entries, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):
            raise
    finally:
        os.close(descriptor)


def regular_target(path: FilePath) -> Path:
    """Return the file that writing to `path` replaces: `path`, or the file that it links to.

    Raises:
        ActiveDPOError: it is there and is not a regular file, or a link to nothing.
    """
    target = Path(path)
    # os.path: no error for a folder without search permission.
    if os.path.islink(target):
        target = Path(os.path.realpath(target))
        if not os.path.lexists(target):
            raise ActiveDPOError(f"{path} is a link to {target}, which does not exist: remove it")
    if os.path.isdir(target):
        raise ActiveDPOError(f"{path} is a folder, not a file to write to")
    if os.path.lexists(target) and not os.path.isfile(target):
        raise ActiveDPOError(
            f"{path} is a device, a pipe or the like, not a regular file: choose another path"
        )
    return target


def write_atomic(path: FilePath, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path` atomically."""
    content = data.encode() if isinstance(data, str) else data
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def open_input(path: FilePath) -> BinaryIO:
    """Open a file to read bytes from.

    Raises:
        ActiveDPOError: it cannot be read, or is no regular file: a pipe may never end.
    """
    try:
        # Opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # the latter: a null character
        raise ActiveDPOError(f"{path}: {reason_of(error)}") from error
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        what = "a folder" if stat.S_ISDIR(kind) else "a device, a pipe or the like"
        raise ActiveDPOError(f"{path} is {what}, not a regular file: give a file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: FilePath, limit_name: str = "file_mib") -> bytes:
    """Return a file's content, of up to `file_mib` MiB, or of another limit in MiB or KiB."""
    unit = 2**10 if limit_name.endswith("_kib") else 2**20
    with open_input(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            check_limit(limit_name, size / unit, path, "KiB" if unit == 2**10 else "MiB")
            return file.read(limit(limit_name) * unit)
        except OSError as error:
            raise ActiveDPOError(f"{path}: {reason_of(error)}") from error


def read_text(path: FilePath, limit_name: str = "file_mib") -> str:
    """Return a UTF-8 file's text, less a byte order mark; bounded as in `read_bytes`."""
    content = read_bytes(path, limit_name).removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ActiveDPOError(
            f"{path}: not UTF-8 text (byte {error.start + 1}): save it as UTF-8"
        ) from error


def parse_json(text: str, place: object) -> Any:
    """Return the value of a JSON text.

    Raises:
        ActiveDPOError: it is not JSON, or nested deeper than `json_depth`; the message begins with
            `place`.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ActiveDPOError(
            f"{place}: broken JSON: {error.msg} at {line}column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits
        raise ActiveDPOError(f"{place}: broken JSON: {first_line(error)}") from error
    if text.count("[") + text.count("{") > limit("json_depth"):
        check_limit("json_depth", _depth(value), place, "lists and objects in each other")
    return value


def check_characters(value: Any, place: object) -> None:
    """Refuse a JSON value with half of a surrogate pair, which no file could have as UTF-8.

    JSON may have it as an escape, `\\ud800`.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise ActiveDPOError(
            f"{place}: {half} is half of a surrogate pair, which is no character: remove it"
        ) from None


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [inner for inner in level if isinstance(inner, (dict, list))]:
        depth += 1
        level = [
            one for inner in level for one in (inner.values() if isinstance(inner, dict) else inner)
        ]
    return depth


def read_json(path: Path) -> Any:
    """Return the value in a JSON file; `ActiveDPOError` if it is unreadable or not JSON."""
    return parse_json(read_text(path, "json_mib"), path)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # A path may have bytes that are no UTF-8: half characters in Python, escapes in JSON.
    write_atomic(path, text.encode("utf-8", "backslashreplace"))


def write_checked_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as JSON with a checksum of itself, `"checksum"`, atomically."""
    write_json(path, {**value, "checksum": checksum_of_json(value)})


def read_checked_json(path: Path) -> dict[str, Any]:
    """Return the object that `write_checked_json` wrote, without the checksum.

    Raises:
        ActiveDPOError: it is unreadable, not JSON, or differs from what was written.
    """
    value = read_json(path)
    if not isinstance(value, dict) or value.pop("checksum", None) != checksum_of_json(value):
        raise ActiveDPOError(
            f"{path} is damaged or was changed by hand, its checksum does not match: put the file "
            "back as it was"
        )
    return value


def checksum_of_json(value: Mapping[str, Any]) -> str:
    return checksum(json.dumps(value, sort_keys=True).encode())


def checksum(data: bytes | memoryview) -> str:
    """Return the blake2b hash that files are checked with, 128 bits in hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def checksum_of_file(path: Path) -> str:
    """Return `checksum` of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with open_input(path) as file:
        try:
            while block := file.read(1 << 20):
                digest.update(block)
        except OSError as error:
            raise ActiveDPOError(f"{path}: {reason_of(error)}") from error
    return digest.hexdigest()


def check_file_target(path: FilePath | None) -> None:
    """Raise `ActiveDPOError` if `path` cannot be written, before hours of work on its content.

    None (no file wanted) passes.
    """
    if path is None:
        return
    target = regular_target(path)
    _check_names(target)
    _check_writable(target, _nearest(target.absolute().parent))


def check_folder_target(path: FilePath) -> None:
    """Raise `ActiveDPOError` if `path` is not, and cannot become, a writable folder."""
    target = Path(path)
    _check_names(target)
    if os.path.exists(target) and not target.is_dir():
        raise ActiveDPOError(f"{target} is a file, not a folder to write to")
    _check_writable(target, _nearest(target.absolute()))


def _check_names(target: Path) -> None:
    """Refuse what is no path, or too long for one, also where its folders are not there yet."""
    try:
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            os.lstat(target)
        if any(len(os.fsencode(name)) > _LONGEST_NAME for name in target.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    except (OSError, ValueError) as error:  # the latter: a null character, half a character
        raise ActiveDPOError(f"{target} cannot be written: {reason_of(error)}") from None


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


def reason_of(error: OSError | ValueError) -> str:
    """Return the system's reason why a file cannot be read or written, to follow its name."""
    return (
        getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    ).lower()


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message, or its type if it has no message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
