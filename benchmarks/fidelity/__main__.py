"""How much a sketch lowers the quality of the selection, on the demo's own model and pool.

    python -m benchmarks.fidelity --help

Exact gradient rows (156,160 numbers each) are kept whole and compared with their sketches: inner
products, the pairs that the greedy selection takes, and the log det that these pairs reach under
the exact kernel. There are two policies: LoRA at its initialization (B = 0, as in every first
round) and after one round of DPO. Adapter, sampled pools and finished parts of the comparison are
kept in the work folder, so that an interrupted run continues; times are always taken again.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm.auto import tqdm

from activedpo_fast import Sketch
from benchmarks.fidelity.cases import Part, environment, prepare, write_json
from benchmarks.fidelity.figures import draw
from benchmarks.fidelity.measures import (
    CASES,
    CRITERIA,
    DEMO,
    DENSE_DIM,
    DIMS,
    METHODS,
    PICKS,
    RANDOM_DRAWS,
    ROUNDS,
    SEED,
    TIMED_ITEMS,
    TOKENS,
    Case,
    Exact,
    Parameters,
    Record,
    check_points,
    check_sketches,
    describe,
    exact_rows,
    geometry,
    reference_picks,
    selection,
    sketch_rows,
    sketches_of,
)
from benchmarks.fidelity.tables import fidelity_tables
from benchmarks.rows.measure import seconds
from benchmarks.rows.workloads import PlainForward


def compare(case: Case, seeds: int, folder: Path) -> Record:
    """All records of a case: "pool", "exact", "geometry", "selection".

    A part on disk is taken if it belongs to the same pool, settings and definition of the sketch.
    """
    setting = [case.pool.fingerprint(), CRITERIA, PICKS, RANDOM_DRAWS]
    about = Part(folder / f"{case.name}.json", setting)
    parts = {
        (method, seed): Part(
            folder / f"{case.name}-{method}-{seed}.json",
            [*setting, *_definition(method, seed, case.parameters())],
        )
        for method in METHODS
        for seed in range(seeds)
    }
    missing = [key for key, part in parts.items() if part.records is None]
    if missing or about.records is None:
        exact = exact_rows(case)
        check_sketches(case, exact)
        check_points(case, exact)
        references = reference_picks(case, exact)
        about.write({"pool": [describe(case, exact)], "exact": references})
        for method, seed in tqdm(missing, desc=f"sketches, {case.name}", disable=None):
            parts[method, seed].write(_compare_sketch(case, exact, references, method, seed))
    result: Record = {}
    for part in (about, *parts.values()):
        for kind, records in (part.records or {}).items():
            result.setdefault(kind, []).extend(records)
    return result


def _definition(method: str, seed: int, parameters: Parameters) -> list[Any]:
    """Values that change when rows of this method and seed do."""
    name, shape = parameters[0]
    # Small integers, whose sums are exact, so the order of additions does not matter.
    row = (torch.arange(math.prod(shape)) * 7919 % 13 - 6).float()[None]
    digest = hashlib.sha256()
    for k in DIMS:
        sketched = sketch_rows(row, [(name, shape)], Sketch(method, k, seed))
        digest.update(sketched.float().numpy().tobytes())
    return [DIMS, DENSE_DIM, digest.hexdigest()]


def _compare_sketch(
    case: Case, exact: Exact, references: list[Record], method: str, seed: int
) -> Record:
    pairs = case.pool.pairs()
    records: Record = {"geometry": [], "selection": []}
    for k, sketched in sketches_of(exact.rows, case.parameters(), method, seed):
        key = {"case": case.name, "sketch": method, "k": k, "seed": seed}
        records["geometry"].append({**key, **geometry(sketched, exact, pairs)})
        for reference in references:
            records["selection"].append({**key, **selection(sketched, exact, pairs, reference)})
    return records


def time_sketches(case: Case) -> list[Record]:
    """Seconds for the gradient rows of the pool's first items, next to a plain forward pass.

    A forward pass precedes every measurement, and their ratio is the result: the median over the
    rounds, in which all sketches take turns. The self-check, done once per pool, is not included.
    """
    tokens = case.head(TIMED_ITEMS)
    sketches = [Sketch("none"), *(Sketch(method, k) for method in METHODS for k in DIMS)]
    extractors = [case.extractor(sketch) for sketch in sketches]
    for extractor in extractors:
        extractor.check(tokens)
    forward = PlainForward(case.model, tokens, TOKENS)
    forward()
    extractors[0].gradients(tokens, show_progress=False)  # warm up

    taken: list[list[tuple[float, float]]] = [[] for _ in extractors]
    turns = [(n, extractor) for _ in range(ROUNDS) for n, extractor in enumerate(extractors)]
    for n, extractor in tqdm(turns, desc="times", disable=None):
        taken[n].append(
            (seconds(forward), seconds(partial(extractor.gradients, tokens, show_progress=False)))
        )
    return [
        {
            "case": case.name,
            "sketch": sketch.method,
            "k": sketch.dim,
            "responses": len(tokens.sequences),
            "seconds": statistics.median(rows for _, rows in runs),
            "forward_seconds": statistics.median(plain for plain, _ in runs),
            "ratio": statistics.median(rows / plain for plain, rows in runs),
            "ratios": [rows / plain for plain, rows in runs],
        }
        for sketch, runs in zip(sketches, taken, strict=True)
    ]


def main(
    prompts: Annotated[int, typer.Option(min=5, help="Prompts in a pool, of 3 responses.")] = 1000,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each sketch.")] = 3,
    out: Annotated[Path, typer.Option(help="The figures, JSON.")] = Path(
        "benchmarks/results/fidelity.json"
    ),
    figure: Annotated[Path, typer.Option(help="The picture.")] = Path("docs/fidelity.png"),
    work: Annotated[Path, typer.Option(help="Adapter, pools, finished parts.")] = Path(
        "runs/fidelity"
    ),
) -> None:
    """Measure how much sketches lower the quality of the selection, and how much time they take.

    A run that was interrupted continues with what is in the work folder; delete it to start over.
    """
    torch.manual_seed(SEED)
    result: Record = {
        "environment": environment(),
        "settings": {
            "prompts": prompts,
            "seeds": seeds,
            "seed": SEED,
            "picks": PICKS,
            "kappa": 1.0,
            "criteria": CRITERIA,
            "dims": DIMS,
            "dense_dim_with_several_seeds": DENSE_DIM,
            "random_draws": RANDOM_DRAWS,
            "timed_items": TIMED_ITEMS,
            "rounds": ROUNDS,
            "max_tokens_per_batch": TOKENS,
            "model": "small",
            "lora": DEMO.lora,
            "dpo": DEMO.dpo,
            "generation": DEMO.generation,
            "labels": DEMO.batch_size,
        },
    }
    for name in CASES:
        case = prepare(name, prompts, work)
        for kind, records in compare(case, seeds, work / f"prompts-{prompts}").items():
            result.setdefault(kind, []).extend(records)
        if name == "trained":
            result["time"] = time_sketches(case)
    write_json(out, result)
    draw(result, figure)
    tables = "\n\n".join(fidelity_tables(result).values())
    print(f"{tables}\n\nfigures: {out}   picture: {figure}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(
        epilog="Examples:\n\n"
        "  python -m benchmarks.fidelity\n\n"
        "  python -m benchmarks.fidelity --prompts 40 --seeds 1 "
        "--out runs/trial.json --figure runs/trial.png"
    )(main)
    app()
