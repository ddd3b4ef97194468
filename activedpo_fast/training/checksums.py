"""Checksums of a run's files: recorded before a file is there, compared whenever it is read."""

from __future__ import annotations

from pathlib import Path

from activedpo_fast._files import (
    checksum,
    checksum_of_file,
    read_checked_json,
    write_atomic,
    write_checked_json,
)
from activedpo_fast.errors import ActiveDPOError

_FILE = "checksums.json"


def write_recorded(path: Path, content: bytes) -> None:
    """Write a file of a run atomically, after its checksum."""
    record(path.parent, {path.name: checksum(content)})
    write_atomic(path, content)


def record(folder: Path, checksums: dict[str, str]) -> None:
    """Record checksums of files that are about to be put into a round's folder.

    A process killed in between leaves a checksum without a file, and the file is made again.
    """
    write_checked_json(folder / _FILE, {**_recorded(folder), **checksums})


def check(folder: Path, *names: str) -> None:
    """Raise `ActiveDPOError` for a file of a round's folder that is gone or has changed.

    Args:
        names: of files; of a folder, for all files recorded in it.
    """
    recorded = _recorded(folder)
    for name in names:
        inside = [known for known in recorded if known == name or known.startswith(f"{name}/")]
        if not inside:
            raise ActiveDPOError(
                f"{folder / _FILE} has no checksum of {name}: put the file back as it was, or use "
                "another output_dir"
            )
        for known in inside:
            path = folder / known
            if not path.exists():
                raise ActiveDPOError(
                    f"{path} is gone, which the run goes on from: put it back, or use another "
                    "output_dir"
                )
            if checksum_of_file(path) != recorded[known]:
                raise ActiveDPOError(
                    f"{path} has changed since the run wrote it: put it back as it was, or use "
                    "another output_dir"
                )


def _recorded(folder: Path) -> dict[str, str]:
    path = folder / _FILE
    return read_checked_json(path) if path.exists() else {}
