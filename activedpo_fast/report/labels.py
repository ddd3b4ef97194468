"""What the labels of a run say: their counts, length bias, agreement and pace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from statistics import median

from activedpo_fast.labels.agreement import krippendorff_alpha
from activedpo_fast.labels.reading import SKIP
from activedpo_fast.labels.share import Share
from activedpo_fast.pool.messages import message_text
from activedpo_fast.pool.texts import Text
from activedpo_fast.report.reading import LabeledPick


def label_counts(picks: Iterable[LabeledPick]) -> dict[str, int]:
    """Return how many labels are 0, 1, "tie" and "skip", and how many are "missing"."""
    found = Counter("missing" if pick.label is None else str(pick.label) for pick in picks)
    return {name: found[name] for name in ("0", "1", "tie", "skip", "missing")}


def longer_preferred(picks: Iterable[LabeledPick]) -> Share:
    """Return how often the longer response (in characters) was preferred, where lengths differ."""
    hits = total = 0
    for pick in picks:
        a, b = map(text_length, pick.pick.responses)
        if pick.label in (0, 1) and a != b:
            total += 1
            hits += pick.label == int(b > a)
    return Share(hits, total)


def agreement(picks: Iterable[LabeledPick]) -> tuple[Share, float | None]:
    """Return how often two labelers gave the same answer to a pair (all twos of all pairs), and
    Krippendorff's alpha, None where it is not defined. A skip is no answer."""
    answers = []
    for pick in picks:
        said = {answer.labeler: answer.label for answer in pick.answers if answer.labeler}
        answers.append([label for label in said.values() if label != SKIP])
    twos = [two for given in answers for two in combinations(given, 2)]
    return Share(sum(a == b for a, b in twos), len(twos)), krippendorff_alpha(answers)


def pace(picks: Iterable[LabeledPick]) -> dict[str, tuple[int, float | None]]:
    """Return for each labeler the number of answers, and their median seconds where recorded."""
    seconds: dict[str, list[float]] = {}
    answers: Counter[str] = Counter()
    for pick in picks:
        for answer in pick.answers:
            if answer.labeler:
                answers[answer.labeler] += 1
                seconds.setdefault(answer.labeler, [])
                if answer.seconds is not None:
                    seconds[answer.labeler].append(answer.seconds)
    return {name: (n, _median(seconds[name])) for name, n in sorted(answers.items())}


def text_length(text: Text) -> int:
    """Return the number of characters of a text, or of the contents of chat messages."""
    if isinstance(text, str):
        return len(text)
    return sum(len(message_text(message)) for message in text)


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None
