"""The figure of `benchmarks.selection`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from activedpo_fast._files import atomic_path

_FIELDS = {"N": "pairs", "k": "k", "B": "picks"}
_STYLES = {
    ("ours", "response"): ("C0", "-", "o"),
    ("ours", None): ("C0", "--", "s"),
    ("loop", "response"): ("C3", "-", "o"),
    ("loop", None): ("C3", "--", "s"),
}


def draw(result: dict[str, Any], path: Path) -> None:
    """Seconds against N, k and B, each with the exponent of a straight line through the points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base = result["settings"]["plan"]["base"]
    figure, panels = plt.subplots(1, 3, figsize=(13, 5.2), layout="constrained", sharey=True)
    for axes, (axis, field) in zip(panels, _FIELDS.items(), strict=True):
        for line in (e for e in result["exponents"] if e["axis"] == axis):
            own = [
                r
                for r in result["growth"]
                if r["axis"] == axis
                and r["contender"] == line["contender"]
                and r["normalize"] == line["normalize"]
            ]
            who = "ours" if "ours" in line["contender"] else "loop"
            color, style, marker = _STYLES[who, line["normalize"]]
            name = "ours" if who == "ours" else line["contender"]
            norm = "by response" if line["normalize"] else "not normalized"
            axes.plot(
                [r[field] for r in own],
                [r["seconds"] for r in own],
                color=color,
                linestyle=style,
                marker=marker,
                label=f"{name}, {norm}: {axis}$^{{{line['exponent']:.2f}}}$",
            )
        at = [f"{name} = {base[field]:,}" for name, field in _FIELDS.items() if name != axis]
        at.append(f"{own[0]['responses']} responses a prompt")
        values = sorted({r[field] for r in result["growth"] if r["axis"] == axis})
        axes.set(xscale="log", yscale="log", xlabel=axis, title=", ".join(at))
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    panels[0].set_ylabel("seconds of a whole selection")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)
