"""A million prompts on 64 GPUs: the plan on paper, with what can be measured without a GPU.

python -m benchmarks.scale           # minutes; writes benchmarks/results/scale.json
python -m benchmarks.scale --write   # and the tables of docs/scale.md
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from activedpo_fast._files import write_atomic
from benchmarks.fidelity.cases import environment
from benchmarks.markdown import Row, table, where_and_when, write_into
from benchmarks.scale.measured import host_work, selections, storing
from benchmarks.scale.plan import Round, bytes_of, gpu_seconds

DOCUMENT = Path("docs/scale.md")
MODELS = {"1.2B": 1.24e9, "8B": 8.03e9, "70B": 70.6e9}
# What every process does with the whole pool; the rest is shared.
BY_TOKENS = ("tokenize", "hash tokens")


def main(
    prompts: Annotated[
        list[int] | None, typer.Option(help="Sizes of the measured pools; may be repeated.")
    ] = None,
    dim: Annotated[int, typer.Option(help="k of the measured selections.")] = 1024,
    picks: Annotated[int, typer.Option(help="B of the measured selections.")] = 200,
    work: Annotated[Path, typer.Option(help="Folder for pools and rows.")] = Path("runs/scale"),
    out: Annotated[Path, typer.Option(help="The figures, JSON.")] = Path(
        "benchmarks/results/scale.json"
    ),
    write: Annotated[bool, typer.Option(help=f"Write the tables of {DOCUMENT}.")] = False,
) -> None:
    """Measure the work beside the model and the selection on growing pools."""
    torch.set_num_threads(1)
    sizes = prompts or [10_000, 40_000]
    host = []
    for size in sizes:
        host.append(host_work(size, work))
        print(json.dumps(host[-1]), flush=True)
    result = {
        "environment": environment(),
        "host": host,
        "storing": storing(work, 8192),
        "selection": selections([size // 4 for size in sizes] + sizes[-1:], dim, picks),
    }
    write_atomic(out, json.dumps(result, indent=1) + "\n")
    print(f"written: {out}")
    if write:
        DOCUMENT.write_text(write_into(DOCUMENT.read_text(), tables(result)))
        print(f"written: {DOCUMENT}")


def tables(result: dict[str, Any]) -> dict[str, str]:
    """The tables of the page, by name."""
    where = result["environment"]
    return {
        "scale: gpus": gpu_table(Round()),
        "scale: bytes": bytes_table(Round()),
        "scale: host": where_and_when(where, where["date"], where["commit"])
        + "\n\n"
        + host_table(result["host"], Round()),
        "scale: selection": selection_table(result["selection"]),
        "scale: storing": f"{result['storing']['seconds per GB']:.1f} s of one core per GB",
    }


def gpu_table(usual: Round) -> str:
    rows = [
        {"model": name, **gpu_seconds(replace(usual, weights=weights))}
        for name, weights in MODELS.items()
    ]
    names = [name for name in rows[0] if name != "model"]
    return table(
        rows,
        {
            f"minutes of {usual.gpus} H100": lambda r: r["model"],
            **{name: lambda r, name=name: f"{r[name] / 60:.0f}" for name in names},
        },
    )


def bytes_table(usual: Round) -> str:
    rows = [{"what": name, "bytes": n} for name, n in bytes_of(usual).items()]
    return table(rows, {"": lambda r: r["what"], "GB": lambda r: f"{r['bytes'] / 1e9:.1f}"})


def host_table(host: list[dict[str, Any]], usual: Round) -> str:
    """Seconds and bytes of a stage for the round's prompts, by the size of the measured pool."""
    longer = (usual.prompt_tokens + usual.response_tokens) / host[-1]["tokens"]

    def minutes(run: dict[str, Any], stage: str) -> str:
        factor = longer if stage in BY_TOKENS else 1.0
        return f"{run['stages'][stage]['seconds'] * usual.prompts * factor / 60:.1f}"

    rows: list[Row] = [{"stage": name} for name in host[0]["stages"]]
    return table(
        rows,
        {
            "minutes of one core": lambda r: r["stage"],
            **{
                f"by {run['prompts']:,} prompts": lambda r, run=run: minutes(run, r["stage"])
                for run in host
            },
        },
    )


def selection_table(found: list[dict[str, Any]]) -> str:
    sizes = sorted({f["pairs"] for f in found})
    of = {(f["normalize"], f["pairs"]): f for f in found}
    rows = [{"normalize": name} for name in dict.fromkeys(f["normalize"] for f in found)]
    return table(
        rows,
        {
            "pairs looked at per pick": lambda r: r["normalize"],
            **{f"N = {n:,}": lambda r, n=n: f"{of[r['normalize'], n]['share']:.2%}" for n in sizes},
        },
    )


if __name__ == "__main__":
    typer.run(main)
