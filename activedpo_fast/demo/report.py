"""The demo's table, its picture, and a summary of what they show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from activedpo_fast._files import atomic_path
from activedpo_fast.training.heldout import heldout_files, heldout_rewards, paired
from activedpo_fast.training.run_folder import RoundRecord

STAGES = ("generate", "features", "select", "label", "train", "evaluate")
_TOLD_APART = 2.0  # standard errors


def table(runs: Mapping[str, Sequence[RoundRecord]]) -> str:
    """Format one line per strategy and round: labels, reward, gain over the start, seconds."""
    head = [
        "strategy",
        "labels",
        "held-out reward",
        "gain over the start",
        *(f"{stage} s" for stage in STAGES),
    ]
    body = []
    for strategy, records in runs.items():
        for n, record in enumerate(records):
            metrics = record.metrics
            gain = f"{metrics['gain']:+.3f} ± {metrics['gain_se']:.3f}" if n else ""
            seconds = [_seconds(record.seconds.get(stage)) for stage in STAGES]
            body.append(
                [strategy, str(record.labels_total), f"{metrics['reward']:.3f}", gain, *seconds]
            )
        total = [_seconds(_total(records, stage)) for stage in STAGES]
        body.append([strategy, "", "", "total", *total])
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(head, widths, strict=True)) + " |",
        "|" + "|".join("-" * (w + 2) for w in widths) + "|",
    ]
    lines += [
        "| " + " | ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in body
    ]
    return "\n".join(lines)


def verdict(runs: Mapping[str, Sequence[RoundRecord]], folders: Mapping[str, Path]) -> str:
    """Say how certain each strategy's gain is, and which strategies this run distinguishes."""
    gains = []
    for strategy, records in runs.items():
        last = records[-1].metrics
        errors = (
            f" ({last['gain'] / last['gain_se']:.1f} standard errors)"
            if (last["gain_se"] > 0)
            else ""
        )
        gains.append(f"{strategy} {last['gain']:+.3f}{errors}")
    found = [
        f"After {next(iter(runs.values()))[-1].labels_total} labels, over the start: "
        f"{', '.join(gains)}."
    ]
    ends = {name: heldout_rewards(heldout_files(folder)[-1]) for name, folder in folders.items()}
    for a, b in combinations(ends, 2):
        difference, error = paired(ends[a], ends[b])
        apart = abs(difference) > _TOLD_APART * error
        found.append(
            f"{a} minus {b}: {difference:+.3f} ± {error:.3f}, "
            f"{'distinguished' if apart else 'not distinguished'} by these prompts."
        )
    found.append(
        "± is one standard error over the held-out prompts. It does not include how "
        "prompts, responses and labels vary between seeds (docs/evidence.md has several "
        "seeds)."
    )
    return "\n".join(found)


def draw(runs: Mapping[str, Sequence[RoundRecord]], path: Path, title: str, unit: str) -> None:
    """Plot gain in held-out reward against labels, with paired standard errors, and the start."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    axes.axhline(0, color="gray", linestyle="--", linewidth=1, label="start")
    for n, (strategy, records) in enumerate(runs.items()):
        labels = [record.labels_total for record in records]
        gain = [record.metrics["gain"] for record in records]
        error = [record.metrics["gain_se"] for record in records]
        color = "black" if strategy == "random" else f"C{n}"
        axes.errorbar(
            labels, gain, yerr=error, marker="osD^v"[n % 5], capsize=3, label=strategy, color=color
        )
    axes.set_xlabel("labels so far")
    axes.set_ylabel(f"gain in held-out reward ({unit})")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(title="bars: ± 1 standard error, paired", fontsize=9, title_fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def _total(records: Sequence[RoundRecord], stage: str) -> float | None:
    known = [r.seconds[stage] for r in records if stage in r.seconds]
    return sum(known) if known else None


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
