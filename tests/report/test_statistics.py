"""The numbers of a report, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from activedpo_fast.labels.share import Share
from activedpo_fast.report.compare import by_seed, pair_runs
from activedpo_fast.report.reading import RunData
from activedpo_fast.report.tables import aligned, paired_table
from activedpo_fast.training.run_folder import RoundRecord


def test_wilsons_interval() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    for hits, total, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert Share(hits, total).interval == pytest.approx((low, high), abs=5e-5)
    assert Share(29, 29).interval[1] == 1.0
    assert str(Share(0, 0)) == "none"


def _run(name: str, values: dict[int, float], strategy: str = "random", seed: int = 0) -> RunData:
    records = [
        RoundRecord(n - 1, labels, {"reward": value}, {})
        for n, (labels, value) in enumerate(values.items())
    ]
    settings = {"strategy": strategy, "seed": seed}
    return RunData(Path(name), name, settings=settings, records=records)


def test_runs_are_compared_at_the_same_labels() -> None:
    a, b = _run("a", {0: 1.0, 10: 2.0, 20: 3.0}), _run("b", {0: 1.5, 20: 2.0, 40: 9.0})
    paired = pair_runs([a, b], "reward")
    assert paired is not None
    assert (paired.labels, paired.differences(1)) == ([0, 20], [0.5, -1.0])
    assert paired.mean_difference(1) == -1.0
    assert paired_table(paired) == [
        ["labels", "a", "b", "b − a"],
        ["0", "1", "1.5", "+0.5"],
        ["20", "3", "2", "-1"],
        ["mean", "", "", "-1"],
    ]
    assert pair_runs([a, _run("c", {7: 1.0})], "reward") is None
    assert pair_runs([a, b], "another") is None


def test_strategies_are_paired_by_seed() -> None:
    runs = [_run(f"r{n}", {0: 0.0, 10: float(n)}, "random", n) for n in range(3)]
    runs += [_run(f"a{n}", {0: 0.0, 10: n + d}, "activedpo", n) for n, d in ((0, 1.0), (1, 3.0))]
    (found,) = by_seed(runs, "reward")
    assert (found.strategy, found.baseline, found.seeds) == ("activedpo", "random", 2)
    assert (found.value, found.error) == pytest.approx((2.0, 1.0))
    assert by_seed([*runs, _run("again", {10: 1.0}, "random", 1)], "reward") == []
    assert by_seed(runs[:3], "reward") == []


def test_names_cannot_steer_a_terminal() -> None:
    assert aligned([["a\x1b[31m\n", "b"], ["c", "dd"]]) == "a[31m   b\n    c  dd"
