"""Tables from the JSON of a benchmark run: for the end of the run, and for the documentation.

    python -m benchmarks.report benchmarks/results/cpu.json             print them
    python -m benchmarks.report benchmarks/results/cpu.json --write     put them into the documents

Documents mark the place of a table by a line <!-- benchmark: NAME --> and the end of it by
<!-- end -->; what stands between is replaced, so that no figure is typed by hand.
"""

from __future__ import annotations

import json
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

DOCUMENTS = ("docs/benchmarks.md", "README.md")
PACKAGES = ("torch", "transformers", "peft", "activedpo-fast")

Row = dict[str, Any]


def describe_run() -> dict[str, Any]:
    """What a figure depends on besides the code, for a run's machine info."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "instructions": sorted(
            name for name, has in torch.cpu.get_capabilities().items() if has is True),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def tables(rows: list[Row]) -> dict[str, str]:
    """Markdown by table name: "rows: <workload>", "overhead", "projection"."""
    found: dict[str, str] = {}
    for workload in dict.fromkeys(r["workload"] for r in rows if r["group"] == "rows"):
        part = [r for r in rows if r["group"] == "rows" and r["workload"] == workload]
        found[f"rows: {workload}"] = (
            f"{workload}: {part[0]['pool']}; k = {part[0]['k']}. One plain forward pass: "
            f"{part[0]['yardstick_seconds']:.2f} s.\n\n" + _table(part, {
                "gradient rows": lambda r: r["contender"],
                "× forward": lambda r: f"{r['ratio']:.2f}",
                "seconds": lambda r: f"{r['seconds']:.2f}",
                "peak MiB": lambda r: _optional(r, "peak MiB", "{:.0f}"),
                "product error": lambda r: _optional(r, "product error", "{:.3f}"),
                "norm distortion": lambda r: _optional(r, "norm distortion", "{:.3f}"),
            }))
    overhead = [r for r in rows if r["group"] == "overhead"]
    if overhead:
        found["overhead"] = _table(overhead, {
            "workload": lambda r: r["workload"],
            "sketch": lambda r: r["contender"],
            "capture and sketch over the same passes": lambda r: f"{r['ratio'] - 1:+.1%}",
        })
    projection = [r for r in rows if r["group"] == "projection"]
    if projection:
        found["projection"] = _table(projection, {
            "8 × 1,000,000 → 4096": lambda r: r["contender"],
            "seconds": lambda r: f"{r['seconds']:.4f}" if r["seconds"] < 1
            else f"{r['seconds']:.1f}",
            "× floor": lambda r: f"{r['ratio']:.2f}",
            "floor": lambda r: r["floor"],
            "product error": lambda r: f"{r['product error']:.3f}",
            "norm distortion": lambda r: f"{r['norm distortion']:.3f}",
        })
    return found


def write_into(document: str, found: dict[str, str]) -> str:
    """`document` with the tables that it has a place for; a place without a table stays."""
    def replace(match: re.Match[str]) -> str:
        table = found.get(match["name"])
        return match[0] if table is None else f"{match['begin']}\n{table}\n{match['end']}"

    pattern = r"(?P<begin><!-- benchmark: (?P<name>[^>]+?) -->)\n.*?(?P<end><!-- end -->)"
    return re.sub(pattern, replace, document, flags=re.DOTALL)


def main(
    run: Annotated[Path, typer.Argument(help="what --benchmark-json wrote")],
    write: Annotated[bool, typer.Option(help=f"put the tables into {', '.join(DOCUMENTS)}")]
    = False,
) -> None:
    """Print the tables of a benchmark run, or write them into the documentation."""
    content = json.loads(run.read_text())
    found = {"machine": _machine(content), **tables(
        [{**b["extra_info"], "group": b["group"]} for b in content["benchmarks"]])}
    if not write:
        print("\n\n".join(found.values()))
        return
    for document in map(Path, DOCUMENTS):
        document.write_text(write_into(document.read_text(), found))
        print(f"written: {document}")


def _machine(run: dict[str, Any]) -> str:
    machine = run["machine_info"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (f"{machine['processor']}, {machine['threads']} threads, {run['datetime'][:10]}, commit "
            f"{run['commit_info']['id'][:10]}; {versions}.")


def _table(rows: list[Row], columns: dict[str, Any]) -> str:
    cells = [list(columns)] + [[value(row) for value in columns.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]

    def line(values: list[str]) -> str:
        return "| " + " | ".join(
            v.ljust(w) if i == 0 else v.rjust(w)
            for i, (v, w) in enumerate(zip(values, widths, strict=True))) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":"
                          for i, w in enumerate(widths)) + "|"
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
