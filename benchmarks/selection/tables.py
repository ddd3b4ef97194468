"""Tables of `make selection`: the greedy selection beside its peers."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import Row, optional, table, where_and_when


def selection_tables(result: dict[str, Any]) -> dict[str, str]:
    """Markdown by table name, of a run's figures."""
    where = result["environment"]
    found = {
        "selection machine": where_and_when(where, where["date"], where["commit"]),
        "selection": _against_the_loop(result["contenders"] + result["lam"]),
    }
    for normalize in dict.fromkeys(r["normalize"] for r in result["contenders"]):
        own = [r for r in result["contenders"] if r["normalize"] == normalize]
        found[f"selection: {normalize or 'none'}"] = _contenders(own)
    found["selection: growth"] = _points(
        result["growth"] + [{"axis": "–", **r} for r in result["others"]]
    )
    found["selection: exponents"] = _exponents(result["exponents"])
    found["selection: paper"] = _paper_table(result)
    return found


def _against_the_loop(records: list[Row]) -> str:
    """One line per normalization and λ: the loop and ours."""
    loops = {(r["normalize"], r["lam"]): r for r in records if "loop" in r["contender"]}
    ours = [r for r in records if "ours" in r["contender"]]
    return (
        _at(ours[0])
        + ".\n\n"
        + table(
            ours,
            {
                "normalized": _normalized,
                "λ": lambda r: f"{r['lam']:g}",
                "loop, s": lambda r: _seconds(loops[r["normalize"], r["lam"]]["seconds"]),
                "ours, s": lambda r: _seconds(r["seconds"]),
                "times as fast": lambda r: f"{r['speedup']:.1f}",
                "rows touched a pick": _touched,
                "readings of all rows": lambda r: f"{r['readings']:.0f}",
                "loop's first picks as ours": lambda r: (
                    f"{loops[r['normalize'], r['lam']]['leading']} of {r['picks']}"
                ),
                "its log det / ours": lambda r: (
                    f"{loops[r['normalize'], r['lam']]['logdet_ratio']:.6f}"
                ),
            },
        )
    )


def _contenders(records: list[Row]) -> str:
    """All contenders at one normalization, ours first."""
    columns = {
        f"{_at(records[0])}, {_normalized(records[0])}": lambda r: r["contender"],
        "seconds": _total,
        "to the first pick": lambda r: _seconds(r["first_pick_seconds"]),
        "loop / it": lambda r: _ratio(r["speedup"]),
        "readings": lambda r: f"{r['readings']:.0f}",
        "peak MiB": lambda r: optional(r, "peak_mib", "{:.0f}"),
        "first picks as ours": lambda r: f"{r['leading']} of {r['measured_picks']}",
        "in common": lambda r: f"{r['common']} of {r['measured_picks']}",
        "log det / ours": lambda r: optional(r, "logdet_ratio", "{:.6f}"),
        "rounds": lambda r: str(r["rounds"]),
    }
    if all(r["peak_mib"] is None for r in records):
        columns.pop("peak MiB")
    return table(records, columns)


def _points(records: list[Row]) -> str:
    """One line per point and normalization: the loop and ours."""
    key = ("axis", "pairs", "k", "picks", "responses", "normalize", "lam")
    lines = []
    for values in dict.fromkeys(tuple(r[name] for name in key) for r in records):
        own, loop = (
            next(
                r
                for r in records
                if tuple(r[name] for name in key) == values and who in r["contender"]
            )
            for who in ("ours", "loop")
        )
        lines.append({**own, "loop": loop})
    return table(
        lines,
        {
            "along": lambda r: r["axis"],
            "N": lambda r: f"{r['pairs']:,}",
            "k": lambda r: str(r["k"]),
            "B": lambda r: str(r["picks"]),
            "responses": lambda r: str(r["responses"]),
            "normalized": _normalized,
            "loop, s": lambda r: _total(r["loop"]),
            "ours, s": lambda r: _seconds(r["seconds"]),
            "times as fast": lambda r: f"{r['speedup']:.1f}",
            "rows touched a pick": _touched,
            "readings": lambda r: f"{r['readings']:.0f}",
            "loop's first picks as ours": lambda r: (
                f"{r['loop']['leading']} of {r['loop']['measured_picks']}"
            ),
            "rounds": lambda r: str(r["rounds"]),
        },
    )


def _exponents(records: list[Row]) -> str:
    """How the seconds of each contender grow with N, k and B."""
    exponents = {(e["contender"], e["normalize"], e["axis"]): e["exponent"] for e in records}
    return table(
        [
            {"contender": c, "normalize": n}
            for c, n in dict.fromkeys((e["contender"], e["normalize"]) for e in records)
        ],
        {
            "seconds grow as": lambda r: f"{r['contender']}, {_normalized(r)}",
            **{
                axis: lambda r, axis=axis: (
                    f"{axis}^{exponents[r['contender'], r['normalize'], axis]:.2f}"
                )
                for axis in "NkB"
            },
        },
    )


def _paper_table(result: dict[str, Any]) -> str:
    """The measured selections of the paper's round, each as a share of a whole round on paper."""
    stages = result["paper_round"]["seconds"]
    rest = sum(stages.values())
    point = result["paper"][0]
    about = (
        f"{_at(point)}, {point['history']:,} labeled pairs as history. On paper the rest of "
        f"the round takes {rest:,.0f} s: "
        + ", ".join(f"{name} {value:,.0f}" for name, value in stages.items())
        + "."
    )
    return (
        about
        + "\n\n"
        + table(
            result["paper"],
            {
                "selection, measured here": lambda r: r["contender"],
                "seconds": _total,
                "to the first pick": lambda r: _seconds(r["first_pick_seconds"]),
                "loop / it": lambda r: _ratio(r["speedup"]),
                "share of the round": lambda r: f"{r['seconds'] / (r['seconds'] + rest):.2%}",
                "first picks as ours": lambda r: f"{r['leading']} of {r['measured_picks']}",
            },
        )
    )


def on_disk_table(result: dict[str, Any]) -> str:
    """Markdown of the figures of `selection/on_disk.py`."""
    about = (
        f"{result['rows']:,} rows × {result['k']:,} numbers in {result['dtype']}, "
        f"{result['gib']:.1f} GiB on disk; {result['pairs']:,} pairs, {result['picks']} "
        "picks. Reading them all once in PyTorch, right after: "
        f"{result['read_once_seconds']:.1f} s. "
    )
    where = result["environment"]
    return (
        about
        + where_and_when(where, where["date"], where["commit"])
        + "\n\n"
        + table(
            result["runs"],
            {
                "normalized": lambda r: r["normalize"],
                "seconds": lambda r: f"{r['seconds']:.1f}",
                "rows looked at after the first scores": lambda r: f"{r['touched']:,}",
                "peak resident GiB": lambda r: f"{r['peak_gib']:.2f}",
            },
        )
    )


def _at(r: Row) -> str:
    return f"N = {r['pairs']:,}, k = {r['k']}, B = {r['picks']}"


def _normalized(r: Row) -> str:
    return f'"{r["normalize"]}"' if r["normalize"] else "none"


def _touched(r: Row) -> str:
    return optional(r, "touched", "{:.1%}")


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _total(r: Row) -> str:
    """Seconds; numbers extrapolated from a few picks are marked."""
    return ("≈ " if r["measured_picks"] < r["picks"] else "") + _seconds(r["seconds"])


def _ratio(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"
