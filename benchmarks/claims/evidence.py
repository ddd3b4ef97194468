"""Tables and pictures of docs/evidence.md, from the runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activedpo_fast._files import atomic_path, read_json
from benchmarks.claims.experiments import EVERYTHING, RANDOM, Experiment, Variant
from benchmarks.claims.linear_fit import RESULT as FITS
from benchmarks.claims.results import Results
from benchmarks.claims.statistics import Comparison, Estimate, compare, mean_and_error
from benchmarks.report import table, write_into
from benchmarks.selection.paper import Assumptions, paper_round

_DRAWN = (
    RANDOM,
    "activedpo, response",
    "activedpo, none",
    "adpo_plus",
    "apo",
    "margin_large",
    "trace_plus",
    EVERYTHING,
)


_PAPER_LABELS = 500  # of ten rounds; half of them on average

# The column's name and how its numbers are written; see `_summary`.
_METRICS = {
    "accuracy": ("ranked right", "{:.1%}"),
    "agreement": ("labels right", "{:.1%}"),
    "difference": ("ratings apart", "{:.2f}"),
    "win_rate": ("wins over the start", "{:.1%}"),
    "vader": ("VADER", "{:.3f}"),
    "words": ("words", "{:.1f}"),
    "kl": ("KL", "{:.2f}"),
}


def document(
    results: Mapping[str, Results], experiments: Mapping[str, Sequence[Experiment]], path: Path
) -> None:
    """Put the tables into `path` and the figures next to it; tables without runs are left
    unchanged.

    Args:
        results, experiments: by task.
    """
    found = {"claims: paper": paper_table(), "claims: linear fit": fit_table()}
    for task, known in results.items():
        own = [e for e in experiments[task] if len(_seeds(known, e)) > 1]
        mains = [e for e in own if e.name.startswith("main")]
        if own:
            found[f"claims: {task} machine"] = _machine(known.environment)
        for experiment in own:
            make = (
                single_table
                if not experiment.compared
                else (main_table if experiment in mains else grid_table)
            )
            found[f"claims: {experiment.name}"] = make(known, experiment)
        drawn = [e for e in mains if e.drawn]
        if drawn:
            draw_curves(known, drawn, path.with_name(f"evidence_{task}.png"))
        if drawn and task == "known_reward":
            draw_bound(known, drawn, path.with_name("evidence_bound.png"))
        if drawn and task == "reviews":
            draw_frontiers(known, drawn[0], path.with_name("evidence_reviews_kl.png"))
    path.write_text(write_into(path.read_text(), found))
    print(f"written: {path}")


def single_table(results: Results, experiment: Experiment) -> str:
    """One line per run: its gain over its own start, in paired standard errors over prompts."""
    rows = [
        {"row": v.row, "seed": seed, **run}
        for v in experiment.variants
        for seed, run in sorted(results.runs(v.key).items())
    ]
    return f"{experiment.title}.\n\n" + table(
        rows,
        {
            **({"": lambda r: r["row"]} if len(experiment.variants) > 1 else {}),
            "seed": lambda r: str(r["seed"]),
            "labels": lambda r: str(r["labels"][-1]),
            "reward before": lambda r: f"{r['reward'][0]:.3f}",
            "after": lambda r: f"{r['reward'][-1]:.3f}",
            "gain": lambda r: f"{r['reward'][-1] - r['reward'][0]:+.3f} ± {r['gain_se'][-1]:.3f}",
            "standard errors": lambda r: (
                f"{(r['reward'][-1] - r['reward'][0]) / r['gain_se'][-1]:.1f}"
            ),
            "VADER before": lambda r: f"{r['vader'][0]:.3f}",
            "VADER after": lambda r: f"{r['vader'][-1]:.3f}",
            "KL": lambda r: f"{r['kl'][-1]:.2f}",
        },
    )


def main_table(results: Results, experiment: Experiment) -> str:
    """One line per method: its reward on the way, and the comparison with random picks."""
    seeds = _seeds(results, experiment)
    made = _made(results, experiment)
    curves = {v.method: _curves(results, v, seeds) for v in made}
    setting = experiment.variants[0].setting
    labels = np.arange(setting.rounds + 1.0) * setting.batch_size
    costs = _costs(results, made, seeds)
    compared = compare(
        {name: c for name, c in curves.items() if name != EVERYTHING}, RANDOM, labels, costs
    )
    marks = [int(labels[round(share * setting.rounds)]) for share in (0.2, 0.5, 1.0)]
    rows = []
    for v in made:
        runs = [results.runs(v.key)[seed] for seed in seeds]
        mean, error = mean_and_error(curves[v.method])
        rows.append(
            {
                "method": v.method if v.method != EVERYTHING else _everything(setting),
                "comparison": compared.get(v.method),
                **{f"{n}": f"{mean[n // setting.batch_size]:.3f}" for n in marks[:-1]},
                f"{marks[-1]}": f"{mean[-1]:.3f} ± {error[-1]:.3f}",
                **{
                    name: float(np.mean([_summary(name, run[name]) for run in runs]))
                    for name in _METRICS
                    if name in runs[0]
                },
            }
        )
    metrics = [name for name in _METRICS if name in rows[0]]
    return f"{len(seeds)} seeds.\n\n" + table(
        rows,
        {
            "picks": lambda r: r["method"],
            **{f"{n} labels": lambda r, n=n: r[f"{n}"] for n in marks},
            "area over random": lambda r: _area(r["comparison"]),
            "p, Holm": lambda r: _p(r["comparison"]),
            "labels saved": lambda r: _saved(r["comparison"] and r["comparison"].saved),
            **(
                {}
                if costs is None
                else {
                    "passes": lambda r: (
                        f"{costs[r['method']][-1]:.0f}" if r["method"] in costs else "–"
                    ),
                    "passes saved": lambda r: _saved(r["comparison"] and r["comparison"].cheaper),
                }
            ),
            **{
                _METRICS[name][0]: lambda r, name=name: _METRICS[name][1].format(r[name])
                for name in metrics
            },
        },
    )


def grid_table(results: Results, experiment: Experiment) -> str:
    """Rows and columns of the experiment; in a cell the mean reward over the rounds, and over
    random picks in the same row."""
    seeds = _seeds(results, experiment)
    cells: dict[tuple[str, str], str] = {}
    made = _made(results, experiment)
    for v in made:
        own = _curves(results, v, seeds)[:, 1:].mean(axis=1)
        base = _curves(results, experiment.baseline(v.row), seeds)[:, 1:].mean(axis=1)
        cells[v.row, v.column] = f"{own.mean():.3f}"
        if v.method != RANDOM:
            difference = own - base
            half = 1.96 * difference.std(ddof=1) / np.sqrt(len(seeds))
            cells[v.row, v.column] += f" ({difference.mean():+.3f} ± {half:.3f})"
    rows = [{"row": row} for row in dict.fromkeys(v.row for v in made)]
    columns = dict.fromkeys(v.column for v in made)
    return f"{experiment.title}; {len(seeds)} seeds.\n\n" + table(
        rows,
        {
            "": lambda r: r["row"],
            **{c: lambda r, c=c: cells.get((r["row"], c), "–") for c in columns},
        },
    )


def paper_table() -> str:
    """Estimated hours of ten rounds in the paper's settings; nothing of this is measured."""
    rows = []
    for model, weights in (("Llama-2-7B", 6.74e9), ("Gemma-2B", 2.51e9), ("Qwen3-4B", 4.02e9)):
        for data, prompt, response in (("TL;DR", 350, 50), ("WebGPT", 50, 250)):
            assumed = Assumptions(
                weights=weights,
                labeled=_PAPER_LABELS // 2,
                epochs=4,
                prompt_tokens=prompt,
                response_tokens=response,
            )
            seconds = paper_round(assumed)["seconds"]
            hours = {name: 10 * value / 3600 for name, value in seconds.items()}
            rows.append({"model": model, "data": data, **hours, "all": sum(hours.values())})
    return table(
        rows,
        {
            "ten rounds, hours of one A100": lambda r: f"{r['model']}, {r['data']}",
            "generate": lambda r: f"{r['generate']:.1f}",
            "gradients": lambda r: f"{r['gradients'] + r['gradients of labeled pairs']:.1f}",
            "train": lambda r: f"{r['train']:.1f}",
            "together": lambda r: f"{r['all']:.1f}",
        },
    )


