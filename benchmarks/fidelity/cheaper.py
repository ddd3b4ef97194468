"""How near picks by cheaper rows come to those by exact ones, on the demo's own model and pool.

    python -m benchmarks.fidelity.cheaper --help

There are rows of the response's tokens, and of the last layers alone: the exact gradient, and that
of the response's tokens. None is sketched. Each kind makes the picks alone, and as the first of two
stages, in which exact rows choose among a number of pairs per pick. Policies, pools and judgment
are those of `benchmarks.fidelity`; finished parts are kept in the work folder.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from tqdm.auto import tqdm

from activedpo_fast import Sketch
from activedpo_fast.selection import greedy_logdet
from benchmarks.fidelity.cases import Part, environment, prepare, write_json
from benchmarks.fidelity.measures import (
    CASES,
    CHECKED_ITEMS,
    CRITERIA,
    DEMO,
    PICKS,
    RANDOM_DRAWS,
    SEED,
    Case,
    Exact,
    Record,
    check_points,
    describe,
    exact_rows,
    from_rows,
    judge,
    reference_picks,
)
from benchmarks.fidelity.tables import cheaper_tables

GRADIENTS = ("all_tokens", "response_tokens")
LAST_LAYERS = (1, 2)  # of the demo's four
PER_PICK = (2, 4, 10)  # pairs that the first stage chooses for each pick


def compare(case: Case, folder: Path) -> Record:
    """All records of a case: "pool", "exact", "cheaper"."""
    key = [case.pool.fingerprint(), CRITERIA, PICKS, RANDOM_DRAWS]
    part = Part(folder / f"cheaper-{case.name}.json", [*key, GRADIENTS, LAST_LAYERS, PER_PICK])
    if part.records is None:
        exact = exact_rows(case)
        check_points(case, exact)
        references = reference_picks(case, exact)
        found: Record = {"pool": [describe(case, exact)], "exact": references, "cheaper": []}
        kinds = cheaper_rows(case, exact)
        for kind, points in tqdm(kinds.items(), desc=f"cheaper rows, {case.name}", disable=None):
            for reference in references:
                own = {"case": case.name, "rows": kind}
                found["cheaper"] += [
                    {**own, **record} for record in stages(points, exact, case, reference)
                ]
        part.write(found)
    return part.records or {}


def stages(points: Tensor, exact: Exact, case: Case, reference: Record) -> list[Record]:
    """The picks by some rows alone (per_pick 0), and those that exact rows make among them.

    exact_share: which part of the responses needs exact rows.
    """
    pairs, count = case.pool.pairs(), len(reference["picks"])
    how = {"lam": reference["lam"], "normalize": reference["normalize"], "show_progress": False}
    most = min(count * max(PER_PICK), len(pairs))
    # The first picks of many are those that are made of fewer.
    chosen = greedy_logdet(points, pairs, most, **how).indices
    records = [
        {"per_pick": 0, "exact_share": 0.0, **judge(chosen[:count], exact, pairs, reference)}
    ]
    for per_pick in PER_PICK:
        kept = chosen[: per_pick * count].sort().values
        picks = kept[greedy_logdet(exact.points, pairs[kept], count, **how).indices]
        share = len(pairs[kept].unique()) / len(exact.rows)
        records.append(
            {"per_pick": per_pick, "exact_share": share, **judge(picks, exact, pairs, reference)}
        )
    return records


def cheaper_rows(case: Case, exact: Exact) -> dict[str, Tensor]:
    """Points (see `Exact`) by kind of row."""
    found: dict[str, Tensor] = {}
    for gradient in GRADIENTS:
        whole = exact if gradient == "all_tokens" else exact_rows(case, gradient)
        prefix = "" if whole is exact else f"{gradient}, "
        for layers in LAST_LAYERS:
            columns = _columns(case, layers)
            _check_columns(case, whole, columns, gradient, layers)
            found[f"{prefix}last {layers} layers"] = from_rows(whole.rows[:, columns]).points
        if whole is not exact:
            found[gradient] = whole.points
    return found


def _columns(case: Case, layers: int) -> Tensor:
    """Which numbers of a row are of the parameters in the last layers, bool [D]."""
    first = case.model.config.num_hidden_layers - layers
    return torch.cat(
        [
            torch.full((math.prod(shape),), _layer(name) >= first)
            for name, shape in case.parameters()
        ]
    )


def _check_columns(case: Case, whole: Exact, columns: Tensor, gradient: str, layers: int) -> None:
    """Assert, on a few items, that the columns are what the extractor gives for these layers."""
    extractor = case.extractor(Sketch("none"), gradient, layers)
    rows = extractor.gradients(case.head(CHECKED_ITEMS), show_progress=False).gradients
    expected = whole.rows[: len(rows), columns]
    error = float((rows - expected).norm() / expected.norm())
    assert error < 1e-5, f"the extractor's rows of the last layers differ by {error:.1e}"


def _layer(name: str) -> int:
    """The number of the layer that a parameter belongs to."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1])


def main(
    prompts: Annotated[int, typer.Option(min=5, help="Prompts in a pool, of 3 responses.")] = 1000,
    out: Annotated[Path, typer.Option(help="The figures, JSON.")] = Path(
        "benchmarks/results/cheaper_rows.json"
    ),
    work: Annotated[Path, typer.Option(help="Adapter, pools, finished parts.")] = Path(
        "runs/fidelity"
    ),
) -> None:
    """Measure how near picks by cheaper rows, alone or first, come to those by exact rows.

    A run that was interrupted continues with what is in the work folder; delete it to start over.
    """
    torch.manual_seed(SEED)
    result: Record = {
        "environment": environment(),
        "settings": {
            "prompts": prompts,
            "seed": SEED,
            "picks": PICKS,
            "kappa": 1.0,
            "criteria": CRITERIA,
            "random_draws": RANDOM_DRAWS,
            "per_pick": PER_PICK,
            "gradients": GRADIENTS,
            "last_layers": LAST_LAYERS,
            "model": "small",
            "lora": DEMO.lora,
            "dpo": DEMO.dpo,
            "generation": DEMO.generation,
            "labels": DEMO.batch_size,
        },
    }
    for name in CASES:
        case = prepare(name, prompts, work)
        for kind, records in compare(case, work / f"prompts-{prompts}").items():
            result.setdefault(kind, []).extend(records)
    write_json(out, result)
    print("\n\n".join(cheaper_tables(result).values()) + f"\n\nfigures: {out}")


if __name__ == "__main__":
    typer.run(main)
