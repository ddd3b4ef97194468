"""Tables from the JSON of a benchmark run, for the end of the run and for the documentation.

    python -m benchmarks.report             print the tables of the runs in benchmarks/results
    python -m benchmarks.report --write     put them into the documents

Documents mark the place of a table by a line <!-- benchmark: NAME --> and the end of it by
<!-- end -->; what stands between is replaced, so that no figure is typed by hand.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

RESULTS = Path("benchmarks/results")
DOCUMENTS = ("docs/benchmarks.md", "README.md")
PACKAGES = ("torch", "transformers", "peft", "activedpo-fast")

Row = dict[str, Any]


def describe_run() -> dict[str, Any]:
    """What a figure depends on, besides the code, for a run's machine info."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "instructions": sorted(
            name for name, has in torch.cpu.get_capabilities().items() if has is True
        ),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def tables(rows: list[Row]) -> dict[str, str]:
    """Markdown by table name: "summary", "rows: <workload>", "overhead", "projection"."""
    found: dict[str, str] = {}
    workloads = list(dict.fromkeys(r["workload"] for r in rows if r["group"] == "rows"))
    if workloads:
        found["summary"] = _summary([r for r in rows if r["group"] == "rows"], workloads)
    for workload in workloads:
        part = [r for r in rows if r["group"] == "rows" and r["workload"] == workload]
        found[f"rows: {workload}"] = (
            f"{workload}: {part[0]['pool']}; k = {part[0]['k']}. One plain forward pass: "
            f"{part[0]['yardstick_seconds']:.2f} s.\n\n"
            + table(
                part,
                {
                    "gradient rows": lambda r: r["contender"],
                    "× forward": lambda r: f"{r['ratio']:.2f}",
                    "seconds": lambda r: f"{r['seconds']:.2f}",
                    "peak MiB": lambda r: _optional(r, "peak MiB", "{:.0f}"),
                    "cosine error": lambda r: _optional(r, "cosine error", "{:.4f}"),
                    "norm distortion": lambda r: _optional(r, "norm distortion", "{:.3f}"),
                },
            )
        )
    overhead = [r for r in rows if r["group"] == "overhead"]
    if overhead:
        found["overhead"] = table(
            overhead,
            {
                "workload": lambda r: r["workload"],
                "sketch": lambda r: r["contender"],
                "capture and sketch over the same passes": lambda r: f"{r['ratio'] - 1:+.1%}",
            },
        )
    projection = [r for r in rows if r["group"] == "projection"]
    if projection:
        found["projection"] = table(
            projection,
            {
                "8 × 1,000,000 → 4096": lambda r: r["contender"],
                "seconds": lambda r: (
                    f"{r['seconds']:.4f}" if r["seconds"] < 1 else f"{r['seconds']:.1f}"
                ),
                "× floor": lambda r: f"{r['ratio']:.2f}",
                "floor": lambda r: r["floor"],
                "cosine error": lambda r: f"{r['cosine error']:.4f}",
                "norm distortion": lambda r: f"{r['norm distortion']:.3f}",
            },
        )
    return found


def _summary(rows: list[Row], workloads: list[str]) -> str:
    """Times relative to a plain forward pass, for one of our sketches and all peers."""
    ratio = {(r["contender"], r["workload"]): f"{r['ratio']:.2f}" for r in rows}
    shown = [
        c
        for c in dict.fromkeys(r["contender"] for r in rows)
        if "sjlt" in c or not c.startswith(("**ours**", "floor"))
    ]
    return table(
        [{"contender": c} for c in shown],
        {
            "gradient rows, × one plain forward pass": lambda r: r["contender"],
            **{w: lambda r, w=w: ratio.get((r["contender"], w), "–") for w in workloads},
        },
    )


def write_into(document: str, found: dict[str, str]) -> str:
    """`document` with the tables that it has a place for; a place without a table stays."""

    def replace(match: re.Match[str]) -> str:
        table = found.get(match["name"])
        return match[0] if table is None else f"{match['begin']}\n{table}\n{match['end']}"

    pattern = r"(?P<begin><!-- benchmark: (?P<name>[^>]+?) -->)\n.*?(?P<end><!-- end -->)"
    return re.sub(pattern, replace, document, flags=re.DOTALL)


def fidelity_tables(result: dict[str, Any]) -> dict[str, str]:
    """Markdown by table name, of the figures of `fidelity.py`: its machine, and a table a case."""
    where = result["environment"]
    found = {"fidelity machine": _where_and_when(where, where["date"], where["commit"])}
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
            "k": lambda r: "–" if r["k"] is None else str(r["k"]),
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


