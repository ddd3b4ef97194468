"""Bounds on what is read from files, so that no file can fill the memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

from activedpo_fast._checks import check_at_least, nearest
from activedpo_fast.errors import ActiveDPOError


@dataclass(frozen=True)
class Limits:
    """The most that is read.

    Attributes:
        file_mib: MiB of a file of rows, labels or ids; of a Parquet file, as it is in memory.
        json_mib: MiB of a JSON file, or of a line of a JSONL file.
        json_depth: lists and objects in each other, in JSON.
        yaml_kib: KiB of a run file.
        yaml_values: values of a run file, with those that an alias repeats.
        yaml_depth: lists and sections in each other, in a run file.
        text_chars: characters of a prompt, a response or a chat message.
        responses: responses to a prompt.
    """

    file_mib: int = 4096
    json_mib: int = 64
    json_depth: int = 100
    yaml_kib: int = 1024
    yaml_values: int = 10_000
    yaml_depth: int = 50
    text_chars: int = 10_000_000
    responses: int = 1_000


NAMES = tuple(entry.name for entry in fields(Limits))
_current = Limits()


def limit(name: str) -> int:
    """Return the limit `name`, as it is now."""
    return int(getattr(_current, name))


@contextmanager
def raised_limits(**numbers: int) -> Iterator[None]:
    """Have other limits, by their names in `Limits`, in all threads of this process.

    `activedpo --limit NAME=NUMBER` does the same.

    Raises:
        ActiveDPOError: an unknown name, or a number below 1.

    Examples:
        >>> from activedpo_fast import raised_limits, read_labels
        >>> with raised_limits(json_mib=500):
        ...     answered, labels = read_labels("to_label.jsonl")
    """
    global _current
    for name in numbers:
        if name not in NAMES:
            raise ActiveDPOError(f"limit {name}: unknown; {nearest(name, NAMES)}")
    check_at_least(1, **numbers)
    before = _current
    _current = replace(before, **numbers)
    try:
        yield
    finally:
        _current = before


def check_limit(name: str, size: float, place: object, unit: str) -> None:
    """Raise `ActiveDPOError`, naming `place`, if `size` (of `unit`) exceeds the limit `name`."""
    most = limit(name)
    if size > most:
        shown = f"{size:.1f}" if isinstance(size, float) else str(size)
        raise ActiveDPOError(
            f"{place}: {shown} {unit}, the limit is {most}; if it is meant, raise the limit "
            f"(activedpo --limit {name}=N, or raised_limits({name}=N) in Python)"
        )
