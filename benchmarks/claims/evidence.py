"""docs/evidence.md: its tables and pictures, from the runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims.experiments import Experiment
from benchmarks.claims.figures import draw_bound, draw_curves, draw_frontiers
from benchmarks.claims.results import Results
from benchmarks.claims.shown import seeds_of
from benchmarks.claims.tables import (
    fit_table,
    grid_table,
    learned_table,
    main_table,
    paper_table,
    single_table,
)
from benchmarks.markdown import write_into


def document(
    results: Mapping[str, Results], experiments: Mapping[str, Sequence[Experiment]], path: Path
) -> None:
    """Put the tables into `path` and the figures next to it; tables without runs are left
    unchanged.

    Args:
        results, experiments: by task.
    """
    found = {
        "claims: paper": paper_table(),
        "claims: linear fit": fit_table(),
        "claims: learned difference": learned_table(),
    }
    for task, known in results.items():
        own = [e for e in experiments[task] if len(seeds_of(known, e)) > 1]
        mains = [e for e in own if e.name.startswith("main")]
        outside = [e for e in own if e.name.startswith("outside")]
        if own:
            found[f"claims: {task} machine"] = _machine(known.environment)
        for experiment in own:
            if not experiment.compared:
                make = single_table
            else:
                whole = experiment.name.startswith(("main", "outside", "more"))
                make = main_table if whole else grid_table
            found[f"claims: {experiment.name}"] = make(known, experiment)
        drawn = [e for e in mains if e.drawn]
        if drawn:
            draw_curves(known, drawn, path.with_name(f"evidence_{task}.png"))
        if outside:
            draw_curves(known, outside, path.with_name("evidence_outside.png"))
        if drawn and task == "known_reward":
            draw_bound(known, drawn, path.with_name("evidence_bound.png"))
        if drawn and task == "reviews":
            draw_frontiers(known, drawn[0], path.with_name("evidence_reviews_kl.png"))
        if outside:
            draw_frontiers(known, outside[0], path.with_name("evidence_outside_kl.png"))
    path.write_text(write_into(path.read_text(), found))
    print(f"written: {path}")


def _machine(where: dict[str, Any]) -> str:
    if not where:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return f"{where['processor']}, one core a run, {where['date']}; {versions}."