def fit_table() -> str:
    """How much of each known reward is linear in the features (`linear_fit`)."""
    result = read_json(FITS)
    names = {
        "linear": "learnable exactly",
        "synopsis": "can only be come near",
        "reviews": "the review task, gradients of the language model",
    }
    rows = [{"name": names[name], **fit} for name, fit in result["fits"].items()]
    return table(
        rows,
        {
            "reward": lambda r: r["name"],
            "variance explained": lambda r: f"{r['r2']:.1%}",
            "reward earned": lambda r: f"{r['reward']:.3f}",
            "pairs ranked right": lambda r: f"{r['accuracy']:.1%}",
        },
    )


def draw_curves(results: Results, mains: Sequence[Experiment], path: Path) -> None:
    """Held-out reward against labels, one panel per experiment."""
    plt = _pyplot()
    figure, axes = plt.subplots(
        1, len(mains), figsize=(6.2 * len(mains), 4.6), layout="constrained", squeeze=False
    )
    for panel, experiment in zip(axes[0], mains, strict=True):
        seeds = _seeds(results, experiment)
        setting = experiment.variants[0].setting
        labels = np.arange(setting.rounds + 1) * setting.batch_size
        for n, name in enumerate(_drawn(results, experiment)):
            variant = next(v for v in experiment.variants if v.method == name)
            mean, error = mean_and_error(_curves(results, variant, seeds))
            plain = name in (RANDOM, EVERYTHING)
            line = panel.plot(
                labels,
                mean,
                label=name,
                color="black" if plain else f"C{n}",
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
            xlabel=f"labels ({EVERYTHING}: many times as many)",
            ylabel="held-out reward",
            title=f"{experiment.title}, {len(seeds)} seeds",
        )
        panel.grid(alpha=0.3)
    axes[0][-1].legend(title="band: ± 2 standard errors", fontsize=9, title_fontsize=8)
    _save(figure, path)


