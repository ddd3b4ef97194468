"""Plain CSV for spreadsheets: one row per pair, with "choice" to fill in.

The format is this module's own: CSV of RFC 4180 in UTF-8. A spreadsheet runs a cell that starts
with =, +, - or @ as a formula, so such cells are written with ' in front, and so are those that
start with '. Reading takes one ' away.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock

from activedpo_fast._files import first_line
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.exchange.answers import Found, Problem
from activedpo_fast.labels.exchange.reading import read_text
from activedpo_fast.labels.exchange.rows import answer_of, row_of
from activedpo_fast.labels.exchange.shown import ShownPick

# What OWASP lists under "CSV injection", full-width forms included.
_GUARDED = ("=", "+", "-", "@", "\t", "\r", "\n", "'", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_NEEDED = ("id", "choice")
_FIELD_LIMIT = Lock()  # csv has one limit for the whole process


def export(picks: Sequence[ShownPick]) -> dict[str, str]:
    """Return the file: a header and `rows.row_of` of every pick."""
    file = io.StringIO(newline="")
    rows = [row_of(pick) for pick in picks]
    writer = csv.DictWriter(file, list(rows[0]), quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows({name: _guarded(value) for name, value in row.items()} for row in rows)
    return {"": file.getvalue()}


def answers(path: Path, labeler: str) -> Found:
    """Yield the answers of the rows whose "choice" was filled in; columns may be in any order.

    Spreadsheets in some languages separate cells by semicolons or tabs; the header tells.
    """
    rows = _cells(path)
    header = next(rows, (0, []))[1]
    missing = [name for name in _NEEDED if name not in header]
    if missing:
        raise ActiveDPOError(f"{path}: no column {', '.join(map(repr, missing))} in its first line")
    if len(set(header)) < len(header):
        raise ActiveDPOError(f"{path}: two columns have the same name")
    for line, cells in rows:
        place = f"{path}, line {line}"
        if not any(cells):
            continue
        if len(cells) != len(header):
            reason = f"{len(cells)} cells where the header has {len(header)}"
            yield Problem(place, reason, cells)
            continue
        row = {name: cell.removeprefix("'") for name, cell in zip(header, cells, strict=True)}
        answer = answer_of(row, place, labeler)
        if answer is not None:
            yield answer


def _guarded(value: str | int | None) -> str:
    text = "" if value is None else str(value)
    return "'" + text if text.startswith(_GUARDED) else text


def _cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line of the file where it begins, cells) for every row."""
    text = read_text(path)
    if "\0" in text:
        raise ActiveDPOError(f"{path}: has a NUL character, so it is not CSV: save it as CSV UTF-8")
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    with _FIELD_LIMIT:
        before = csv.field_size_limit(max(len(text), 1))
        try:
            line = 1
            for cells in reader:
                rows.append((line, cells))
                line = reader.line_num + 1
        except csv.Error as error:
            raise ActiveDPOError(
                f"{path}, line {reader.line_num}: broken CSV: {first_line(error)}"
            ) from error
        finally:
            csv.field_size_limit(before)
    yield from rows
