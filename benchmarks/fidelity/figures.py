"""The figure of `benchmarks.fidelity`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from activedpo_fast._files import atomic_path
from benchmarks.fidelity.measures import CASES, DIMS, METHODS, Record


def draw(result: Record, path: Path) -> None:
    """Loss of log det against time, and the error of inner products against k; means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for method, marker, color in zip(METHODS, "osD", ("C0", "C1", "C2"), strict=True):
        _draw_loss(left, result, method, marker=marker, color=color)
        _draw_errors(right, result, method, marker=marker, color=color)
    exact = _where(result["exact"], case="trained", normalize="response", lam=1.0)[0]
    unsketched = _where(result["time"], sketch="none")[0]["ratio"]
    left.axhline(
        1 - exact["logdet_random"] / exact["logdet"],
        color="gray",
        linestyle="--",
        label="random pairs",
    )
    left.axvline(unsketched, color="gray", linestyle=":", label="time without a sketch")
    left.set(
        xscale="log",
        yscale="log",
        xlabel="time of gradient rows / time of a forward pass",
        ylabel="1 − log det of the picks / that of exact picks",
        title=f"{len(exact['picks'])} picks, each k (by response, λ = 1, after one round)",
    )
    right.set(
        xscale="log",
        yscale="log",
        xlabel="k",
        ylabel="relative error",
        title="Inner products of gradient rows",
    )
    left.margins(x=0.15)  # room for the labels of points
    _ticks(left.xaxis, [2, 3, 4, 6, 8, 10])
    _ticks(right.xaxis, DIMS)
    _ticks(right.yaxis, [0.1, 0.2, 0.3, 0.5, 1.0])
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def _draw_loss(axes: Any, result: Record, method: str, **style: Any) -> None:
    """The loss of a method against its time, with k next to each point (sjlt's and kronecker's are
    close)."""
    times = [_where(result["time"], sketch=method, k=k)[0]["ratio"] for k in DIMS]
    losses = [
        1
        - _mean(
            _where(
                result["selection"],
                case="trained",
                sketch=method,
                k=k,
                normalize="response",
                lam=1.0,
            ),
            "ratio",
        )
        for k in DIMS
    ]
    axes.plot(times, losses, label=method, **style)
    for k, at, loss in zip(DIMS, times, losses, strict=True):
        offset, side = ((-8, -3), "right") if method == "sjlt" else ((8, -1), "left")
        axes.annotate(
            str(k),
            (at, loss),
            textcoords="offset points",
            xytext=offset,
            ha=side,
            fontsize=7,
            color=style["color"],
        )


def _draw_errors(axes: Any, result: Record, method: str, *, color: str, **style: Any) -> None:
    """A method's error of inner products against k, a line for each case."""
    for case, line, fill in zip(CASES, ("--", "-"), ("white", color), strict=True):
        label = f"{method}, " + ("after one round" if case == "trained" else "B = 0")
        errors = [
            _mean(_where(result["geometry"], case=case, sketch=method, k=k), "inner_product_error")
            for k in DIMS
        ]
        axes.plot(
            DIMS,
            errors,
            color=color,
            linestyle=line,
            label=label,
            markerfacecolor=fill,
            linewidth=4 if method == "sjlt" else 1.5,  # rademacher's points coincide with sjlt's
            markersize=9 if method == "sjlt" else 6,
            **style,
        )


def _ticks(axis: Any, values: Sequence[float]) -> None:
    """Plain numbers on a logarithmic axis."""
    axis.set_ticks(values, [f"{value:g}" for value in values])
    axis.set_ticks([], minor=True)


def _where(records: list[Record], **wanted: Any) -> list[Record]:
    return [r for r in records if all(r[name] == value for name, value in wanted.items())]


def _mean(records: list[Record], name: str) -> float:
    return statistics.mean(r[name] for r in records) if records else math.nan
