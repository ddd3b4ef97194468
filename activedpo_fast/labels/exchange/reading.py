"""Reading what annotation tools write: bounded in size, every fault in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from activedpo_fast._files import parse_json, reason_of
from activedpo_fast._files import read_text as read_file
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.files import placed_rows

# A file is read whole. Fifty pairs take kilobytes; this is room for a million short ones.
MAX_BYTES = 512 * 2**20


def check_size(path: Path) -> None:
    """Raise `ActiveDPOError` if a file, or the files of a folder, cannot be read in one piece."""
    try:
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files)
    except OSError as error:
        raise ActiveDPOError(f"{path}: {reason_of(error)}") from error
    if size > MAX_BYTES:
        raise ActiveDPOError(
            f"{path}: {size / 2**20:.0f} MiB, more than the {MAX_BYTES // 2**20} MiB that are read "
            "at once: export the answers in parts"
        )


def read_text(path: Path) -> str:
    """Return a UTF-8 file's text as it is, line ends included, less a byte order mark."""
    check_size(path)
    return read_file(path)


def read_json(path: Path) -> Any:
    """Return the value of a JSON file."""
    return parse_json(read_text(path), path)


def read_json_list(path: Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, object) for a JSON file that is a list of objects."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise ActiveDPOError(f"{path}: not a list of {what}s")
    yield from _objects((f"{path}, {what} {n}", row) for n, row in enumerate(rows, start=1))


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, object) for a JSONL or Parquet file, or a folder that `datasets` saved."""
    check_size(path)
    yield from _objects(placed_rows(path))


def _objects(rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, row in rows:
        if not isinstance(row, dict):
            raise ActiveDPOError(f"{place}: not a JSON object")
        yield place, row
