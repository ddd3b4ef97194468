"""Rounds on a pool whose responses are given: nothing is sampled, no pair is asked twice."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels import CallableOracle, RecordedOracle
from activedpo_fast.pool.items import PoolItem, Prompt
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.selection.picks_jsonl import Pick
from activedpo_fast.selection.rules import PickRules
from activedpo_fast.settings import LoopConfig
from activedpo_fast.training import loop as loop_module
from activedpo_fast.training.loop import ActiveDPOLoop
from activedpo_fast.training.prompts import draw_items
from activedpo_fast.training.run_folder import read_records
from activedpo_fast.training.trl import dpo_config
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer
from tests.support.rehearsals import rehearsed_once  # noqa: F401

ROWS = [
    {
        "id": f"r{n}",
        "prompt": f"The prompt {n // 2}",  # each in two rows
        "chosen": f" a good answer {n}",
        "rejected": f" the bad one {n}",
    }
    for n in range(8)
]


def _loop(folder: Path, prompts: Any, oracle: Any, **options: Any) -> ActiveDPOLoop:
    settings: dict[str, Any] = dict(
        output_dir=folder,
        dpo_args=dpo_config(
            output_dir=str(folder / "trainer"),
            learning_rate=1e-2,
            max_steps=1,
            per_device_train_batch_size=3,
        ),
        selector_options={"proj_dim": 64, "verify": False},
        batch_size=3,
        rounds=2,
        responses="given",
        show_progress=False,
    )
    model = lora(tiny_causal_lm("llama"), "llama", seed=1)
    return ActiveDPOLoop(model, tiny_tokenizer(), prompts, oracle, **{**settings, **options})


def _lines(folder: Path, t: int, name: str) -> list[dict[str, Any]]:
    path = folder / f"round-{t:03d}" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rounds_on_recorded_preferences(tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("responses were sampled")

    monkeypatch.setattr(loop_module, "generate_responses", refuse)
    oracle = RecordedOracle(ROWS)
    records = _loop(tmp_path, oracle.pool, oracle, rounds=3).run()
    assert [record.labels_total for record in records] == [0, 3, 6, 8]
    assert set(records[1].seconds) == {"features", "select", "label", "train", "evaluate"}
    labeled = [line for t in range(3) for line in _lines(tmp_path, t, "labels")]
    assert len({line["id"] for line in labeled}) == 8
    for line in labeled:
        assert line["responses"][line["label"]].startswith(" a good answer")
    assert [len(_lines(tmp_path, t, "pool")) for t in range(3)] == [8, 5, 2]
    assert len({line["label"] for line in labeled}) == 2

    # Another process reads it, and goes on only with the same preferences.
    assert len(_loop(tmp_path, oracle.pool, oracle, rounds=3).run()) == 4
    swapped = RecordedOracle(
        [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]
    )
    with pytest.raises(ActiveDPOError, match="oracle.preferences"):
        _loop(tmp_path, swapped.pool, swapped, rounds=3).run()
    shorter = PreferencePool(oracle.pool[n] for n in range(7))
    with pytest.raises(ActiveDPOError, match="prompts"):
        _loop(tmp_path, shorter, oracle, rounds=3).run()
    with pytest.raises(ActiveDPOError, match="round 3: all pairs of the pool are labeled"):
        _loop(tmp_path, oracle.pool, oracle, rounds=4).run()


def test_another_pool_of_the_same_prompts_is_another_run(tmp_path: Path) -> None:
    oracle = CallableOracle(lambda prompt, a, b: int(len(b) < len(a)))
    pool = RecordedOracle(ROWS).pool
    _loop(tmp_path, pool, oracle, rounds=1).run()
    changed = PreferencePool(
        PoolItem(item.id, item.prompt, (item.responses[0], " another"), item.extra) for item in pool
    )
    with pytest.raises(ActiveDPOError, match="prompts"):
        _loop(tmp_path, changed, oracle, rounds=1).run()


def test_rows_with_pairs_left_are_offered_again_after_the_others(tmp_path: Path) -> None:
    pool = PreferencePool(
        PoolItem(f"r{n}", f"The prompt {n}", (" one", " two", f" three {n}")) for n in range(3)
    )
    oracle = CallableOracle(lambda prompt, a, b: int(a < b))
    _loop(tmp_path, pool, oracle, batch_size=5, rounds=2, prompts_per_round=2).run()
    picked = [line for t in range(2) for line in _lines(tmp_path, t, "picked")]
    pairs = [(line["id"], tuple(line["pair"])) for line in picked]
    assert len(set(pairs)) == len(pairs) >= 8


def test_the_items_of_a_round() -> None:
    items = [PoolItem(f"r{n}", f"p{n}", ("a", "b", "c")) for n in range(6)]
    args = LoopConfig(output_dir="o", prompts_per_round=4, responses="given")
    first = draw_items(items, 0, [], args)
    assert len(first) == 4 and first.ids == draw_items(items, 0, [], args).ids
    assert set(first.ids) | set(draw_items(items, 1, [], args).ids) == {i.id for i in items}
    later = draw_items(items, 0, [*_picks(first[0], 3), *_picks(first[1], 1)], args).ids
    assert first.ids[0] not in later
    all_later = draw_items(items, 0, _picks(first[1], 1), LoopConfig(output_dir="o"))
    assert all_later.ids[-1] == first.ids[1]
    with pytest.raises(ActiveDPOError, match="all pairs of the pool are labeled"):
        draw_items(items, 5, [pick for item in items for pick in _picks(item, 3)], args)


def test_items_whose_pairs_were_picked_from_others_are_not_offered() -> None:
    """Pairs with the same texts are one candidate: such items would be all that a round has."""
    twins = [PoolItem(f"t{n}", "p", ("a", "b")) for n in range(4)]
    larger = PoolItem("l", "p", ("b", "c", "a"))
    chat = [{"role": "user", "content": "p"}]
    answers = tuple([{"role": "assistant", "content": text}] for text in "ab")
    own = [
        PoolItem(f"c{n}", chat, answers, {"chat_template_kwargs": {"k": n % 2}}) for n in range(4)
    ]
    args = LoopConfig(output_dir="o", prompts_per_round=2, responses="given")
    for t in range(4):
        assert draw_items([*twins, larger], t, _picks(larger, 1), args).ids != ["l"]  # b, c
        assert draw_items([*twins, larger], t, _picks(twins[0], 1), args).ids == ["l"]
        assert set(draw_items(own, t, _picks(own[1], 1), args).ids) == {"c0", "c2"}


def _picks(item: PoolItem, n: int) -> list[Pick]:
    """The first n pairs of an item."""
    return [
        Pick(
            item.id,
            (a, b),
            0.0,
            0,
            item.prompt,
            (item.responses[a], item.responses[b]),
            item_chat_template_kwargs=item.extra.get("chat_template_kwargs"),
        )
        for a, b in list(combinations(range(len(item.responses)), 2))[:n]
    ]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (None, {"temperature": 0.5}, "temperature: with responses 'given' no response is sampled"),
        ([Prompt("p", "The prompt")], {}, "expected a PreferencePool or a datasets.Dataset"),
        (None, {"rounds": 4}, "loop.rounds: 4 rounds of 3 pairs are more than the 8 of the pool"),
        (None, {"batch_size": 9, "rounds": 1}, "8 prompts with their given responses have 8"),
        (None, {"prompts_per_round": 2}, "2 prompts with their given responses have 2"),
        (None, {"rules": PickRules(exclude=[f"r{n}" for n in range(8)])}, "no prompt is left"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(
    tmp_path: Path, prompts: Any, options: dict[str, Any], message: str
) -> None:
    oracle = RecordedOracle(ROWS)
    with pytest.raises(ActiveDPOError, match=message):
        _loop(tmp_path, prompts or oracle.pool, oracle, **options).run()
    assert not (tmp_path / "config.json").exists()


def test_a_pool_that_fills_max_length_is_found_out_before_the_run(tmp_path: Path) -> None:
    oracle = RecordedOracle(ROWS)
    args = dpo_config(output_dir=str(tmp_path / "trainer"), max_length=2)
    with pytest.raises(ActiveDPOError, match="even the shortest prompt fills dpo.max_length"):
        _loop(tmp_path, oracle.pool, oracle, dpo_args=args).run()


def test_excluded_rows_are_not_candidates(tmp_path: Path) -> None:
    oracle = RecordedOracle(ROWS)
    rules = PickRules(exclude=["r0", "r3"])
    _loop(tmp_path, oracle.pool, oracle, rounds=1, rules=rules).run()
    # What is excluded is excluded with all rows of its prompt.
    ids = {line["id"] for line in _lines(tmp_path, 0, "pool")}
    assert ids == {"r4", "r5", "r6", "r7"}
    assert read_records(tmp_path)[1].labels_total == 3
