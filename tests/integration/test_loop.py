"""The loop on a tiny model: its files on disk, and that an interruption changes nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels import CallableOracle, FileOracle, LabelsPending
from activedpo_fast.models.adapters import adapter_state
from activedpo_fast.pool.items import Prompt
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.selection.result import Selection
from activedpo_fast.selection.rules import PickRules
from activedpo_fast.training.checksums import write_recorded
from activedpo_fast.training.loop import ActiveDPOLoop
from activedpo_fast.training.prompts import draw_prompts
from activedpo_fast.training.run_folder import read_records
from activedpo_fast.training.trl import dpo_config
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer
from tests.support.rehearsals import rehearsed_once  # noqa: F401

WORDS = "library prompt model sketch label pair fox dog random choose".split()
PROMPTS = [Prompt(f"p{n}", f"The {word}", {"n": n}) for n, word in enumerate(WORDS)]


def _prefer(prompt: Any, a: Any, b: Any) -> int:
    return int(a < b)


def _loop(folder: Path, oracle: Any = None, adapter_seed: int = 1, **options: Any) -> ActiveDPOLoop:
    settings: dict[str, Any] = dict(
        output_dir=folder,
        dpo_args=dpo_config(
            output_dir=str(folder / "trainer"),
            learning_rate=1e-2,
            max_steps=2,
            per_device_train_batch_size=3,
        ),
        selector_options={"proj_dim": 64, "verify": False},
        batch_size=3,
        rounds=2,
        prompts_per_round=4,
        num_generations=2,
        max_completion_length=4,
        show_progress=False,
    )
    model = lora(tiny_causal_lm("llama"), "llama", seed=adapter_seed)
    prompts = options.pop("prompts", PROMPTS)
    return ActiveDPOLoop(
        model,
        tiny_tokenizer(),
        prompts,
        oracle or CallableOracle(_prefer),
        **{**settings, **options},
    )


def _files(folder: Path) -> dict[str, bytes]:
    """All files on disk, without times."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.suffix in (".jsonl", ".safetensors")
    }
    for record in read_records(folder):
        found[f"record {record.round}"] = json.dumps(
            [record.labels_total, record.metrics, sorted(record.seconds)]
        ).encode()
    return found


