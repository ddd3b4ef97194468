"""The tables of a report: rows of text, the head first; for the page and for a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from activedpo_fast.report.compare import Paired, SeedDifference
from activedpo_fast.report.compute import STAGES as COUNTED
from activedpo_fast.report.compute import cumulative
from activedpo_fast.report.labels import label_counts, longer_preferred, pace
from activedpo_fast.report.reading import RunData, round_name

Rows = list[list[str]]

TIMED = ("generate", "features", "select", "label", "train", "evaluate")


def rounds_table(run: RunData) -> Rows:
    """Return a row for each complete round: labels so far, metrics, compute, seconds.

    Columns in which nothing was recorded are left out.
    """
    spent = compute(run)
    cells = []
    for record in run.records:
        joules = sum(record.joules.values()) / 1000 if record.joules else None
        cells.append(
            {
                "round": round_name(record.round),
                "labels": str(record.labels_total),
                **{name: with_error(record.metrics, name) for name in run.metrics},
                "train loss": _number(record.training.get("loss"), ".4g"),
                "compute": _number(spent.get(record.round), ",.0f"),
                **{f"{stage} s": _number(record.seconds.get(stage), ".1f") for stage in TIMED},
                "GPU s": _number(record.gpu_seconds, ".1f"),
                "GPU kJ": _number(joules, ".2f"),
            }
        )
    names = [name for name in (cells[0] if cells else {}) if any(row[name] for row in cells)]
    return [names or ["round"], *([row[name] for name in names] for row in cells)]


def compute(run: RunData) -> dict[int, float]:
    """Return thousands of token passes until the end of each round; empty if not counted."""
    if run.tokens is None:
        return {}
    return dict(enumerate(cumulative(run.tokens), start=-1))


def tokens_table(run: RunData) -> Rows:
    """Return thousands of tokens, forward and back, by stage; a row for each labeled round."""
    if not run.tokens:
        return []
    ways = ("forward", "backward")
    rows = [["round", *(f"{stage}, {way}" for stage in COUNTED for way in ways)]]
    for n, stages in enumerate(run.tokens):
        counts = (getattr(stages[stage], way) for stage in COUNTED for way in ways)
        rows.append([str(n), *(f"{count / 1000:,.1f}" for count in counts)])
    return rows


def labels_table(run: RunData) -> Rows:
    """Return the labels of each round, and how often the longer response was preferred."""
    rows = [["round", "0", "1", "tie", "skip", "not labeled", "longer preferred"]]
    for data in run.rounds:
        if data.picks:
            counts = map(str, label_counts(data.picks).values())
            longer = longer_preferred(data.picks)
            rows.append([str(data.number), *counts, f"{longer.value:.0%}" if longer.total else ""])
    return rows if len(rows) > 1 else []


def pace_table(run: RunData) -> Rows:
    rows = [["labeler", "answers", "median seconds"]]
    for name, (answers, seconds) in pace(run.picks).items():
        rows.append([name, str(answers), _number(seconds, ".1f")])
    return rows if len(rows) > 1 else []


def settings_table(run: RunData) -> Rows:
    """Return every setting of `config.json` by its dotted name, and the versions."""
    found = [*_flat(run.settings), *((f"version of {k}", v) for k, v in run.versions.items())]
    return [["setting", "value"], *([name, _shown(value)] for name, value in found)]


def paired_table(paired: Paired) -> Rows:
    """Return a row for each number of labels: the runs, and their differences from the first."""
    others = range(1, len(paired.names))
    rows = [["labels", *paired.names, *(f"{paired.names[n]} − {paired.names[0]}" for n in others)]]
    differences = [paired.differences(n) for n in others]
    for n, labels in enumerate(paired.labels):
        values = (f"{run[n]:.4g}" for run in paired.values)
        rows.append([str(labels), *values, *(f"{d[n]:+.4g}" for d in differences)])
    means = [paired.mean_difference(n) for n in others]
    if any(mean is not None for mean in means):
        blank = [""] * len(paired.names)
        rows.append(["mean", *blank, *(_number(m, "+.4g") for m in means)])
    return rows


def seeds_table(found: Sequence[SeedDifference]) -> Rows:
    return [
        ["strategies", "seeds", "difference", "standard error"],
        *(
            [f"{d.strategy} − {d.baseline}", str(d.seeds), f"{d.value:+.4g}", f"{d.error:.2g}"]
            for d in found
        ),
    ]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines for a terminal, columns to the right; control characters left out."""
    clean = [["".join(c for c in cell if c.isprintable()) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*clean, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in clean
    )


def with_error(metrics: dict[str, float], name: str) -> str:
    if name not in metrics:
        return ""
    value, error = metrics[name], metrics.get(f"{name}_se")
    if error is None or not 0 < error < math.inf:
        return f"{value:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))  # two digits of the error
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}".lstrip("."))
    else:
        yield name, value


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text)} characters)"
