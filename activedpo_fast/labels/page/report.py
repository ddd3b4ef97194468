"""The report of a labeling: counts, sides, pace and agreement."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import median

from activedpo_fast.labels.agreement import cohen_kappa, krippendorff_alpha
from activedpo_fast.labels.combine import TIE, Label, Votes
from activedpo_fast.labels.page.answers import Answer
from activedpo_fast.labels.page.labeling import Labeling
from activedpo_fast.labels.reading import SKIP
from activedpo_fast.labels.share import Share

_NAMED = 5  # pairs whose labelers do not agree: at most so many are named


def report(labeling: Labeling) -> str:
    """Return the report as lines of text."""
    with labeling.locked():
        answers, labels = labeling.answers, labeling.labels()
        missing = sum(label is None for label in labels)
        batch = labeling.batch
        given = sum(label is not None for label in batch.labels)
        lines = [
            f"{batch.path}: {len(labels) - missing} of {len(labels)} pairs have a label"
            + (f", {given} of them from the file itself" if given else "")
        ]
        names = list(dict.fromkeys(answer.labeler for answer in answers.all()))
        if names:
            lines += _table([(name, answers.by(name)) for name in names])
        if len(names) > 1:
            lines += _agreement(answers.votes(), names)
        split = [
            pick.id
            for pick, label in zip(batch.picks, labels, strict=True)
            if label is not None and label.split
        ]
        if split:
            more = ", ..." if len(split) > _NAMED else ""
            lines.append(
                f"{len(split)} pairs are split and count as ties: {', '.join(split[:_NAMED])}{more}"
            )
    return "\n".join(lines)


def _table(labelers: Sequence[tuple[str, list[Answer]]]) -> list[str]:
    rows = [["labeler", "0", "1", TIE, SKIP, "left chosen (95% interval)", "median s"]]
    for name, answers in labelers:
        counts = [sum(answer.label == label for answer in answers) for label in (0, 1, TIE, SKIP)]
        sided = [answer for answer in answers if answer.label in (0, 1)]
        lefts = sum(answer.label == answer.left for answer in sided)
        seconds = f"{median(answer.seconds for answer in answers):.1f}" if answers else ""
        rows.append([name, *map(str, counts), _share(lefts, len(sided)), seconds])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _share(part: int, whole: int) -> str:
    """Return a share with Wilson's interval: one with 50% in it shows no bias to a side."""
    if not whole:
        return ""
    share = Share(part, whole)
    low, high = share.interval
    return f"{part} of {whole}, {share.value:.0%} ({low:.0%} to {high:.0%})"


def _agreement(votes: Sequence[Votes], names: Sequence[str]) -> list[str]:
    """Return a line for each two labelers and one for all. A skip is no answer."""
    answered = [{n: label for n, label in pair.items() if label != SKIP} for pair in votes]
    lines = []
    for first, second in combinations(names, 2):
        both = [pair for pair in answered if first in pair and second in pair]
        if both:
            same = sum(pair[first] == pair[second] for pair in both)
            kappa = cohen_kappa([p[first] for p in both], [p[second] for p in both])
            lines.append(
                f"{first} and {second}: the same answer to {same} of {len(both)} pairs, "
                f"Cohen's kappa {_number(kappa)}"
            )
    several: list[list[Label]] = [list(pair.values()) for pair in answered if len(pair) > 1]
    if not several:
        return ["agreement: no pair has answers of two labelers (see --overlap)"]
    alpha = krippendorff_alpha(several)
    lines.append(
        f"all: {len(several)} pairs with two or more answers, "
        f"Krippendorff's alpha (nominal) {_number(alpha)}"
    )
    return lines


def _number(value: float | None) -> str:
    return "not defined (all answers are the same)" if value is None else f"{value:.2f}"
