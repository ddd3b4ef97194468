"""Tables of `make fidelity`: how each sketch changes the picks."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.markdown import Row, table, where_and_when


def fidelity_tables(result: dict[str, Any]) -> dict[str, str]:
    """Markdown by table name, of a run's figures: its machine, and a table a case."""
    where = result["environment"]
    found = {"fidelity machine": where_and_when(where, where["date"], where["commit"])}
    times = {(t["sketch"], t["k"]): t["ratio"] for t in result["time"]}
    for case in dict.fromkeys(r["case"] for r in result["geometry"]):
        lines = []
        for sketch, k in dict.fromkeys((r["sketch"], r["k"]) for r in result["geometry"]):
            of = {"case": case, "sketch": sketch, "k": k}
            lines.append(
                {
                    **of,
                    "time": times[sketch, k],
                    **_means(result["geometry"], **of),
                    **_means(result["selection"], **of, normalize="response", lam=1.0),
                    "pair": _means(result["selection"], **of, normalize="pair", lam=1.0)["ratio"],
                    "none": _means(result["selection"], **of, normalize=None, lam=1.0)["ratio"],
                }
            )
        columns = {
            "sketch": lambda r: r["sketch"],
            "k": lambda r: str(r["k"]),
            "seeds": lambda r: str(r["seeds"]),
            "product error": lambda r: f"{r['inner_product_error']:.3f}",
            "norm distortion": lambda r: f"{r['norm_error']:.3f}",
            "of 50 picks": lambda r: f"{r['overlap']:.1f}",
            "log det": lambda r: f"{r['ratio']:.4f}",
            "from random = 0": lambda r: f"{r['fraction']:.3f}",
            'log det, "pair"': lambda r: f"{r['pair']:.4f}",
            "log det, none": lambda r: f"{r['none']:.4f}",
            "× forward": lambda r: f"{r['time']:.2f}",
        }
        if case != "trained":  # times were taken of that one
            columns.pop("× forward")
        found[f"fidelity: {case}"] = table(lines, columns)
    return found


def cheaper_tables(result: dict[str, Any]) -> dict[str, str]:
    """The same for a run of `benchmarks.fidelity.cheaper`."""
    where = result["environment"]
    found = {"cheaper rows machine": where_and_when(where, where["date"], where["commit"])}
    for case in dict.fromkeys(r["case"] for r in result["cheaper"]):
        kinds = dict.fromkeys((r["rows"], r["per_pick"]) for r in result["cheaper"])
        lines = [_random_line(result["exact"], case)]
        for rows, per_pick in kinds:
            of = {"case": case, "rows": rows, "per_pick": per_pick, "lam": 1.0}
            lines.append(
                {
                    "rows": rows,
                    "per_pick": str(per_pick or "alone"),
                    **{how: _means(result["cheaper"], **of, normalize=how) for how in _HOW},
                }
            )
        columns: dict[str, Any] = {
            "rows": lambda r: r["rows"].replace("last 1 layers", "last layer"),
            "pairs per pick": lambda r: r["per_pick"],
            "exact rows": lambda r: f"{r['response']['exact_share']:.0%}",
        }
        for how in _HOW:
            columns |= {
                f'log det, "{how}"': lambda r, how=how: f"{r[how]['ratio']:.4f}",
                f'from random = 0, "{how}"': lambda r, how=how: f"{r[how]['fraction']:.3f}",
                f'of 50 picks, "{how}"': lambda r, how=how: f"{r[how]['overlap']:.0f}",
            }
        found[f"cheaper rows: {case}"] = table(lines, columns)
    return found


_HOW = ("response", "pair")


def _random_line(references: list[Row], case: str) -> Row:
    """The line of random pairs."""
    line: Row = {"rows": "random pairs", "per_pick": "–"}
    for how in _HOW:
        (found,) = (
            r for r in references if (r["case"], r["normalize"], r["lam"]) == (case, how, 1.0)
        )
        line[how] = {
            "ratio": found["logdet_random"] / found["logdet"],
            "fraction": 0.0,
            "overlap": found["overlap_random"],
            "exact_share": 0.0,
        }
    return line


def _means(records: list[Row], **wanted: Any) -> Row:
    """The means over seeds of the records that agree with `wanted`, and how many there are."""
    found = [r for r in records if all(r[name] == value for name, value in wanted.items())]
    numbers = [
        name
        for name, value in found[0].items()
        if isinstance(value, (int, float)) and name not in wanted
    ]
    return {
        **{name: statistics.mean(r[name] for r in found) for name in numbers},
        "seeds": len(found),
    }
