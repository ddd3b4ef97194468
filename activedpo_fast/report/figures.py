"""The charts of a report: SVG to put into a page, in the page's colors, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from activedpo_fast.errors import ActiveDPOError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Matplotlib draws in these colors; the page defines the variables that replace them.
_INK, _LINE = "#a100f0", "#a100f1"
_SERIES = [f"#a100{n:02x}" for n in range(1, 7)]
_VARIABLES = {_INK: "var(--ink)", _LINE: "var(--line)"} | {
    color: f"var(--c{n})" for n, color in enumerate(_SERIES, start=1)
}
_MARKERS, _DASHES = "osD^vP", ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "activedpo",  # the same bytes for the same data
    "text.parse_math": False,  # a $ in a name is a $
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.0,
    "legend.frameon": False,
    **dict.fromkeys(
        (
            "text.color",
            "axes.edgecolor",
            "axes.labelcolor",
            "axes.titlecolor",
            "xtick.color",
            "ytick.color",
        ),
        _INK,
    ),
}


@dataclass(frozen=True)
class Series:
    """A curve; `errors` are standard errors, or None where they are not known."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float | None]


def check_matplotlib() -> None:
    """Raise ActiveDPOError if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ActiveDPOError(
            f"the charts of a report need matplotlib: pip install activedpo-fast[report] ({error})"
        ) from error


def curves(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """Return lines with markers and error bars of one standard error."""

    def draw(axes: Axes) -> None:
        for n, one in enumerate(series):
            color = _SERIES[n % len(_SERIES)]
            axes.plot(
                one.x,
                one.y,
                color=color,
                linestyle=_DASHES[n % len(_DASHES)],
                marker=_MARKERS[n % len(_MARKERS)],
                markersize=4.5,
                label=_legend_name(one.name),
            )
            known = [
                (x, y, e) for x, y, e in zip(one.x, one.y, one.errors, strict=True) if e is not None
            ]
            if known:
                x, y, e = zip(*known, strict=True)
                axes.errorbar(x, y, yerr=e, fmt="none", ecolor=color, capsize=3, linewidth=1)
        if len(series) > 1:
            axes.legend()

    ends = "; ".join(
        f"{one.name} from {one.y[0]:.4g} at {one.x[0]:.4g} to {one.y[-1]:.4g} at {one.x[-1]:.4g}"
        for one in series
        if len(one.x)
    )
    return _svg(title, x_label, y_label, f"{y_label} by {x_label}. {ends}", draw)


def stacked_bars(
    title: str,
    y_label: str,
    names: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    all_parts: Sequence[str],
) -> str:
    """Return a bar for each of `names`, divided into parts; `all_parts` have a fixed color each."""

    def draw(axes: Axes) -> None:
        bottom = np.zeros(len(names))
        for part, values in parts.items():
            color = _SERIES[all_parts.index(part) % len(_SERIES)]
            axes.bar(names, values, 0.7, bottom=bottom, color=color, label=_legend_name(part))
            bottom += values
        axes.grid(visible=False, axis="x")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)

    sums = "; ".join(f"{part} {sum(values):.4g}" for part, values in parts.items())
    return _svg(title, "round", y_label, f"{y_label} of each round, by stage. In all: {sums}", draw)


def histogram(title: str, x_label: str, groups: Mapping[str, Sequence[float]]) -> str:
    """Return the share of each group by size, up to the 99th percentile of all."""
    largest = max(float(np.quantile(values, 0.99)) for values in groups.values())
    bins = np.linspace(0, max(largest, 1.0), 21)

    def draw(axes: Axes) -> None:
        for n, (name, values) in enumerate(groups.items()):
            share = np.histogram(np.minimum(values, bins[-1]), bins)[0] / len(values)
            color, dashes = _SERIES[n % len(_SERIES)], _DASHES[n % len(_DASHES)]
            axes.stairs(
                share, bins, color=color, linestyle=dashes, label=_legend_name(name), linewidth=1.6
            )
        axes.legend()

    middles = "; ".join(f"{name}: median {np.median(v):.4g}" for name, v in groups.items())
    return _svg(title, x_label, "share", f"{title}, {x_label}. {middles}", draw)


def _legend_name(name: str) -> str:
    return f" {name}" if name.startswith("_") else name  # matplotlib hides names with _


def _svg(title: str, x_label: str, y_label: str, description: str, draw: Any) -> str:
    """Return the figure as an `svg` element with a description for screen readers."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.0, 3.1), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_title(title)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]  # without what is before it in a file
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    label = escape(description, quote=True)
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        lambda found: f'<svg role="img" aria-label="{label}" viewBox="{found[1]}">',
        svg,
        count=1,
    )