def draw_frontiers(results: Results, experiment: Experiment, path: Path) -> None:
    """Held-out reward against the distance from the start and against what a run costs, a point a
    round, means over seeds."""
    plt = _pyplot()
    seeds = _seeds(results, experiment)
    costs = _costs(results, _made(results, experiment), seeds)
    against = {
        "kl": "KL(policy, start), nats a response",
        **({} if costs is None else {"passes": "thousands of forward passes of a token"}),
    }
    figure, panels = plt.subplots(
        1, len(against), figsize=(6.2 * len(against), 4.6), layout="constrained", squeeze=False
    )
    for axes, (metric, label) in zip(panels[0], against.items(), strict=True):
        for n, name in enumerate(_drawn(results, experiment)):
            if name == EVERYTHING:
                continue
            variant = next(v for v in experiment.variants if v.method == name)
            runs = [results.runs(variant.key)[seed] for seed in seeds]
            x, reward = (
                np.mean([run[what] for run in runs], axis=0) for what in (metric, "reward")
            )
            axes.plot(
                x,
                reward,
                marker="o",
                markersize=4,
                label=name,
                color="black" if name == RANDOM else f"C{n}",
            )
        axes.set(
            xlabel=label,
            ylabel="held-out reward",
            title=f"{experiment.title}, {len(seeds)} seeds, a point a round",
        )
        axes.grid(alpha=0.3)
    panels[0][-1].legend(fontsize=9)
    _save(figure, path)


def draw_bound(results: Results, mains: Sequence[Experiment], path: Path) -> None:
    """The error of estimated reward differences against their width, both after the last round."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(5.6, 4.2), layout="constrained")
    for experiment, line in zip(mains, ("-", "--"), strict=False):
        for variant in _made(results, experiment):
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


def _everything(setting: Any) -> str:
    pairs = setting.n_responses * (setting.n_responses - 1) // 2 * setting.prompts_per_round
    return f"{EVERYTHING}, {pairs // setting.batch_size} times as many"


def _made(results: Results, experiment: Experiment) -> tuple[Variant, ...]:
    """The variants with two runs or more, and not far fewer than others: a table has the seeds that
    all of its lines have, and may be filled in over several days."""
    runs = {v.key: min(len(results.runs(v.key)), experiment.seeds) for v in experiment.variants}
    least = max(2, 2 * max(runs.values()) // 3)
    return tuple(v for v in experiment.variants if runs[v.key] >= least)


def _drawn(results: Results, experiment: Experiment) -> list[str]:
    made = {v.method for v in _made(results, experiment)}
    return [name for name in _DRAWN if name in made]


def _seeds(results: Results, experiment: Experiment) -> list[int]:
    """Those that every variant made has a run of, and random picks in each row."""
    keys = {v.key for v in _made(results, experiment)}
    if experiment.compared:
        keys |= {experiment.baseline(v.row).key for v in _made(results, experiment)}
    if not keys:
        return []
    return sorted(set.intersection(*(set(results.runs(key)) for key in keys)))[: experiment.seeds]


def _curves(results: Results, variant: Variant, seeds: Sequence[int]) -> NDArray[np.float64]:
    runs = results.runs(variant.key)
    return np.array([runs[seed]["reward"] for seed in seeds])


def _summary(name: str, value: Any) -> float:
    """Of a metric with a number a round: of all labels for what is of labels, or at the end."""
    return float(np.mean(value) if name in ("agreement", "difference") else np.ravel(value)[-1])


def _costs(
    results: Results, made: Sequence[Variant], seeds: Sequence[int]
) -> dict[str, NDArray[np.float64]] | None:
    """Mean passes of each method on the way, where they were counted."""
    runs = {v.method: [results.runs(v.key)[seed] for seed in seeds] for v in made}
    if not all("passes" in run for each in runs.values() for run in each):
        return None
    return {name: np.mean([run["passes"] for run in each], axis=0) for name, each in runs.items()}


def _area(comparison: Comparison | None) -> str:
    if comparison is None:
        return "–"
    value, low, high = comparison.area
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def _p(comparison: Comparison | None) -> str:
    if comparison is None:
        return "–"
    return "< 0.001" if comparison.p_holm < 0.001 else f"{comparison.p_holm:.3f}"


def _saved(share: Estimate | None) -> str:
    if share is None:
        return "–"
    value, low, high = share
    if np.isnan(value):
        return "none"
    ends = [f"{end:.0%}" if np.isfinite(end) else "none" for end in (low, high)]
    return f"{value:.0%} [{ends[0]}, {ends[1]}]"


def _machine(where: dict[str, Any]) -> str:
    if not where:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return f"{where['processor']}, one core a run, {where['date']}; {versions}."


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    _pyplot().close(figure)
