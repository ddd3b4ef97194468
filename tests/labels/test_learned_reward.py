"""The reward that is learned from the labels so far, against least squares, and in a loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels import CallableOracle, LearnedReward
from activedpo_fast.labels.reading import read_labels
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.selection.picks_jsonl import Pick
from activedpo_fast.selection.result import Selection
from activedpo_fast.selection.strategies import RewardGap
from tests.integration.test_loop import _loop


def _embed(width: int) -> Any:
    def embed(prompts: Any, responses: Any) -> list[list[float]]:
        return [
            [math.sin((n + 1) * (len(p) + 3.7 * len(r) + sum(map(ord, r)))) for n in range(width)]
            for p, r in zip(prompts, responses, strict=True)
        ]

    return embed


def _selection(count: int, start: int = 0) -> Selection:
    return Selection(
        tuple(
            Pick(f"p{n}", (0, 1), 0.0, n, f"Prompt {n}", (f" first {n}", f" second, {n * n}"))
            for n in range(start, start + count)
        ),
        "random",
    )


@pytest.mark.parametrize("width, ridge", [(3, 1.0), (40, 0.3), (9, 7.0)])
def test_it_is_the_ridge_regression_to_the_labels(width: int, ridge: float) -> None:
    embed = _embed(width)
    picked = [_selection(7), _selection(5, start=20)]
    labels = [[0, 1, None, 1, 0, 0, 1], [1, 1, 0, None, 0]]
    reward = LearnedReward(embed, ridge=ridge)
    reward.learn(picked, labels)

    rows, y = [], []
    for selection, given in zip(picked, labels, strict=True):
        for pick, label in zip(selection, given, strict=True):
            if label is not None:
                a, b = (torch.tensor(embed([pick.prompt], [r])[0]) for r in pick.responses)
                rows.append((a - b).double())
                y.append(1.0 if label == 0 else -1.0)
    x = torch.stack(rows)
    scale = x.norm(dim=1).mean()
    padded = torch.cat([x / scale, math.sqrt(ridge) * torch.eye(width, dtype=torch.float64)])
    target = torch.tensor([*y, *[0.0] * width], dtype=torch.float64)
    weights = torch.linalg.lstsq(padded, target[:, None]).solution.flatten() / scale

    prompts, responses = ["Prompt 3", "new", "new"], [" first 3", " one", " other"]
    expected = torch.tensor(embed(prompts, responses)).double() @ weights
    assert reward(prompts, responses, [{}] * 3) == pytest.approx(expected.tolist(), rel=1e-5)
    reward.learn(picked[:1], labels[:1])  # nothing is left of the labels before
    again = LearnedReward(embed, ridge=ridge)
    again.learn(picked[:1], labels[:1])
    found = reward(prompts, responses, [{}] * 3)
    assert found == again(prompts, responses, [{}] * 3) != pytest.approx(expected.tolist())


@pytest.mark.parametrize("labels", [None, [None] * 4])
def test_without_labels_it_is_random(labels: list[int | None] | None) -> None:
    reward = LearnedReward(_embed(3), seed=1)
    if labels is not None:
        reward.learn([_selection(4)], [[0, 1, 1, 0]])
        reward.learn([_selection(4)], [labels])
    prompts, responses = ["a"] * 200, [f" {n}" for n in range(200)]
    found = reward(prompts, responses, [{}] * 200)
    assert found == LearnedReward(_embed(9), seed=1)(prompts, responses, [{}] * 200)
    assert found != LearnedReward(_embed(3), seed=2)(prompts, responses, [{}] * 200)
    assert len(set(found)) == 200 and 0 <= min(found) < 0.05 < 0.95 < max(found) < 1
    chat = [[{"role": "user", "content": "a"}]]
    assert 0 <= reward(chat, [[{"role": "assistant", "content": "b"}]], [{}])[0] < 1


def test_responses_that_all_look_the_same_have_the_same_reward() -> None:
    reward = LearnedReward(lambda prompts, responses: torch.ones(len(responses), 5))
    reward.learn([_selection(4)], [[0, 1, 1, 0]])
    assert reward(["a"] * 2, [" b", " c"], [{}] * 2) == [0.0, 0.0]


@pytest.mark.parametrize(
    "found, message",
    [
        ([1.0, 2.0], r"embed: expected \[2, d\] numbers, got \[2\]"),
        ([[1.0], [2.0], [3.0]], r"embed: expected \[2, d\] numbers, got \[3, 1\]"),
        ([[1.0], [float("nan")]], "embed: the embedding of ' first 1' is not finite"),
    ],
)
def test_bad_embeddings_are_named(found: Any, message: str) -> None:
    with pytest.raises(ActiveDPOError, match=message):
        LearnedReward(lambda prompts, responses: found).learn([_selection(2)], [[0, 1]])


def test_bad_options_are_refused() -> None:
    for ridge in (0, -1.0, math.inf, "1"):
        with pytest.raises(ActiveDPOError, match="ridge: .* is not a finite number above 0"):
            LearnedReward(_embed(2), ridge=ridge)  # type: ignore[arg-type]
    with pytest.raises(ActiveDPOError, match="embed: expected a function, got str"):
        LearnedReward("MiniLM")  # type: ignore[arg-type]


def test_a_loop_learns_before_each_round(tmp_path: Path) -> None:
    oracle = CallableOracle(lambda prompt, a, b: int(sum(map(ord, b)) > sum(map(ord, a))))
    reward = LearnedReward(_embed(6), ridge=0.5)
    loop = _loop(tmp_path / "run", oracle, strategy=RewardGap(reward), rounds=3)
    assert len(loop.run()) == 4
    fresh, history = LearnedReward(_embed(6), ridge=0.5), []
    for folder in sorted((tmp_path / "run").glob("round-*")):
        fresh.learn([picked for picked, _ in history], [labels for _, labels in history])
        pool = PreferencePool.from_jsonl(folder / "pool.jsonl")
        gaps = []
        for item in pool:
            numbers = fresh([item.prompt] * len(item.responses), item.responses, [])
            gaps += [abs(a - b) for n, a in enumerate(numbers) for b in numbers[n + 1 :]]
        picked, labels = read_labels(folder / "labels.jsonl")
        best = sorted(gaps, reverse=True)[: len(picked)]
        assert [pick.score for pick in picked] == pytest.approx(best, rel=1e-6)
        history.append((picked, labels))
    with pytest.raises(ActiveDPOError, match="strategy"):  # what it learned with is a setting
        _loop(
            tmp_path / "run", oracle, strategy=RewardGap(LearnedReward(_embed(6))), rounds=3
        ).run()
