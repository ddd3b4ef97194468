"""Pictures of docs/evidence.md, from the runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from activedpo_fast._files import atomic_path
from benchmarks.claims.experiments import EVERYTHING, RANDOM, Experiment
from benchmarks.claims.results import Results
from benchmarks.claims.reviews import (
    LEARNED_DIFFERENCE,
    TRUE_DIFFERENCE,
    TWEETS_DIFFERENCE,
    VADER_DIFFERENCE,
    WORDS_DIFFERENCE,
)
from benchmarks.claims.shown import costs_of, curves_of, seeds_of, variants_made
from benchmarks.claims.statistics import mean_and_error

_DRAWN = (
    RANDOM,
    "activedpo, response",
    "activedpo, none",
    "adpo_plus",
    "apo",
    "margin_large",
    "trace_plus",
    VADER_DIFFERENCE,
    TWEETS_DIFFERENCE,
    LEARNED_DIFFERENCE,
    TRUE_DIFFERENCE,
    WORDS_DIFFERENCE,
    EVERYTHING,
)


def draw_curves(results: Results, mains: Sequence[Experiment], path: Path) -> None:
    """Held-out reward against labels, one panel per experiment."""
    plt = _pyplot()
    figure, axes = plt.subplots(
        1, len(mains), figsize=(6.2 * len(mains), 4.6), layout="constrained", squeeze=False
    )
    for panel, experiment in zip(axes[0], mains, strict=True):
        seeds = seeds_of(results, experiment)
        setting = experiment.variants[0].setting
        labels = np.arange(setting.rounds + 1) * setting.batch_size
        for name in _drawn(results, experiment):
            variant = next(v for v in experiment.variants if v.method == name)
            mean, error = mean_and_error(curves_of(results, variant, seeds))
            plain = name in (RANDOM, EVERYTHING)
            line = panel.plot(
                labels,
                mean,
                label=name,
                color=_color(name),
                linestyle=":" if name == EVERYTHING else "-",
                linewidth=2 if plain else 1.5,
            )[0]
            panel.fill_between(
                labels,
                mean - 2 * error,
                mean + 2 * error,
                color=line.get_color(),
                alpha=0.12,
                linewidth=0,
            )
        panel.set(
            xlabel="labels"
            if EVERYTHING not in _drawn(results, experiment)
            else f"labels ({EVERYTHING}: many times as many)",
            ylabel="held-out reward",
            title=f"{experiment.title}, {len(seeds)} seeds",
        )
        panel.grid(alpha=0.3)
        panel.legend(title="band: ± 2 standard errors", fontsize=8, title_fontsize=8)
    _save(figure, path)


def _color(name: str) -> str:
    """A method has one color in all pictures; matplotlib's own ten are not enough."""
    if name in (RANDOM, EVERYTHING):
        return "black"
    return "gold" if name == WORDS_DIFFERENCE else f"C{_DRAWN.index(name)}"


def draw_frontiers(results: Results, experiment: Experiment, path: Path) -> None:
    """Held-out reward against the distance from the start and against what a run costs, a point a
    round, means over seeds."""
    plt = _pyplot()
    seeds = seeds_of(results, experiment)
    costs = costs_of(results, variants_made(results, experiment), seeds)
    against = {
        "kl": "KL(policy, start), nats a response",
        **({} if costs is None else {"passes": "thousands of forward passes of a token"}),
    }
    figure, panels = plt.subplots(
        1, len(against), figsize=(6.2 * len(against), 4.6), layout="constrained", squeeze=False
    )
    for axes, (metric, label) in zip(panels[0], against.items(), strict=True):
        for name in _drawn(results, experiment):
            if name == EVERYTHING:
                continue
            variant = next(v for v in experiment.variants if v.method == name)
            runs = [results.runs(variant.key)[seed] for seed in seeds]
            x, reward = (
                np.mean([run[what] for run in runs], axis=0) for what in (metric, "reward")
            )
            axes.plot(x, reward, marker="o", markersize=4, label=name, color=_color(name))
        axes.set(xlabel=label, ylabel="held-out reward")
        axes.grid(alpha=0.3)
    figure.suptitle(f"{experiment.title}, {len(seeds)} seeds, a point per round")
    panels[0][-1].legend(fontsize=9)
    _save(figure, path)


def draw_bound(results: Results, mains: Sequence[Experiment], path: Path) -> None:
    """The error of estimated reward differences against their width, both after the last round."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(5.6, 4.2), layout="constrained")
    for experiment, line in zip(mains, ("-", "--"), strict=False):
        for variant in variants_made(results, experiment):
            runs = list(results.runs(variant.key).values())
            if "width" not in runs[0]:
                continue
            width, error = (
                np.mean([run[name] for run in runs], axis=0) for name in ("width", "error")
            )
            axes.plot(
                width,
                error,
                marker="o",
                linestyle=line,
                label=f"{variant.method}; {experiment.name.removeprefix('main ')} reward",
                color="black" if variant.method == RANDOM else "C2",
            )
    axes.set(
        xlabel="width |φ|_V⁻¹ (mean of a tenth of the pairs)",
        ylabel="|estimated − true reward difference|",
        title="Held-out pairs after 100 labels",
    )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    _save(figure, path)


def _drawn(results: Results, experiment: Experiment) -> list[str]:
    made = {v.method for v in variants_made(results, experiment)}
    return [name for name in _DRAWN if name in made]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    _pyplot().close(figure)
