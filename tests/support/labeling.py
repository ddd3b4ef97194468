"""Picks for the tests of the labeling page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from activedpo_fast.labels.files import labels_file
from activedpo_fast.labels.page.batch import Batch
from activedpo_fast.labels.page.labeling import Labeling
from activedpo_fast.selection.picks_jsonl import Pick, pick_line


def plain_picks(count: int) -> list[Pick]:
    """Picks whose response 0 is the good one."""
    return [
        Pick(f"p{n}", (0, 2), 1.0 - n / 100, n, f"Question {n}?", (f"Good {n}.", f"Bad {n}."))
        for n in range(count)
    ]


def write_picks(path: Path, picks: list[Pick], **more: Any) -> Path:
    """Write picks as `activedpo select` does; return the path."""
    path.write_text("".join(pick_line(pick, **more) for pick in picks))
    return path


def open_labeling(path: Path, **options: Any) -> Labeling:
    """Return the labeling of a file of picks, with the default labels file."""
    return Labeling(Batch.read(path), labels_file(path), **options)
