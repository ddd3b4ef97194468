"""Markdown tables, and their places in documents.

Documents mark the place of a table by a line <!-- benchmark: NAME --> and the end of it by
<!-- end -->; what stands between is replaced, so that no figure is typed by hand.
"""

from __future__ import annotations

import re
from typing import Any

Row = dict[str, Any]


def table(rows: list[Row], columns: dict[str, Any]) -> str:
    """A line for each of `rows`; `columns` has the heads, and what each shows of a row."""
    cells = [list(columns)] + [[value(row) for value in columns.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]

    def line(values: list[str]) -> str:
        return (
            "| "
            + " | ".join(
                v.ljust(w) if i == 0 else v.rjust(w)
                for i, (v, w) in enumerate(zip(values, widths, strict=True))
            )
            + " |"
        )

    rule = (
        "|"
        + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
        + "|"
    )
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def optional(row: Row, name: str, form: str) -> str:
    return "–" if row.get(name) is None else form.format(row[name])


def where_and_when(machine: dict[str, Any], day: str, commit: str) -> str:
    """The line above a table: the machine of its figures, their day and the commit."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['processor']}, {machine['threads']} threads, {day}, commit {commit[:10]}; "
        f"{versions}."
    )


def write_into(document: str, found: dict[str, str]) -> str:
    """`document` with the tables that it has a place for; a place without a table stays."""

    def replace(match: re.Match[str]) -> str:
        table = found.get(match["name"])
        return match[0] if table is None else f"{match['begin']}\n{table}\n{match['end']}"

    pattern = r"(?P<begin><!-- benchmark: (?P<name>[^>]+?) -->)\n.*?(?P<end><!-- end -->)"
    return re.sub(pattern, replace, document, flags=re.DOTALL)
