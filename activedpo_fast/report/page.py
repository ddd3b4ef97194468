"""The report as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from activedpo_fast import __version__
from activedpo_fast.pool.messages import message_text
from activedpo_fast.pool.texts import Text
from activedpo_fast.report.compare import by_seed, pair_runs
from activedpo_fast.report.compute import STAGES as COUNTED
from activedpo_fast.report.figures import Series, curves, histogram, stacked_bars
from activedpo_fast.report.labels import agreement, label_counts, longer_preferred
from activedpo_fast.report.picks import extremes, measures, prompts_picked
from activedpo_fast.report.reading import LabeledPick, RunData, points
from activedpo_fast.report.tables import (
    TIMED,
    compute,
    labels_table,
    pace_table,
    paired_table,
    rounds_table,
    seeds_table,
    settings_table,
    tokens_table,
)

_LONGEST = 3000  # characters shown of a text

_CURVES_NOTE = (
    "Bars are one standard error, where the run recorded it as NAME_se. Compute is counted in "
    "thousands of token passes through the model: one token forward is 1, back 2."
)
_PAIRED_NOTE = (
    "Rows are the numbers of labels that all runs have; the mean leaves out the start. Without "
    "several seeds, differences include how prompts, responses and labels vary from run to run."
)
_COST_NOTE = (
    "Seconds are those that the run recorded on its machine. Tokens are counted from the texts on "
    "disk, without special tokens and chat template; compute adds them up, a backward pass as two. "
    "Evaluation is not counted."
)


def render_page(runs: Sequence[RunData]) -> str:
    """Return the page; needs matplotlib and Jinja2 (which torch requires)."""
    from jinja2 import Environment, StrictUndefined

    # Prompts, responses and names are untrusted text: everything is escaped.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_asset("page.html"))
    names = ", ".join(run.name for run in runs)
    return template.render(
        title=f"Active DPO: {names}",
        summary=[summary(run) for run in runs],
        style=_asset("page.css"),
        curves=_metric_curves(runs),
        curves_note=_CURVES_NOTE,
        paired=_paired(runs) if len(runs) > 1 else [],
        paired_note=_PAIRED_NOTE,
        cost_note=_COST_NOTE,
        runs=[_run(run) for run in runs],
        version=__version__,
    )


def summary(run: RunData) -> str:
    """Return one sentence: the run's strategy, rounds and labels, and how each metric moved."""
    complete = [record for record in run.records if record.round >= 0]
    labels = run.records[-1].labels_total if run.records else 0
    moved = []
    for metric in run.metrics:
        found = points(run, metric)
        moved.append(f"{metric} {found[0][1]:.4g} → {found[-1][1]:.4g}")
    rounds = f"{len(complete)} complete round{'' if len(complete) == 1 else 's'}"
    return f"{run.name}: strategy {run.strategy}, {rounds}, {labels} labels" + (
        f"; {', '.join(moved)}." if moved else "."
    )


def _asset(name: str) -> str:
    return (files("activedpo_fast.report") / name).read_text(encoding="utf-8")


def _metric_curves(runs: Sequence[RunData]) -> list[str]:
    found = []
    for metric in dict.fromkeys(name for run in runs for name in run.metrics):
        by_labels, by_compute = [], []
        for run in runs:
            recorded = points(run, metric)
            spent = compute(run)
            values = [value for _, value, _ in recorded]
            errors = [error for _, _, error in recorded]
            labels = [float(record.labels_total) for record, _, _ in recorded]
            by_labels.append(Series(run.name, labels, values, errors))
            known = [point for point in recorded if point[0].round in spent]
            by_compute.append(
                Series(
                    run.name,
                    [spent[record.round] for record, _, _ in known],
                    [value for _, value, _ in known],
                    [error for _, _, error in known],
                )
            )
        found.append(curves(f"{metric} by labels", "labels so far", metric, by_labels))
        if any(len(series.x) > 1 for series in by_compute):
            axis = "thousands of token passes so far"
            found.append(curves(f"{metric} by compute", axis, metric, by_compute))
    return found


