"""Tables of docs/evidence.md, from the runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from activedpo_fast._files import read_json
from benchmarks.claims.experiments import EVERYTHING, RANDOM, Experiment
from benchmarks.claims.learned_difference import HALFWAY, MINILM, WORDS
from benchmarks.claims.learned_difference import RESULT as LEARNED
from benchmarks.claims.linear_fit import RESULT as FITS
from benchmarks.claims.results import Results
from benchmarks.claims.shown import costs_of, curves_of, seeds_of, variants_made
from benchmarks.claims.statistics import Comparison, Estimate, compare, mean_and_error
from benchmarks.markdown import Row, table
from benchmarks.selection.paper import Assumptions, paper_round

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
    seeds = seeds_of(results, experiment)
    made = variants_made(results, experiment)
    curves = {v.method: curves_of(results, v, seeds) for v in made}
    setting = experiment.variants[0].setting
    labels = np.arange(setting.rounds + 1.0) * setting.batch_size
    costs = costs_of(results, made, seeds)
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
    seeds = seeds_of(results, experiment)
    cells: dict[tuple[str, str], str] = {}
    made = variants_made(results, experiment)
    for v in made:
        own = curves_of(results, v, seeds)[:, 1:].mean(axis=1)
        base = curves_of(results, experiment.baseline(v.row), seeds)[:, 1:].mean(axis=1)
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


def learned_table() -> str:
    """How well labels so far tell which pairs are far apart (`learned_difference`)."""
    result = read_json(LEARNED)
    found = {(r["by"], r["labels"]): r for r in result["found"]}
    counts = sorted({labels for _, labels in found})

    def correlation(r: Row) -> str:
        first, last = (found[r["by"], n].get("correlation") for n in (counts[0], counts[-1]))
        return "–" if first is None else f"{first:.2f} to {last:.2f}"

    def right(r: Row) -> str:
        shares = [found[r["by"], n].get("right") for n in counts]
        return "–" if None in shares else f"{np.mean(shares):.0%}"

    columns = {
        f"{count} labels": lambda r, count=count: f"{found[r['by'], count]['apart']:.2f}"
        for count in counts
    }
    return f"{result['seeds']} seeds.\n\n" + table(
        [
            {"by": name}
            for name in (
                "random",
                "gradients",
                "hidden states",
                WORDS,
                HALFWAY,
                MINILM,
                "VADER",
                "a rating learned on tweets",
                "the truth",
            )
        ],
        {
            "64 pairs picked by": lambda r: r["by"],
            **columns,
            "correlation, first to last": correlation,
            "pairs ranked right": right,
        },
    )


def _everything(setting: Any) -> str:
    pairs = setting.n_responses * (setting.n_responses - 1) // 2 * setting.prompts_per_round
    return f"{EVERYTHING}, {pairs // setting.batch_size} times as many"


def _summary(name: str, value: Any) -> float:
    """Of a metric with a number a round: of all labels for what is of labels, or at the end."""
    return float(np.mean(value) if name in ("agreement", "difference") else np.ravel(value)[-1])


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