def selection_tables(result: dict[str, Any]) -> dict[str, str]:
    """Markdown by table name, of the figures of `selection.py`."""
    where = result["environment"]
    found = {"selection machine": _where_and_when(where, where["date"], where["commit"])}
    loops = {
        (r["normalize"], r["lam"]): r
        for r in result["contenders"] + result["lam"]
        if "loop" in r["contender"]
    }
    ours = [r for r in result["contenders"] + result["lam"] if "ours" in r["contender"]]
    base = ours[0]
    found["selection"] = (
        _at(base)
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
    for normalize in dict.fromkeys(r["normalize"] for r in result["contenders"]):
        own = [r for r in result["contenders"] if r["normalize"] == normalize]
        columns = {
            f"{_at(base)}, {_normalized(own[0])}": lambda r: r["contender"],
            "seconds": _total,
            "to the first pick": lambda r: _seconds(r["first_pick_seconds"]),
            "loop / it": lambda r: _ratio(r["speedup"]),
            "readings": lambda r: f"{r['readings']:.0f}",
            "peak MiB": lambda r: _optional(r, "peak_mib", "{:.0f}"),
            "first picks as ours": lambda r: f"{r['leading']} of {r['measured_picks']}",
            "in common": lambda r: f"{r['common']} of {r['measured_picks']}",
            "log det / ours": lambda r: _optional(r, "logdet_ratio", "{:.6f}"),
            "rounds": lambda r: str(r["rounds"]),
        }
        if all(r["peak_mib"] is None for r in own):
            columns.pop("peak MiB")
        found[f"selection: {normalize or 'none'}"] = table(own, columns)
    found["selection: growth"] = _selection_points(
        result["growth"] + [{"axis": "–", **r} for r in result["others"]]
    )
    exponents = {
        (e["contender"], e["normalize"], e["axis"]): e["exponent"] for e in result["exponents"]
    }
    found["selection: exponents"] = table(
        [
            {"contender": c, "normalize": n}
            for c, n in dict.fromkeys((e["contender"], e["normalize"]) for e in result["exponents"])
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
    found["selection: paper"] = _paper_table(result)
    return found


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
        + _where_and_when(where, where["date"], where["commit"])
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


def _selection_points(records: list[Row]) -> str:
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


def _at(r: Row) -> str:
    return f"N = {r['pairs']:,}, k = {r['k']}, B = {r['picks']}"


def _normalized(r: Row) -> str:
    return f'"{r["normalize"]}"' if r["normalize"] else "none"


def _touched(r: Row) -> str:
    return _optional(r, "touched", "{:.1%}")


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _total(r: Row) -> str:
    """Seconds; numbers extrapolated from a few picks are marked."""
    return ("≈ " if r["measured_picks"] < r["picks"] else "") + _seconds(r["seconds"])


def _ratio(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def main(
    results: Annotated[Path, typer.Option(help="the folder of runs' JSON")] = RESULTS,
    write: Annotated[
        bool, typer.Option(help=f"put the tables into {', '.join(DOCUMENTS)}")
    ] = False,
) -> None:
    """Print the tables of benchmark runs, or write them into the documentation."""
    found: dict[str, str] = {}
    if (path := results / "cpu.json").exists():
        run = json.loads(path.read_text())
        found["machine"] = _where_and_when(
            run["machine_info"], run["datetime"][:10], run["commit_info"]["id"]
        )
        found |= tables([{**b["extra_info"], "group": b["group"]} for b in run["benchmarks"]])
    if (path := results / "fidelity.json").exists():
        found |= fidelity_tables(json.loads(path.read_text()))
    if (path := results / "selection.json").exists():
        found |= selection_tables(json.loads(path.read_text()))
    if (path := results / "selection_on_disk.json").exists():
        found["selection: on disk"] = on_disk_table(json.loads(path.read_text()))
    if not write:
        print("\n\n".join(found.values()))
        return
    for document in map(Path, DOCUMENTS):
        document.write_text(write_into(document.read_text(), found))
        print(f"written: {document}")


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


def _where_and_when(machine: dict[str, Any], day: str, commit: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['processor']}, {machine['threads']} threads, {day}, commit {commit[:10]}; "
        f"{versions}."
    )


def table(rows: list[Row], columns: dict[str, Any]) -> str:
    cells = [list(columns)] + [[value(row) for value in columns.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]

    def line(values: list[str]) -> str:
        return (
            "| "
            + " | ".join(
                v.ljust(w) if i == 0 else v.rjust(w)
                for i, (v, w) in enumerate(zip(values, widths, strict=True))
            )
            + " |"
        )

    rule = (
        "|"
        + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
        + "|"
    )
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def _optional(row: Row, name: str, form: str) -> str:
    return "–" if row.get(name) is None else form.format(row[name])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    typer.run(main)
