"""Metrics on held-out data, in rounds of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from activedpo_fast import ActiveDPOError, ActiveDPOLoop, Prompt, SelectorConfig
from activedpo_fast.labels import CallableOracle
from activedpo_fast.models.adapters import load_adapter_state
from activedpo_fast.training.evaluation import Evaluations, HeldoutReward, HeldoutWinRate
from activedpo_fast.training.generation import respond
from activedpo_fast.training.heldout_preferences import HeldoutPreferences
from activedpo_fast.training.run_folder import read_adapter
from activedpo_fast.training.trl import dpo_config
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer
from tests.support.rehearsals import rehearsed_once  # noqa: F401

pytest.importorskip("trl")

PROMPTS = [Prompt(f"p{n}", f"The fox {n}") for n in range(4)]
HELDOUT = [Prompt(f"h{n}", f"A dog {'and a fox ' * n}", {"weight": n}) for n in range(3)]
OPTIONS: dict[str, Any] = {"max_completion_length": 5, "show_progress": False}
PAIRS = [
    {"prompt": f"Prefer {n}?", "chosen": f" A sketch {n}.", "rejected": " No." * (n + 1)}
    for n in range(3)
]


def brevity(prompts: Any, responses: Any, extras: Any) -> list[float]:
    return [e["weight"] - len(r) / 10 for r, e in zip(responses, extras, strict=True)]


def _model() -> Any:
    return lora(tiny_causal_lm("llama"), "llama")


def _loop(folder: Path, evaluate: Any, dpo: Any = None, **options: Any) -> ActiveDPOLoop:
    return ActiveDPOLoop(
        options.pop("model", None) or _model(),
        tiny_tokenizer(),
        PROMPTS,
        CallableOracle(lambda prompt, a, b: int(len(b) < len(a))),
        output_dir=folder,
        dpo_args=dpo_config(
            output_dir=str(folder / "trainer"),
            **{"learning_rate": 0.1, "max_steps": 3, "beta": 0.2, **(dpo or {})},
        ),
        strategy="random",
        batch_size=2,
        rounds=1,
        num_generations=2,
        max_completion_length=6,
        evaluate=evaluate,
        show_progress=False,
        **options,
    )


def _reward(folder: Path, **options: Any) -> HeldoutReward:
    return HeldoutReward(
        HELDOUT,
        brevity,
        output_dir=folder,
        processing_class=tiny_tokenizer(),
        **{**OPTIONS, "samples": 2, **options},
    )


def _by_hand(folder: Path) -> np.ndarray:
    """The mean reward of each prompt, under the adapter in a folder."""
    model = _model()
    load_adapter_state(model, read_adapter(folder))
    twice = [*HELDOUT, *HELDOUT]
    named = [Prompt(f"{p.id}/{n // 3}", p.prompt) for n, p in enumerate(twice)]
    texts = respond(model, tiny_tokenizer(), named, temperature=1.0, seed=1, **OPTIONS)
    rewards = brevity(None, texts, [p.extra for p in twice])
    return (np.array(rewards[:3]) + np.array(rewards[3:])) / 2


def test_the_reward_on_held_out_prompts_and_its_gain_over_the_start(tmp_path: Path) -> None:
    start, first = _loop(tmp_path, _reward(tmp_path)).run()
    before, after = _by_hand(tmp_path / "start"), _by_hand(tmp_path / "round-000")
    assert start.metrics["reward"] == pytest.approx(before.mean())
    assert start.metrics["gain"] == start.metrics["gain_se"] == 0
    assert first.metrics["reward"] == pytest.approx(after.mean())
    assert first.metrics["gain"] == pytest.approx((after - before).mean())
    assert first.metrics["gain"] != 0
    assert first.metrics["gain_se"] == pytest.approx((after - before).std(ddof=1) / 3**0.5)
    kept = json.loads((tmp_path / "round-000" / "heldout.json").read_text())
    assert np.allclose(kept["rewards"], after)
    assert [len(texts) for texts in kept["responses"]] == [2, 2, 2]
    # Evaluated again, as after a kill before the record was written.
    (tmp_path / "round-000" / "record.json").unlink()
    again = _loop(tmp_path, _reward(tmp_path)).run()
    assert [record.metrics for record in again] == [start.metrics, first.metrics]
    assert json.loads((tmp_path / "round-000" / "heldout.json").read_text()) == kept


def test_held_out_values_that_have_changed_or_are_of_others_are_refused(tmp_path: Path) -> None:
    _loop(tmp_path, _reward(tmp_path)).run()
    with pytest.raises(ActiveDPOError, match=r"evaluate.reward.samples \(2, now 1\) differs"):
        _loop(tmp_path, _reward(tmp_path, samples=1)).run()
    (tmp_path / "round-000" / "record.json").unlink()
    path = tmp_path / "start" / "heldout.json"
    content = path.read_text()
    path.write_text(content.replace("[", "[ "))
    with pytest.raises(ActiveDPOError, match=r"heldout.json has changed since the run wrote it"):
        _loop(tmp_path, _reward(tmp_path)).run()
    path.write_text(content)
    assert _loop(tmp_path, _reward(tmp_path)).run()[1].metrics["gain"] != 0


def test_what_cannot_be_evaluated_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    def broken(prompts: Any, responses: Any, extras: Any) -> list[float]:
        return [float("nan")] * len(responses)

    run = tmp_path / "run"
    evaluate = HeldoutReward(
        HELDOUT, broken, output_dir=run, processing_class=tiny_tokenizer(), **OPTIONS
    )
    with pytest.raises(ActiveDPOError, match="evaluate: the reward of a response to id 'h.* is n"):
        _loop(run, evaluate).run()
    gpt2 = lora(tiny_causal_lm("gpt2"), "gpt2")  # has 256 positions
    with pytest.raises(ActiveDPOError, match="evaluate: item 'h1': .*256 positions"):
        _loop(run, _reward(run, max_completion_length=250), model=gpt2).run()
    assert not run.exists()
    with pytest.raises(ActiveDPOError, match="samples: 0 is below 1"):
        _reward(run, samples=0)
    with pytest.raises(ActiveDPOError, match="temperature: -1 is not"):
        _reward(run, temperature=-1)


def test_greedy_responses_and_chat(tmp_path: Path) -> None:
    seen: list[Any] = []

    def reward(prompts: Any, responses: Any, extras: Any) -> list[float]:
        seen.extend(responses)
        return [1.0] * len(responses)

    chat = [Prompt("c", [{"role": "user", "content": "The fox"}])]
    evaluate = HeldoutReward(
        chat,
        reward,
        output_dir=tmp_path,
        processing_class=tiny_tokenizer(chat=True),
        temperature=0.0,
        **OPTIONS,
    )
    assert evaluate(_model()) == {"reward": 1.0, "reward_se": 0.0, "gain": 0.0, "gain_se": 0.0}
    assert seen == [[{"role": "assistant", "content": evaluate.responses[0]}]]
    with pytest.raises(ActiveDPOError, match="samples: at temperature 0 all 2 are the same"):
        _reward(tmp_path, temperature=0.0)


def test_responses_from_elsewhere_are_the_policy_s_of_the_round(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []

    def generate(prompts: Any, num_generations: int, seed: int, **kwargs: Any) -> list[list[str]]:
        calls.append((kwargs["adapter"].parent.name, num_generations, seed))
        length = 1 + (kwargs["adapter"].parent.name == "start")
        return [[" x" * length, " y" * length] for _ in prompts]

    start, first = _loop(tmp_path, _reward(tmp_path, generate=generate)).run()
    assert calls == [("start", 2, 1), ("round-000", 2, 1)]
    assert first.metrics["gain"] == pytest.approx(0.2)  # two characters less
    kept = json.loads((tmp_path / "start" / "heldout.json").read_text())
    assert kept["responses"] == [[" x x", " y y"]] * 3
    with pytest.raises(ActiveDPOError, match="1 responses to a held-out prompt, 2 were asked for"):
        _reward(tmp_path / "b", generate=lambda prompts, **_: [["a"]] * len(prompts))(_model())


def test_the_win_rate_against_the_start(tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def prefer(prompt: Any, a: str, b: str) -> int | None:
        asked.append((a, b))
        return None if len(asked) == 1 else 1  # the first is a tie, the others are won

    evaluate = HeldoutWinRate(
        HELDOUT,
        CallableOracle(prefer),
        output_dir=tmp_path,
        processing_class=tiny_tokenizer(),
        **OPTIONS,
    )
    start, first = _loop(tmp_path, evaluate).run()
    assert start.metrics == {"win_rate": 0.5, "win_rate_se": 0.0}
    files = [tmp_path / name / "heldout-responses.json" for name in ("start", "round-000")]
    before, after = (json.loads(path.read_text())["responses"] for path in files)
    assert asked == [(a[0], b[0]) for a, b in zip(before, after, strict=True) if a != b]
    wins = [0.5 if a == b else 1.0 for a, b in zip(before, after, strict=True)]
    wins[wins.index(1.0)] = 0.5
    assert first.metrics["win_rate"] == pytest.approx(np.mean(wins))
    assert first.metrics["win_rate"] > 0.5


def _preferences(folder: Path, **settings: Any) -> HeldoutPreferences:
    return HeldoutPreferences(
        PAIRS,
        output_dir=folder,
        processing_class=tiny_tokenizer(),
        settings=SelectorConfig(beta=0.2, **settings),
        show_progress=False,
    )


def _logp(model: Any, prompt: str, response: str) -> float:
    """log π(y|x) with the EOS token, by a plain forward pass."""
    tokenizer = tiny_tokenizer()
    length = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([[*tokenizer(prompt + response)["input_ids"], tokenizer.eos_token_id]])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].log_softmax(-1)
    return float(logps.gather(1, ids[0, 1:, None])[length - 1 :].sum())


def test_accuracy_and_margin_of_the_implicit_reward(tmp_path: Path) -> None:
    evaluate = Evaluations([_reward(tmp_path), _preferences(tmp_path)])
    # The trainer's own evaluation, after its last step, has to say the same.
    own = {
        "eval_dataset": Dataset.from_list(PAIRS),
        "dpo": {"eval_strategy": "steps", "eval_steps": 3},
    }
    start, first = _loop(tmp_path, evaluate, **own).run()
    assert first.training["eval_margin"] == pytest.approx(first.metrics["margin"], rel=1e-3)
    assert first.training["eval_accuracy"] == pytest.approx(first.metrics["accuracy"])
    assert first.training["eval_loss"] > 0 and not start.training
    other = {**own, "eval_dataset": Dataset.from_list(PAIRS[:2])}
    with pytest.raises(ActiveDPOError, match="eval_dataset .*differs"):
        _loop(tmp_path, evaluate, **other).run()
    assert (start.metrics["accuracy"], start.metrics["margin"]) == (0.5, 0.0)
    assert start.metrics["accuracy_se"] == start.metrics["margin_se"] == 0
    rewards = np.zeros((3, 2))
    for name, sign in (("start", -1), ("round-000", 1)):
        model = _model()
        load_adapter_state(model, read_adapter(tmp_path / name))
        for n, row in enumerate(PAIRS):
            for m, key in enumerate(("chosen", "rejected")):
                rewards[n, m] += sign * 0.2 * _logp(model, row["prompt"], row[key])
    margins = rewards[:, 0] - rewards[:, 1]
    assert first.metrics["margin"] == pytest.approx(margins.mean(), rel=1e-4)
    assert first.metrics["margin_se"] == pytest.approx(margins.std(ddof=1) / 3**0.5, rel=1e-4)
    assert first.metrics["accuracy"] == pytest.approx((margins > 0).mean())
    assert first.metrics.keys() == {
        f"{name}{end}" for name in ("reward", "gain", "accuracy", "margin") for end in ("", "_se")
    }


def test_what_is_no_data_set_for_the_trainer_is_refused(tmp_path: Path) -> None:
    for given, message in (
        (PAIRS, "eval_dataset: expected a datasets.Dataset, got list"),
        (Dataset.from_list([{"prompt": "a", "chosen": "b"}]), "it has no column 'rejected'"),
        (Dataset.from_list(PAIRS).select([]), "eval_dataset: it has no rows"),
    ):
        with pytest.raises(ActiveDPOError, match=message):
            _loop(tmp_path, None, eval_dataset=given)


def test_pairs_that_the_trainer_leaves_out_are_left_out(tmp_path: Path, caplog: Any) -> None:
    whole = _preferences(tmp_path / "a")
    lengths = [len(tiny_tokenizer()(row["prompt"])["input_ids"]) for row in PAIRS]
    long = [*PAIRS, {**PAIRS[0], "prompt": "Prefer this, or that, or something else?" * 3}]
    evaluate = HeldoutPreferences(
        long,
        output_dir=tmp_path / "b",
        processing_class=tiny_tokenizer(),
        settings=SelectorConfig(beta=0.2, max_length=max(lengths) + 30),
        show_progress=False,
    )
    assert "1 of 4 held-out pairs are left out" in caplog.text
    model = _model()
    assert evaluate(model) == whole(model)
    kept = json.loads((tmp_path / "b" / "start" / "heldout-preferences.json").read_text())
    assert len(kept["logps"]) == 3
    with pytest.raises(ActiveDPOError, match="prompt of every pair fills max_length=3"):
        _preferences(tmp_path, max_length=3)
    with pytest.raises(ActiveDPOError, match="row 2: recorded preferences need the columns"):
        HeldoutPreferences(
            [PAIRS[0], {"prompt": "x", "chosen": " y"}],
            output_dir=tmp_path,
            processing_class=tiny_tokenizer(),
            settings=SelectorConfig(),
        )
