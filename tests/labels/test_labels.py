"""Labels from functions, rewards, reward models and files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels import (
    CallableOracle,
    FileOracle,
    LabelsPending,
    RewardModel,
    RewardModelOracle,
    RewardOracle,
)
from activedpo_fast.labels.labeled_pairs import read_labeled_pairs
from activedpo_fast.labels.reading import read_labels
from activedpo_fast.pool.items import PoolItem
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.selection.picks_jsonl import Pick, pick_line
from activedpo_fast.selection.result import Selection
from tests.support.models import VOCAB_SIZE, tiny_tokenizer
from tests.support.state import differences, snapshot


def _selection(n: int = 4, responses: tuple[str, str] = (" good", " bad")) -> Selection:
    return Selection(
        tuple(Pick(f"p{i}", (0, 1), 1.0, i, f"prompt {i}", responses) for i in range(n)), "random"
    )


def _goodness(prompts: Any, responses: Any, extras: Any) -> list[float]:
    return [1.0 if "good" in response else 0.0 for response in responses]


def test_callable_labels_in_order_and_are_checked() -> None:
    seen = []

    def fn(prompt: Any, a: Any, b: Any) -> Any:
        seen.append((prompt, a, b))
        return [0, 1, None][len(seen) - 1]

    assert CallableOracle(fn).label(_selection(3)) == [0, 1, None]
    assert seen[2] == ("prompt 2", " good", " bad")
    for wrong in (True, 2, "0", 0.5):
        with pytest.raises(ActiveDPOError, match="'p0'"):
            CallableOracle(lambda *_, wrong=wrong: wrong).label(_selection(1))


def test_reward_frequencies_are_bradley_terry() -> None:
    n, temperature = 4000, 0.7
    labels = RewardOracle(_goodness, temperature=temperature).label(_selection(n))
    expected = 1 / (1 + math.exp(-1 / temperature))
    spread = math.sqrt(expected * (1 - expected) / n)
    assert abs(labels.count(0) / n - expected) < 4 * spread
    assert labels.count(0) + labels.count(1) == n


def test_reward_draws_depend_on_the_pick_alone() -> None:
    selection = _selection(200)
    oracle = RewardOracle(_goodness, temperature=2.0, seed=3)
    labels = oracle.label(selection)
    assert oracle.label(selection) == labels
    assert oracle.label(Selection(selection.picks[::-1], "x")) == labels[::-1]
    assert oracle.label(selection[7:9]) == labels[7:9]
    swapped = [replace(p, pair=(1, 0), responses=p.responses[::-1]) for p in selection]
    assert oracle.label(Selection(tuple(swapped), "x")) == [1 - (v or 0) for v in labels]
    assert RewardOracle(_goodness, temperature=2.0, seed=4).label(selection) != labels


def test_reward_at_temperature_zero_and_with_extras() -> None:
    oracle = RewardOracle(_goodness, temperature=0)
    assert oracle.label(_selection(1)) == [0]
    assert oracle.label(_selection(1, (" bad", " good"))) == [1]
    assert oracle.label(_selection(1, (" bad", " worse"))) == [None]
    pool = PreferencePool(
        [PoolItem(f"p{i}", f"prompt {i}", (" good", " bad"), {"best": i % 2}) for i in range(4)]
    )

    def reward(prompts: Any, responses: Any, extras: Any) -> list[float]:
        return [
            float((" good", " bad")[e["best"]] == r) for r, e in zip(responses, extras, strict=True)
        ]

    assert RewardOracle(reward, temperature=0).label(_selection(), pool) == [0, 1, 0, 1]


def test_reward_errors_name_what_is_wrong() -> None:
    with pytest.raises(ActiveDPOError, match="temperature"):
        RewardOracle(_goodness, temperature=-1)
    with pytest.raises(ActiveDPOError, match="'p0'.*nan"):
        RewardOracle(lambda p, r, e: [math.nan] * len(r)).label(_selection())
    with pytest.raises(ActiveDPOError, match="1 numbers for 8"):
        RewardOracle(lambda p, r, e: [0.0]).label(_selection())


def _reward_model(**config: Any) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=1,
        pad_token_id=1,
    )
    return LlamaForSequenceClassification(LlamaConfig(**{**settings, **config}))


@pytest.mark.parametrize("chat", [False, True])
def test_reward_model_gives_each_text_its_own_score(chat: bool) -> None:
    model, tokenizer = _reward_model().train(), tiny_tokenizer(chat=chat)
    texts = [(" a", " much longer than the other one"), (" sketch", " library"), (" x y", " z")]
    picks = tuple(
        Pick(f"p{i}", (0, 1), 0.0, i, "The quick brown" * (i + 1), pair)
        for i, pair in enumerate(texts)
    )
    oracle = RewardModelOracle(model, tokenizer, temperature=0, batch_size=4, show_progress=False)
    labels = oracle.label(Selection(picks, "x"))
    assert model.training
    model.eval()
    for pick, label in zip(picks, labels, strict=True):
        scores = []
        for response in pick.responses:
            if chat:
                ids = tokenizer.apply_chat_template(
                    [
                        {"role": "user", "content": pick.prompt},
                        {"role": "assistant", "content": response},
                    ],
                    return_dict=True,
                )["input_ids"]
            else:
                ids = tokenizer(pick.prompt)["input_ids"] + tokenizer(response)["input_ids"]
            with torch.no_grad():
                scores.append(float(model(torch.tensor([ids])).logits))
        assert scores[0] != scores[1]
        assert label == int(scores[1] > scores[0])


def test_reward_models_that_do_not_fit_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ActiveDPOError, match="one output"):
        RewardModelOracle(_reward_model(num_labels=2), tokenizer)
    with pytest.raises(ActiveDPOError, match="pad_token_id None"):
        RewardModelOracle(_reward_model(pad_token_id=None), tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(ActiveDPOError, match="no pad_token"):
        RewardModelOracle(_reward_model(), tokenizer)


def _fill(path: Path, labels: list[Any]) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, label in zip(rows, labels, strict=True):
        row["label"] = label
    _write(path, rows)
    return rows


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_files_wait_for_people_and_then_read_them(tmp_path: Path) -> None:
    selection, oracle = _selection(3), FileOracle(tmp_path)
    with pytest.raises(LabelsPending, match="3 of 3"):
        oracle.label(selection)
    path, labels = oracle.paths(selection)
    assert [json.loads(line)["label"] for line in path.read_text().splitlines()] == [None] * 3
    _fill(path, [1, None, "skip"])
    with pytest.raises(LabelsPending, match="1 of 3") as caught:
        oracle.label(selection)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    _fill(path, [1, "tie", "skip"])
    assert oracle.label(selection) == [1, None, None]
    rows = _fill(path, [1, 0, "skip"])
    assert oracle.label(selection) == [1, 0, None]
    assert oracle.label(selection) == [1, 0, None]
    rows[0]["label"] = 0
    _write(labels, rows[::-1])  # another file, another order
    assert oracle.label(selection) == [0, 0, None]
    with pytest.raises(LabelsPending, match="2 of 2"):
        oracle.label(_selection(2))  # the next selection has its own file


def test_files_distinguish_rounds_that_share_an_id_and_a_pair(tmp_path: Path) -> None:
    (first, second) = _selection(1), _selection(1, (" fine", " poor"))
    both, oracle = Selection(first.picks + second.picks, "x"), FileOracle(tmp_path)
    with pytest.raises(LabelsPending, match="2 of 2"):
        oracle.label(both)
    _fill(oracle.paths(both)[0], [0, 1])
    assert oracle.label(both) == [0, 1]


@pytest.mark.parametrize(
    "fault, message",
    [
        ("missing", r"no line for pair \[0, 1\] of id 'p2'"),
        ("extra", "line 4: pair .* not one of the picks"),
        ("text", "line 2: the texts of id 'p1'"),
        ("label", "line 3: 'label' must be"),
        ("bool", "line 3: 'label' must be"),
        ("list", "line 3: 'label' must be"),
        ("json", "line 1: broken JSON"),
        ("twice", "line 4: .*already on line 1"),
    ],
)
def test_files_with_a_fault_are_refused(tmp_path: Path, fault: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    selection, oracle = _selection(3), FileOracle(path)
    with pytest.raises(LabelsPending):
        oracle.label(selection)
    rows = _fill(path, [0, 1, 0])
    if fault == "missing":
        rows.pop()
    elif fault == "extra":
        rows.append({**rows[0], "id": "other"})
    elif fault == "twice":
        rows.append(rows[0])
    elif fault == "text":
        rows[1]["responses"] = [" fine", " bad"]
    elif fault in ("label", "bool", "list"):
        rows[2]["label"] = {"label": 2, "bool": True, "list": [1]}[fault]
    _write(path, rows)
    if fault == "json":
        path.write_text("{" + path.read_text())
    with pytest.raises(ActiveDPOError, match=message) as caught:
        oracle.label(selection)
    assert not isinstance(caught.value, LabelsPending)


def test_reward_model_is_left_as_found_and_ignores_the_callers_modes() -> None:
    model, tokenizer = _reward_model(), tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(max_length=7)
    reward = RewardModel(model, tokenizer, max_length=16, show_progress=False)
    selection = _selection(6, (" good", " something else, and longer"))
    expected = reward(["a prompt"], [" good"], [{}])
    model.train()
    list(model.modules())[4].eval()
    before = snapshot(model, tokenizer)
    for around in (
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
    ):
        with around():
            assert reward(["a prompt"], [" good"], [{}]) == expected
        RewardOracle(reward, temperature=0).label(selection)
        assert differences(before, snapshot(model, tokenizer)) == []


@pytest.mark.parametrize("name", ["id", "prompt", "comment"])
def test_half_a_character_in_a_line_of_labels(tmp_path: Path, name: str) -> None:
    path = tmp_path / "labels.jsonl"
    row = json.loads(pick_line(_selection(1)[0], label=0))
    pool = PreferencePool([PoolItem("p0", "prompt 0", (" good", " bad"))])
    for text, whole in (("\U0001f600", True), ("\ud83d", False)):
        path.write_text(json.dumps({**row, name: text}) + "\n")
        if whole:
            assert len(read_labels(path)[0]) == 1
            continue
        for read in (read_labels, lambda path: read_labeled_pairs(path, pool)):
            with pytest.raises(ActiveDPOError, match="line 1: .ud83d is half of a surrogate pair"):
                read(path)


def test_files_are_read_together_with_what_the_page_wrote(tmp_path: Path) -> None:
    """What one of two files lacks may be in the other; the page's counts where both have it."""
    selection, oracle = _selection(3), FileOracle(tmp_path)
    with pytest.raises(LabelsPending):
        oracle.label(selection)
    path, labels = oracle.paths(selection)
    rows = _fill(path, [1, None, "skip"])
    _write(
        labels, [{**row, "label": label} for row, label in zip(rows, (0, None, None), strict=True)]
    )
    with pytest.raises(LabelsPending, match="1 of 3"):
        oracle.label(selection)
    _fill(path, [1, "skp", "skip"])
    with pytest.raises(ActiveDPOError, match="line 2: 'label' must be"):
        oracle.label(selection)
    _fill(path, [1, 1, "skip"])
    assert oracle.label(selection) == [0, 1, None]
