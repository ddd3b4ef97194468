"""The table of supported models: how a cell is judged, rows on disk, and the committed verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from activedpo_fast import ActiveDPOError
from activedpo_fast.gradients.batches import Layout
from benchmarks.markdown import write_into
from benchmarks.support import runs
from benchmarks.support.__main__ import DOCUMENT
from benchmarks.support.adapters import adapted
from benchmarks.support.architectures import ARCHITECTURES
from benchmarks.support.bases import BASES
from benchmarks.support.cells import _judged, measure
from benchmarks.support.tables import number, support_tables

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / runs.RESULTS
SMALL = {
    "architectures": {"GPT-2": ["LoRA, attention", "all weights"]},
    "bases": {"float32, eager attention": ["LoRA"]},
}


def test_cells_are_measured_against_the_definition(tmp_path: Path) -> None:
    for table, name, column in (
        ("architectures", "GPT-2", "LoRA, attention"),
        ("architectures", "Mixtral", "all weights"),
        ("bases", "bfloat16", "LoRA"),
    ):
        cell = runs.measure_cell(table, name, column, tmp_path)
        captured = column != "all weights"
        assert cell.verdict == ("captured" if captured else "autograd"), cell
        assert cell.layout == ("shared" if captured else None)
        assert cell.error is not None and cell.rounding is not None
        assert 0 < cell.error < (0.1 if table == "bases" else 1e-5)
        assert 0 < cell.rounding < (0.1 if table == "bases" else 1e-5)


def test_a_wrong_row_is_called_wrong() -> None:
    torch.manual_seed(0)
    exact = torch.randn(3, 40, dtype=torch.float64)
    rounded = exact.float().double()
    found = rounded.clone()
    assert _judged(found, rounded, exact, Layout.WHOLE).verdict == "captured"
    assert _judged(found, rounded, exact, Layout.WHOLE).layout == "whole"
    assert _judged(found, rounded, exact, None).verdict == "autograd"
    found[1] *= 1.001
    cell = _judged(found, rounded, exact, None)
    assert cell.verdict == "wrong" and cell.error == 1e-3
    found[1] = torch.nan
    assert _judged(found, rounded, exact, None).verdict == "wrong"
    # Where the model's own numbers are rounded as much, a row may be, too.
    coarse = exact * 1.001
    assert _judged(coarse, coarse, exact, None).verdict == "autograd"


def test_what_fails_is_a_cell_of_its_own() -> None:
    llama = ARCHITECTURES["Llama"]

    def not_causal() -> Any:
        model = adapted(llama.build(), "LoRA, attention", llama.attention)
        model.get_base_model().config.is_causal = False
        return model

    refused = measure(not_causal)
    assert refused.verdict == "refused" and "is_causal=False" in str(refused.message)
    nothing = measure(lambda: llama.build().requires_grad_(False))
    assert nothing.verdict == "impossible" and nothing.message
    mamba = ARCHITECTURES["Mamba"]
    impossible = measure(lambda: adapted(mamba.build(), "LoRA, all linear layers", mamba.attention))
    assert impossible.verdict == "impossible" and "out_proj" in str(impossible.message)


def test_a_run_continues_and_repeats_what_is_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # the code that rows depend on
    monkeypatch.setattr(runs, "COLUMNS", SMALL)
    path = tmp_path / "support.json"
    runs.run(path, ["GPT-2"], show_progress=False)
    found = json.loads(path.read_text())
    row = found["architectures"]["GPT-2"]
    assert list(row["cells"]) == SMALL["architectures"]["GPT-2"] and not found["bases"]
    row["cells"]["all weights"]["error"] = 0.5  # to see that it is not measured again
    path.write_text(json.dumps(found))
    results = runs.run(path, show_progress=False)
    assert results["architectures"]["GPT-2"] == row
    assert results["bases"]["float32, eager attention"]["cells"]["LoRA"]["error"] < 1e-5
    assert runs.read(path) == results
    found["architectures"]["GPT-2"]["code"] = "of another state"
    path.write_text(json.dumps(found))
    again = runs.run(path, show_progress=False)["architectures"]["GPT-2"]
    assert again["cells"]["all weights"]["error"] < 1e-5
    assert again["code"] != "of another state"
    with pytest.raises(ActiveDPOError, match="no row 'GPT-9'; there are: GPT-2, float32"):
        runs.run(path, ["GPT-9"])


def test_tables() -> None:
    state = {
        "day": "2026-01-01",
        "versions": {name: "1" for name in ("torch", "transformers", "peft", "activedpo-fast")},
    }
    exact = {"verdict": "captured", "layout": "whole", "error": 6.6e-7, "rounding": 7e-7}
    cells = {name: dict(exact) for name in runs.COLUMNS["architectures"]["GPT-2"]}
    cells["IA³"] = {"verdict": "wrong", "error": 0.2, "rounding": 1e-7}
    cells["DoRA, attention"] = {"verdict": "impossible", "message": "no <this> here"}
    cells["all weights"] = {"verdict": "refused", "message": "not that"}
    columns = runs.COLUMNS["bases"]["bfloat16"]
    base = {**state, "versions": {**state["versions"], "torchao": "2"}}
    found = support_tables(
        {
            "architectures": {"GPT-2": {**state, "cells": cells}},
            "bases": {"bfloat16": {**base, "cells": {c: exact for c in columns}}},
        }
    )
    line = found["support: architectures"].splitlines()[2]
    for shown in ("captured, whole 7e-7", "**wrong** 2e-1", "– (1)", "refused (2)"):
        assert f" {shown} |" in line
    assert found["support: notes"] == "1. without the library: no \\<this\\> here\n2. not that"
    last = [part.strip() for part in found["support: bases"].splitlines()[2].split("|")[-3:-1]]
    assert last == ["7e-7", "torchao 2"]
    assert found["support: versions"].count("2026-01-01") == 1
    assert number(1.04e-5) == "1e-5" and number(None) == "not finite"


def test_the_document_shows_the_committed_results() -> None:
    document = (ROOT / DOCUMENT).read_text()
    results = runs.read(COMMITTED)
    assert write_into(document, support_tables(results)) == document
    for table in ("versions", "architectures", "bases", "notes"):
        assert f"<!-- benchmark: support: {table} -->" in document
    for rows in results.values():
        for name, row in rows.items():
            for column, cell in row["cells"].items():
                assert cell["verdict"] not in ("wrong", "failed"), (name, column, cell)


@pytest.mark.slow
def test_committed_verdicts_hold(tmp_path: Path) -> None:
    """A cell of each row, another column from row to row."""
    checked = 0
    for table, rows in runs.read(COMMITTED).items():
        for number_of_row, (name, row) in enumerate(rows.items()):
            if table == "bases" and not BASES[name].installed:
                continue
            column = list(row["cells"])[number_of_row % len(row["cells"])]
            cell = runs.measure_cell(table, name, column, tmp_path)
            expected = row["cells"][column]
            assert cell.verdict == expected["verdict"], (name, column, cell)
            assert cell.layout == expected.get("layout"), (name, column, cell)
            if cell.error is not None:
                assert cell.error <= max(1e-4, 3 * expected["error"]), (name, column, cell)
            checked += 1
    assert checked > 20
