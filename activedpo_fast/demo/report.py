"""The demo's table and picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from activedpo_fast._files import atomic_path
from activedpo_fast.loop import RoundRecord

STAGES = ("generate", "features", "select", "label", "train", "evaluate")


def table(runs: Mapping[str, Sequence[RoundRecord]]) -> str:
    """One line a round of each strategy: labels, held-out reward ± its standard error, seconds."""
    head = ["strategy", "labels", "held-out reward", *(f"{stage} s" for stage in STAGES)]
    body = []
    for strategy, records in runs.items():
        for record in records:
            reward = f"{record.metrics['reward']:.4f} ± {record.metrics['reward_se']:.4f}"
            seconds = [_seconds(record.seconds.get(stage)) for stage in STAGES]
            body.append([strategy, str(record.labels_total), reward, *seconds])
        total = [_seconds(_total(records, stage)) for stage in STAGES]
        body.append([strategy, "", "total", *total])
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(head, widths, strict=True)) + " |",
             "|" + "|".join("-" * (w + 2) for w in widths) + "|"]
    lines += ["| " + " | ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) + " |"
              for row in body]
    return "\n".join(lines)


def draw(runs: Mapping[str, Sequence[RoundRecord]], path: Path, title: str) -> None:
    """Held-out reward against labels, a curve with ±1 standard error for each strategy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for (strategy, records), marker in zip(runs.items(), "osD^v", strict=False):
        labels = [record.labels_total for record in records]
        reward = [record.metrics["reward"] for record in records]
        error = [record.metrics["reward_se"] for record in records]
        line = axes.plot(labels, reward, marker=marker, label=strategy)[0]
        low = [r - e for r, e in zip(reward, error, strict=True)]
        high = [r + e for r, e in zip(reward, error, strict=True)]
        axes.fill_between(labels, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel("labels so far")
    axes.set_ylabel("mean held-out reward (cosine)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(title="band: ± 1 standard error", fontsize=9, title_fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def _total(records: Sequence[RoundRecord], stage: str) -> float | None:
    known = [r.seconds[stage] for r in records if stage in r.seconds]
    return sum(known) if known else None


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