def _metric(model: Any) -> dict[str, float]:
    return {"norm": sum(float(t.norm()) for t in adapter_state(model).values())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    _loop(folder, evaluate=_metric).run()
    return folder


def test_rounds_are_recorded(whole: Path) -> None:
    records = read_records(whole)
    assert [record.round for record in records] == [-1, 0, 1]
    assert [record.labels_total for record in records] == [0, 3, 6]
    assert {r.strategy for r in records} == {"activedpo"}
    assert set(records[1].seconds) == {
        "generate",
        "features",
        "select",
        "label",
        "train",
        "evaluate",
    }
    assert len({record.metrics["norm"] for record in records}) == 3  # the weights moved
    for t in range(2):
        lines = (whole / f"round-00{t}" / "labels.jsonl").read_text().splitlines()
        for line in map(json.loads, lines):
            assert line["label"] == _prefer(None, *line["responses"])
    assert not list(whole.rglob(".adapter-*"))


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize("stage", ["generate", "select", "label", "train", "evaluate"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    whole: Path, tmp_path: Path, monkeypatch: Any, stage: str
) -> None:
    """A stage of the second round is interrupted, and a new process continues."""
    import activedpo_fast.training.loop as module

    loop = _loop(tmp_path, evaluate=_metric)
    calls = {"n": 0}
    fail_at = 3 if stage == "evaluate" else 2  # the start is evaluated too

    def breaking(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls["n"] += 1
            result = real(*args, **kwargs)
            if calls["n"] == fail_at:
                raise _Interrupted
            return result

        return call

    with monkeypatch.context() as patch:
        if stage == "generate":
            patch.setattr(module, "generate_responses", breaking(module.generate_responses))
        elif stage == "train":
            patch.setattr(module, "train_dpo", breaking(module.train_dpo))
        elif stage == "select":
            patch.setattr(loop.selector, "select", breaking(loop.selector.select))
        elif stage == "label":
            patch.setattr(loop.oracle, "label", breaking(loop.oracle.label))
        else:
            patch.setattr(loop, "evaluate", breaking(loop.evaluate))
        with pytest.raises(_Interrupted):
            loop.run()
    _loop(tmp_path, evaluate=_metric).run()
    assert _files(tmp_path) == _files(whole)


class _Breaks(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise RuntimeError("a callback has failed")


class _Stops(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


def test_a_callback_that_raises_leaves_a_run_to_continue(whole: Path, tmp_path: Path) -> None:
    loop = _loop(tmp_path, evaluate=_metric, callbacks=[_Breaks()])
    before = adapter_state(loop.model)
    with pytest.raises(RuntimeError, match="a callback has failed"):
        loop.run()
    after = adapter_state(loop.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "round-000" / "labels.jsonl").exists()
    assert not (tmp_path / "round-000" / "adapter").exists()
    loop.callbacks = None
    loop.run()
    assert _files(tmp_path) == _files(whole)


def test_a_callback_that_stops_ends_the_training_of_its_round(tmp_path: Path) -> None:
    records = _loop(tmp_path, callbacks=[_Stops()]).run()
    assert [record.training["steps"] for record in records[1:]] == [1, 1]  # of 2
    assert [record.labels_total for record in records] == [0, 3, 6]


@pytest.mark.parametrize(
    ("callbacks", "got"), [(_Stops(), "_Stops"), ("trackio", "str"), ([_Stops(), 3], "int")]
)
def test_what_is_no_list_of_callbacks_is_refused_before_a_run(
    tmp_path: Path, callbacks: Any, got: str
) -> None:
    with pytest.raises(ActiveDPOError, match=f"callbacks: expected a list of .*, got {got}"):
        _loop(tmp_path / "run", callbacks=callbacks)
    assert not (tmp_path / "run").exists()


def test_fewer_prompts_than_a_round_takes(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO", logger="activedpo_fast")
    prompts = PROMPTS[:6]
    records = _loop(tmp_path, prompts=prompts, prompts_per_round=1000).run()
    assert [record.labels_total for record in records] == [0, 3, 6]
    for t in range(2):
        pool = PreferencePool.load(tmp_path / f"round-00{t}" / "pool.jsonl")
        assert sorted(item.id for item in pool) == [prompt.id for prompt in prompts]
    said = "prompts_per_round is 1000, and there are 6 prompts: every round takes them all"
    assert caplog.text.count(said) == 1


def test_a_complete_run_is_only_read(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}

    def refuse(*_: Any) -> Any:
        raise AssertionError("nothing is left to do")

    records = _loop(whole, CallableOracle(refuse), evaluate=refuse).run()
    assert records == read_records(whole)
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()} == before


def test_other_settings_are_refused_by_name(whole: Path) -> None:
    with pytest.raises(ActiveDPOError, match=r"batch_size \(3, now 2\)"):
        _loop(whole, batch_size=2).run()
    with pytest.raises(ActiveDPOError, match="train_on: expected 'all' or 'newest', got 'some'"):
        _loop(whole, train_on="some")


def test_rules_hold_in_every_round_and_are_settings(tmp_path: Path, caplog: Any) -> None:
    # Each round has four of the five prompts that are not excluded, and not all groups.
    rules = PickRules(
        exclude=[f"p{n}" for n in range(5)],
        group_by="n",
        quotas={"5": 0, "6": 1, "7": 1},
        max_per_prompt=1,
    )
    caplog.set_level("WARNING", logger="activedpo_fast")
    loop = _loop(tmp_path, rules=rules, num_generations=3, batch_size=4)
    records = loop.run()
    offered, picked = [], []
    for t in range(2):
        offered.append(
            {item.id for item in PreferencePool.load(tmp_path / f"round-00{t}" / "pool.jsonl")}
        )
        picked.append(
            [pick.id for pick in Selection.from_jsonl(tmp_path / f"round-00{t}" / "picked.jsonl")]
        )
    assert all(len(ids) == 4 and min(ids) >= "p5" for ids in offered)
    assert [set(ids) for ids in picked] == [ids - {"p5"} for ids in offered]
    assert records[-1].labels_total == sum(map(len, picked)) < 8
    assert f"{len(picked[0])} of 4 pairs picked" in caplog.text

    _loop(tmp_path, rules=rules, num_generations=3, batch_size=4).run()
    for other, name in (
        (None, "rules"),
        (replace(rules, max_per_prompt=2), "rules.max_per_prompt"),
        (replace(rules, exclude=["p1"]), "rules.exclude"),
        (replace(rules, quotas={"6": 1}), "rules.quotas"),
    ):
        with pytest.raises(ActiveDPOError, match=f"other settings: {name}"):
            _loop(tmp_path, rules=other, num_generations=3, batch_size=4).run()


def test_rules_are_checked_against_all_prompts(tmp_path: Path) -> None:
    for rules, message in (
        (PickRules(exclude=[p.id for p in PROMPTS]), "no prompt is left"),
        (PickRules(exclude=["p77"]), "no item has the id 'p77'"),
        (PickRules(group_by="n", quotas={"77": 1}), "no item's 'n' is '77'"),
        (PickRules(cost="n"), "'n' of item 'p0' must be a positive number"),
    ):
        with pytest.raises(ActiveDPOError, match=message):
            _loop(tmp_path, rules=rules)


def test_a_round_with_nothing_to_label_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ActiveDPOError, match="round-000: no pair is left .* min_score"):
        _loop(tmp_path, rules=PickRules(min_score=1e6)).run()
    assert not (tmp_path / "round-000" / "picked.jsonl").exists()


def test_people_label_between_runs(tmp_path: Path) -> None:
    oracle = FileOracle(tmp_path / "people")
    for done in range(3):
        loop = _loop(
            tmp_path / "run",
            oracle,
            train_on="newest",
            start_from="current",
            reference="round",
            strategy="random",
        )
        if done == 2:
            assert [record.labels_total for record in loop.run()] == [0, 2, 4]
            break
        with pytest.raises(LabelsPending):
            loop.run()
        for path in (tmp_path / "people").glob("*.jsonl"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            for row in rows:
                row["label"] = "skip" if row["rank"] == 0 else 1
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _fill_in(folder: Path, label: Any) -> None:
    """Write `label`, or null, into every line of the files that has no label."""
    for path in folder.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["label"] = label if row["label"] is None else row["label"]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("options", [{}, {"train_on": "newest", "start_from": "current"}])
def test_a_round_without_a_preference_is_skipped(tmp_path: Path, options: Any, caplog: Any) -> None:
    caplog.set_level("INFO", logger="activedpo_fast")
    oracle = FileOracle(tmp_path / "people")
    for answer in ("skip", 1, "tie"):
        with pytest.raises(LabelsPending):
            _loop(tmp_path / "run", oracle, rounds=3, **options).run()
        _fill_in(tmp_path / "people", answer)
    records = _loop(tmp_path / "run", oracle, rounds=3, **options).run()
    assert [record.labels_total for record in records] == [0, 0, 3, 3]
    weights = [
        load_file(tmp_path / "run" / name / "adapter" / "adapter_model.safetensors")
        for name in ("start", "round-000", "round-001", "round-002")
    ]
    same = [
        all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(weights, weights[1:], strict=False)
    ]
    assert same == [True, False, True]
    said = [r.getMessage() for r in caplog.records if "preference" in r.getMessage()]
    assert said == [
        f"round-00{t}: none of its 3 pairs got a preference: there is nothing new to "
        "train on, and the adapter stays as it was"
        for t in (0, 2)
    ]
    labels = [
        json.loads(line)["label"]
        for line in (tmp_path / "run" / "round-000" / "labels.jsonl").read_text().splitlines()
    ]
    assert labels == ["skip"] * 3


def test_a_prompt_in_several_rows_is_one_prompt(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO", logger="activedpo_fast")
    prompts = [*PROMPTS[:4], *(replace(p, id=f"again-{p.id}") for p in PROMPTS[:4])]
    loop = _loop(
        tmp_path, prompts=prompts, prompts_per_round=3, rules=PickRules(exclude=["again-p1"])
    )
    assert "4 of 8 prompts repeat the text of an earlier one: it is offered once" in caplog.text
    loop.run()
    for t in range(2):
        pool = PreferencePool.load(tmp_path / f"round-00{t}" / "pool.jsonl")
        assert sorted(pool.ids) == ["p0", "p2", "p3"]  # p1 is excluded by its other row


def test_prompts_of_one_column_value_are_asked_as_one(tmp_path: Path) -> None:
    prompts = [replace(p, extra={"post": n % 2}) for n, p in enumerate(PROMPTS[:6])]
    loop = _loop(
        tmp_path,
        prompts=prompts,
        prompts_per_round=2,
        batch_size=1,
        num_generations=2,
        rules=PickRules(prompt_by="post"),
        strategy="random",
    )
    loop.run()
    posts = [
        [
            {p.id: p for p in prompts}[pick.id].extra["post"]
            for pick in Selection.from_jsonl(tmp_path / f"round-00{t}" / "picked.jsonl")
        ]
        for t in range(2)
    ]
    offered = PreferencePool.load(tmp_path / "round-001" / "pool.jsonl")
    # Prompts not asked yet come first: both prompts of round 1 are of the other post.
    assert {item.extra["post"] for item in offered} == {1 - posts[0][0]}


def test_pairs_without_a_preference_are_not_asked_again(tmp_path: Path) -> None:
    """Both rounds sample responses to the only two prompts, and get the same few."""
    asked = []

    def nobody_knows(prompt: Any, a: Any, b: Any) -> None:
        asked.append((prompt, frozenset([a, b])))

    loop = _loop(
        tmp_path,
        CallableOracle(nobody_knows),
        prompts=PROMPTS[:2],
        batch_size=2,
        prompts_per_round=2,
        rounds=2,
    )
    loop.run()
    texts = [(tmp_path / f"round-00{t}" / "pool.jsonl").read_text() for t in range(2)]
    # The second round with the pool of the first: every pair of it was asked.
    write_recorded(tmp_path / "round-001" / "pool.jsonl", texts[0].encode())
    for name in ("picked.jsonl", "labels.jsonl", "record.json"):
        (tmp_path / "round-001" / name).unlink()
    shutil.rmtree(tmp_path / "round-001" / "adapter")
    with pytest.raises(ActiveDPOError, match="no pair is left to pick"):
        loop.run()
    assert len(set(asked)) == 4 and len(asked) == 4


def test_prompts_are_not_offered_twice_until_they_run_out(caplog: Any) -> None:
    first = draw_prompts(PROMPTS, 0, 4, set(), seed=1)
    second = draw_prompts(PROMPTS, 1, 4, {p.id for p in first}, seed=1)
    asked = {p.id for p in first + second}
    assert len(asked) == 8 and not caplog.records
    third = draw_prompts(PROMPTS, 2, 4, asked, seed=1)
    assert len({p.id for p in third}) == 4 and not {p.id for p in third[:2]} & asked
    assert "2 others are offered again" in caplog.text
    assert len(draw_prompts(PROMPTS, 0, 99, set(), seed=1)) == 10
    assert draw_prompts(PROMPTS, 0, 4, set(), seed=2) != first


def test_a_round_with_too_few_candidates_picks_them_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In one of the rounds, a prompt that fills max_length leaves one pair less than the batch
    size."""
    prompts = [*PROMPTS[:7], Prompt("long", "The fox " * 40)]
    args = dpo_config(output_dir=str(tmp_path / "trainer"), max_steps=2, max_length=40)
    loop = _loop(tmp_path, prompts=prompts, batch_size=4, rounds=2, dpo_args=args)
    assert [record.labels_total for record in loop.run()][-1] == 7
    assert "3 pairs are picked instead of 4" in caplog.text


def test_columns_of_the_prompts_are_those_of_now(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Costs that are corrected or added after responses were generated."""

    def prompts(cheap: str | None) -> list[Prompt]:
        return [
            replace(
                p,
                extra={
                    **p.extra,
                    **({} if cheap is None else {"tokens": 1e-6 if p.id == cheap else 1.0}),
                },
            )
            for p in PROMPTS[:4]
        ]

    def first(folder: Path, cheap: str | None) -> str:
        rules = None if cheap is None else PickRules(cost="tokens")
        _loop(folder, prompts=prompts(cheap), rules=rules, rounds=1, batch_size=1).run()
        return Selection.from_jsonl(folder / "round-000" / "picked.jsonl")[0].id

    for before in ("p0", None):
        folder = tmp_path / str(before)
        with pytest.raises(LabelsPending):
            _loop(
                folder,
                FileOracle(tmp_path / "people" / str(before)),
                prompts=prompts(before),
                rules=None if before is None else PickRules(cost="tokens"),
                rounds=1,
                batch_size=1,
            ).run()
        (folder / "round-000" / "picked.jsonl").unlink()  # as if killed while picking
        caplog.clear()
        with caplog.at_level("INFO", logger="activedpo_fast"):
            assert first(folder, "p3") == "p3"
        assert "columns of the prompts have changed and are read as they are now: tokens" in (
            caplog.text
        )
