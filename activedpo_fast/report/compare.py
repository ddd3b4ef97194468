"""Several runs beside each other, at the same numbers of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from activedpo_fast.report.reading import RunData, points


@dataclass(frozen=True)
class Paired:
    """A metric of several runs at the numbers of labels that all of them have.

    Attributes:
        labels: ascending; the first is usually 0, the start.
        values: for each run one value per entry of `labels`.
    """

    metric: str
    names: list[str]
    labels: list[int]
    values: list[list[float]]

    def differences(self, run: int) -> list[float]:
        """Return a run's values minus those of the first run."""
        return [a - b for a, b in zip(self.values[run], self.values[0], strict=True)]

    def mean_difference(self, run: int) -> float | None:
        """Return the mean of `differences` after the start; None if there is nothing after it."""
        after = [d for n, d in zip(self.labels, self.differences(run), strict=True) if n > 0]
        return mean(after) if after else None


@dataclass(frozen=True)
class SeedDifference:
    """A strategy minus the first strategy: mean over the seeds that both have run.

    Attributes:
        error: its standard error over the seeds.
    """

    strategy: str
    baseline: str
    seeds: int
    value: float
    error: float


def pair_runs(runs: Sequence[RunData], metric: str) -> Paired | None:
    """Return a metric of all runs at their common numbers of labels; None if there are none."""
    curves = []
    for run in runs:
        # A round without a preference adds no label: its record replaces that of the round before.
        curves.append({record.labels_total: value for record, value, _ in points(run, metric)})
    common = sorted(set.intersection(*map(set, curves))) if curves else []
    if not common:
        return None
    return Paired(
        metric, [run.name for run in runs], common, [[c[n] for n in common] for c in curves]
    )


def by_seed(runs: Sequence[RunData], metric: str) -> list[SeedDifference]:
    """Return strategies minus the first run's strategy, paired by seed; two seeds or more."""
    found: dict[str, dict[int, RunData]] = {}
    for run in runs:
        seed = run.settings.get("seed")
        if type(seed) is not int or seed in found.setdefault(run.strategy, {}):
            return []  # which runs belong together is not clear
        found[run.strategy][seed] = run
    baseline, *others = found
    rows = []
    for strategy in others:
        values = []
        for seed in found[strategy].keys() & found[baseline].keys():
            paired = pair_runs([found[baseline][seed], found[strategy][seed]], metric)
            difference = None if paired is None else paired.mean_difference(1)
            values += [] if difference is None else [difference]
        if len(values) > 1:
            error = stdev(values) / len(values) ** 0.5
            rows.append(SeedDifference(strategy, baseline, len(values), mean(values), error))
    return rows