def _paired(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    found = []
    for metric in dict.fromkeys(name for run in runs for name in run.metrics):
        paired = pair_runs(runs, metric)
        if paired is not None:
            found.append({"rows": paired_table(paired), "caption": metric})
        seeds = by_seed(runs, metric)
        if seeds:
            caption = f"{metric}: mean difference after the start, paired by seed"
            found.append({"rows": seeds_table(seeds), "caption": caption})
    return found


def _run(run: RunData) -> dict[str, Any]:
    most, least = extremes(run)
    ranked = bool(least) or len({pick.pick.score for pick in most}) > 1
    picked, offered = prompts_picked(run)
    lengths = measures(run)
    return {
        "name": run.name,
        "missing": run.missing,
        "rounds": rounds_table(run),
        "cost": _cost_charts(run),
        "tokens": tokens_table(run),
        "labels": labels_table(run),
        "label_facts": _label_facts(run),
        "pace": pace_table(run),
        "lengths": [["", "candidate pairs", "picks"], *(m.row() for m in lengths)]
        if lengths
        else [],
        "prompts": f"The picks are from {picked} of the {offered} prompts that were offered.",
        "picked": [
            histogram(f"{m.name.capitalize()}", "characters", {"pool": m.pool, "picks": m.picks})
            for m in lengths
        ],
        "most": [_example(pick) for pick in most],
        "most_heading": (
            f"The {len(most)} picks with the highest scores"
            if ranked
            else f"The first {len(most)} picks (the strategy gives no scores)"
        ),
        "least": [_example(pick) for pick in least],
        "least_heading": f"The {len(least)} picks with the lowest scores",
        "settings": settings_table(run),
        "command": run.command,
        "continue_text": (
            "This command continues the run:"
            if run.command
            else f"The script that began this run continues it, with output_dir {run.folder}."
        ),
    }


def _cost_charts(run: RunData) -> list[str]:
    found = []
    timed = [record for record in run.records if record.seconds]
    if timed:
        stages = [stage for stage in TIMED if any(stage in r.seconds for r in timed)]
        names = ["start" if record.round < 0 else str(record.round) for record in timed]
        parts = {stage: [r.seconds.get(stage, 0.0) for r in timed] for stage in stages}
        found.append(stacked_bars("Seconds by stage", "seconds", names, parts, TIMED))
    if run.tokens:
        units = {stage: [stages[stage].units / 1000 for stages in run.tokens] for stage in COUNTED}
        names = [str(n) for n in range(len(run.tokens))]
        unit = "thousands of token passes"
        found.append(stacked_bars("Compute by stage", unit, names, units, TIMED))
    return found


def _label_facts(run: RunData) -> list[tuple[str, str]]:
    counts = label_counts(run.picks)
    preferences = counts["0"] + counts["1"]
    facts = [
        ("Preferences", f"{preferences} of {sum(counts.values())} picks"),
        ("The longer response was preferred", str(longer_preferred(run.picks))),
    ]
    agreed, alpha = agreement(run.picks)
    if agreed.total:
        facts.append(("Two labelers gave the same answer", str(agreed)))
    if alpha is not None:
        facts.append(("Krippendorff's alpha (1: full agreement, 0: chance)", f"{alpha:.2f}"))
    return facts


def _example(labeled: LabeledPick) -> dict[str, Any]:
    pick = labeled.pick
    label = "not labeled" if labeled.label is None else f"label {labeled.label}"
    return {
        "summary": (
            f"{pick.id} · round {labeled.round}, pick {pick.rank + 1} · score {pick.score:.4g} · "
            f"{label}"
        ),
        "prompt": _messages(pick.prompt),
        "responses": [
            {"text": _messages(response), "preferred": labeled.label == n}
            for n, response in enumerate(pick.responses)
        ],
    }


def _messages(text: Text) -> list[tuple[str, str]]:
    """Return (role, content) of each message; plain text has no role."""
    if isinstance(text, str):
        return [("", _shortened(text))]
    return [(message["role"], _shortened(message_text(message))) for message in text]


def _shortened(text: str) -> str:
    more = len(text) - _LONGEST
    return text if more <= 0 else f"{text[:_LONGEST]}… ({more} more characters)"
