"""One setting for the arguments of the chat template: generation, selection and training see the
same text."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

import activedpo_fast.training.generation as generation
from activedpo_fast._files import read_checked_json
from activedpo_fast.cli.app import main
from activedpo_fast.cli.run_file import make_config
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels import CallableOracle, FileOracle, LabelsPending, RewardModel
from activedpo_fast.labels.reading import read_labels
from activedpo_fast.pool.items import PoolItem, Prompt
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.tokens import TokenizedPool, tokenize_pool
from activedpo_fast.selection.picks_jsonl import Pick
from activedpo_fast.selection.result import Selection
from activedpo_fast.selector import ActiveDPOSelector
from activedpo_fast.store.store import FeatureStore
from activedpo_fast.training.generation import generate_responses, respond
from activedpo_fast.training.loop import ActiveDPOLoop
from activedpo_fast.training.trl import dpo_config
from tests.support.models import VOCAB_SIZE, lora, tiny_causal_lm, tiny_tokenizer
from tests.support.rehearsals import rehearsed_once  # noqa: F401

trl = pytest.importorskip("trl")

# As TRL ships it, with one more argument, `style`, which changes more of the prompt than its end.
_QWEN3 = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
_STYLE = "{% if style is defined %}<|im_start|>system\n{{ style }}<|im_end|>\n{% endif %}"
_TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
_THINKING, _BRIEF = {"enable_thinking": False}, {"enable_thinking": False, "style": "brief"}


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = _STYLE + _QWEN3
    return tokenizer


def _user(text: str, **more: Any) -> list[dict[str, str]]:
    return [{"role": "user", "content": text, **more}]


def _assistant(text: str, **more: Any) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text, **more}]


def _prompts(**extra: Any) -> list[Prompt]:
    words = ("library", "model", "sketch", "label")
    return [Prompt(f"p{n}", _user(f"A {word}?"), dict(extra)) for n, word in enumerate(words)]


def _pool(**extra: Any) -> PreferencePool:
    return PreferencePool(
        PoolItem(p.id, p.prompt, (_assistant("yes"), _assistant(f"no {p.id}")), p.extra)
        for p in _prompts(**extra)
    )


def _model() -> Any:
    return lora(tiny_causal_lm("qwen"), "qwen")


def _selector(kwargs: dict[str, Any] | None = None, **options: Any) -> ActiveDPOSelector:
    return ActiveDPOSelector(
        _model(), _tokenizer(), proj_dim=32, verify=False, chat_template_kwargs=kwargs, **options
    )


def _trained_on(dataset: Dataset, folder: Path) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) token ids of each pair, as DPOTrainer makes them."""
    config = trl.DPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True
    )
    trainer = trl.DPOTrainer(
        model=_model(), args=config, train_dataset=dataset, processing_class=_tokenizer()
    )
    return [
        (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset
    ]


def _scored(tokens: TokenizedPool) -> list[tuple[list[int], list[int], list[int]]]:
    """The same of pairs (first response preferred), as the selector has them."""
    pairs = []
    for a, b in zip(tokens.sequences[::2], tokens.sequences[1::2], strict=True):
        assert a.completion_start == b.completion_start
        start = a.completion_start
        first, second = list(a.input_ids), list(b.input_ids)
        pairs.append((first[:start], first[start:], second[start:]))
    return pairs


@pytest.mark.parametrize(
    ("place", "kwargs"),
    [
        ("loop", _BRIEF),
        ("loop", _THINKING),
        ("selector_options", _BRIEF),
        ("both", _BRIEF),
        ("column", _BRIEF),
        ("tools", {"tools": [_TOOL]}),
    ],
)
def test_every_stage_of_the_loop_has_the_same_tokens(
    kwargs: dict[str, Any], place: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """The input of `generate`, the tokens whose features are computed, and the data of the
    trainer."""
    given: dict[str, Any] = {}
    if place in ("loop", "both"):
        given["chat_template_kwargs"] = kwargs
    columns = {"column": {"chat_template_kwargs": kwargs}, "tools": kwargs}
    prompts = _prompts(**columns.get(place, {}))
    options: dict[str, Any] = {"proj_dim": 32, "verify": False}
    if place in ("selector_options", "both"):
        options["chat_template_kwargs"] = dict(kwargs)
    seen: dict[str, Any] = {}  # the last call of each stage

    class Watched(generation.Sampler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            seen["generated"] = self.prompt_ids

    class Trainer(trl.DPOTrainer):  # type: ignore[misc, name-defined]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            seen["trained"] = [
                (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
                for row in self.train_dataset
            ]

    def gradients(tokenized: TokenizedPool, **options: Any) -> Any:
        seen["scored"] = _scored(tokenized)
        return real_gradients(tokenized, **options)

    monkeypatch.setattr(generation, "Sampler", Watched)
    monkeypatch.setattr(trl, "DPOTrainer", Trainer)
    loop = ActiveDPOLoop(
        _model(),
        _tokenizer(),
        prompts,
        CallableOracle(lambda *_: 0),
        output_dir=tmp_path,
        dpo_args=dpo_config(output_dir=str(tmp_path / "trainer"), max_steps=1),
        selector_options=options,
        max_completion_length=3,
        batch_size=4,
        rounds=1,
        prompts_per_round=4,
        num_generations=2,
        show_progress=False,
        **given,
    )
    real_gradients = loop.selector.extractor.gradients
    monkeypatch.setattr(loop.selector.extractor, "gradients", gradients)
    loop.run()

    picked, _ = read_labels(tmp_path / "round-000" / "labels.jsonl")
    tokenizer = _tokenizer()
    by_id = {p.id: p.prompt for p in prompts}
    assert [len(seen[stage]) for stage in ("generated", "scored", "trained")] == [4, 4, 4]
    assert sorted(seen["scored"]) == sorted(seen["trained"])
    for pick, (prompt_ids, chosen_ids, rejected_ids) in zip(picked, seen["trained"], strict=True):
        # The reference: the template rendered by transformers alone.
        expected = tokenizer.apply_chat_template(
            by_id[pick.id], add_generation_prompt=True, **kwargs
        )["input_ids"]
        assert expected in seen["generated"]
        for ids, response in zip((chosen_ids, rejected_ids), pick.responses, strict=True):
            whole = tokenizer.apply_chat_template([*pick.prompt, *response], **kwargs)["input_ids"]
            assert prompt_ids + ids == whole
        assert pick.chat_template_kwargs == kwargs
    # The arguments matter: without them every prompt is different.
    for prompt in prompts:
        without = tokenizer.apply_chat_template(prompt.prompt, add_generation_prompt=True)
        assert without["input_ids"] not in seen["generated"]


def test_a_selection_trains_on_what_was_scored(tmp_path: Path) -> None:
    """Also through a file. The arguments of a row override those of all rows."""
    pool = PreferencePool(
        [
            *_pool()[:2],
            PoolItem(
                "own",
                _user("Own?"),
                (_assistant("yes"), _assistant("no")),
                {"chat_template_kwargs": {"style": "long", "unused": [1, {"a": None}]}},
            ),
            PoolItem(
                "null",
                _user("Null?"),
                (_assistant("yes"), _assistant("no")),
                {"chat_template_kwargs": None},
            ),
        ]
    )
    selector = _selector(_BRIEF)
    picked = selector.select(pool, 4)
    picked.to_jsonl(tmp_path / "picked.jsonl")
    again = Selection.from_jsonl(tmp_path / "picked.jsonl", strategy=picked.strategy)
    assert again == picked
    for selection in (picked, again, Selection(again[:2].picks + again[2:].picks, "joined")):
        dataset = selection.to_dataset([0] * 4)
        trained = _trained_on(dataset, tmp_path)
        assert trained == _scored(
            tokenize_pool(
                pool.subset([pool.position(p.id) for p in picked]),
                _tokenizer(),
                chat_template_kwargs=_BRIEF,
            )
        )
        own = [row for row in dataset if row["id"] == "own"][0]
        assert own["chat_template_kwargs"] == {
            "enable_thinking": False,
            "style": "long",
            "unused": [1, {"a": None}],
        }


def test_different_arguments_and_messages_in_one_data_set(tmp_path: Path) -> None:
    """A table fills missing fields with null, which a template can tell from a missing field."""
    tokenizer = _tokenizer()
    tokenizer.chat_template = (
        "{% if style is defined %}[{{ style }}]{% endif %}{% if tone is defined %}({{ tone }})"
        "{% endif %}{% for m in messages %}{{ m.role }}{% if m.name is defined %}<{{ m.name }}>"
        "{% endif %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    )
    pool = PreferencePool(
        [
            PoolItem(
                "a",
                _user("A?", name="ann"),
                (_assistant("yes"), _assistant("no", name="bo")),
                {"chat_template_kwargs": {"style": "brief"}},
            ),
            PoolItem(
                "b",
                _user("B?"),
                (_assistant("yes"), _assistant("no")),
                {"chat_template_kwargs": {"tone": "dry"}},
            ),
            PoolItem("c", _user("C?"), (_assistant("yes"), _assistant("no"))),
        ]
    )
    selector = ActiveDPOSelector(_model(), tokenizer, proj_dim=32, verify=False)
    dataset = selector.select(pool, 3).to_dataset([0, 0, 0])
    assert dataset.column_names == ["id", "prompt", "chosen", "rejected", "chat_template_kwargs"]
    config = trl.DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True
    )
    trainer = trl.DPOTrainer(
        model=_model(), args=config, train_dataset=dataset, processing_class=tokenizer
    )
    trained = {
        row["id"]: (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
        for row in trainer.train_dataset
    }
    assert trained == dict(zip(pool.ids, _scored(selector.tokenize(pool)), strict=True))


def test_without_arguments_files_and_data_sets_are_as_before(tmp_path: Path) -> None:
    picked = _selector().select(_pool(), 2)
    picked.to_jsonl(tmp_path / "picked.jsonl")
    line = json.loads((tmp_path / "picked.jsonl").read_text().splitlines()[0])
    assert list(line) == ["id", "pair", "score", "rank", "prompt", "responses"]
    assert picked.to_dataset([0, 1]).column_names == ["id", "prompt", "chosen", "rejected"]
    assert picked[0].chat_template_kwargs is None
    plain = PreferencePool([PoolItem("a", "A?", ("yes", "no"), {"chat_template_kwargs": "mine"})])
    selector = ActiveDPOSelector(
        _model(), tiny_tokenizer(), proj_dim=32, verify=False, chat_template_kwargs=_THINKING
    )
    dataset = selector.select(plain, 1).to_dataset([0])  # TRL renders no template for plain text
    assert dataset.column_names == ["id", "prompt", "chosen", "rejected"]


def test_arguments_have_no_effect_on_plain_text(caplog: Any) -> None:
    pool = PreferencePool([PoolItem("a", "A?", ("yes", "no"))])
    with caplog.at_level(logging.WARNING, "activedpo_fast"):
        tokens = tokenize_pool(pool, tiny_tokenizer(), chat_template_kwargs=_THINKING)
    assert "chat_template_kwargs have no effect" in caplog.text
    assert tokens == tokenize_pool(pool, tiny_tokenizer())


@pytest.mark.parametrize("inside", [True, False])
def test_history_is_taken_with_the_present_arguments(inside: bool, caplog: Any) -> None:
    """Labels of rounds with other arguments: the picks that brute force makes, and one line."""
    old = _selector(_BRIEF).select(_pool(), 2)
    pool = (
        _pool()
        if inside
        else PreferencePool(
            PoolItem(f"n{n}", _user(f"What {n}?"), (_assistant("a"), _assistant(f"b {n}")))
            for n in range(4)
        )
    )
    with caplog.at_level(logging.WARNING, "activedpo_fast"):
        picked = _selector(_THINKING).select(pool, 2, labeled=old)
    assert "2 of 2 labeled pairs were picked with other chat_template_kwargs" in caplog.text
    made_now = Selection(
        tuple(
            Pick(p.id, p.pair, p.score, p.rank, p.prompt, p.responses, dict(_THINKING)) for p in old
        ),
        old.strategy,
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING, "activedpo_fast"):
        expected = _selector(_THINKING).select(pool, 2, labeled=made_now)
    assert "other chat_template_kwargs" not in caplog.text
    assert picked == expected


def test_history_keeps_the_arguments_of_its_own_rows(caplog: Any) -> None:
    old = _selector(_THINKING).select(_pool(chat_template_kwargs={"style": "long"}), 1)
    tokens = tokenize_pool(old.as_pool(), _tokenizer())  # another setting: none
    expected = _tokenizer().apply_chat_template(
        [*old[0].prompt, *old[0].responses[0]], style="long"
    )["input_ids"]
    assert list(tokens.sequences[0].input_ids) == expected


def test_label_files_keep_the_arguments_and_their_file_name(tmp_path: Path) -> None:
    picked = _selector(_THINKING).select(_pool(), 2)
    without = Selection(
        tuple(Pick(p.id, p.pair, p.score, p.rank, p.prompt, p.responses) for p in picked),
        picked.strategy,
    )
    oracle = FileOracle(tmp_path)
    assert oracle.paths(picked) == oracle.paths(without)
    with pytest.raises(LabelsPending):
        oracle.label(picked)
    path = oracle.paths(picked)[0]
    path.write_text(path.read_text().replace('"label": null', '"label": 0'))
    read, labels = read_labels(path)
    assert read.picks == picked.picks and labels == [0, 0]
    assert oracle.label(picked) == [0, 0]


def test_responses_for_evaluation_use_the_arguments_too(monkeypatch: Any) -> None:
    seen: list[Any] = []

    class Watched(generation.Sampler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            seen.append(self.prompt_ids)

    monkeypatch.setattr(generation, "Sampler", Watched)
    model, prompts = _model(), _prompts(chat_template_kwargs=_BRIEF)
    options: dict[str, Any] = dict(max_completion_length=1, show_progress=False)
    respond(model, _tokenizer(), prompts, **options)
    respond(model, _tokenizer(), _prompts(), chat_template_kwargs=_BRIEF, **options)
    respond(model, _tokenizer(), _prompts(), **options)
    assert seen[0] == seen[1] != seen[2]


def test_a_reward_model_has_its_own_arguments() -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=1,
            pad_token_id=1,
        )
    ).eval()
    picked = _selector(_BRIEF).select(_pool(), 4)
    prompts, responses = [p.prompt for p in picked], [p.responses[0] for p in picked]
    reward = RewardModel(
        model, _tokenizer(), chat_template_kwargs={"style": "strict"}, show_progress=False
    )
    for pick, score in zip(picked, reward(prompts, responses, [{}] * 4), strict=True):
        ids = _tokenizer().apply_chat_template(
            [*pick.prompt, *pick.responses[0]], style="strict", return_tensors="pt"
        )["input_ids"]
        with torch.no_grad():
            assert score == pytest.approx(float(model(ids).logits), rel=1e-4)
    with pytest.raises(ActiveDPOError, match="no chat template"):
        RewardModel(model, tiny_tokenizer(), chat_template_kwargs=_THINKING)


# -- where it is given -----------------------------------------------------------------------------


def _yaml(**sections: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "prompts": "p.jsonl",
        "output_dir": "o",
        "adapter": "a",
        "oracle": {"kind": "people", "via": "files"},
        **sections,
    }


def test_a_configuration_has_one_setting() -> None:
    inside = {"chat_template_kwargs": dict(_THINKING)}
    for sections in (inside, {"selection": inside}, {"selection": inside, **inside}):
        config = make_config(_yaml(**sections))
        assert config.chat_template_kwargs == _THINKING
        assert "chat_template_kwargs" not in config.selection
    assert make_config(_yaml()).chat_template_kwargs is None
    for sections, message in (
        (
            {"selection": inside, "chat_template_kwargs": {}},
            "selection.chat_template_kwargs and chat_template_kwargs differ",
        ),
        (
            {"selection": inside, "chat_template_kwargs": {"enable_thinking": True}},
            "selection.chat_template_kwargs and chat_template_kwargs differ",
        ),
        ({"loop": inside}, "loop.chat_template_kwargs: comes from the run's chat_template_kwargs"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs: expected a section"),
        (yaml.safe_load("chat_template_kwargs: {day: 2024-01-01}"), "'day' is no JSON value"),
    ):
        with pytest.raises(ActiveDPOError, match=message) as caught:
            make_config(_yaml(**sections))
        assert "\n" not in str(caught.value)


def _small_loop(folder: Path, **options: Any) -> ActiveDPOLoop:
    return ActiveDPOLoop(
        _model(),
        _tokenizer(),
        options.pop("prompts", _prompts()),
        CallableOracle(lambda *_: 0),
        output_dir=folder,
        batch_size=2,
        rounds=1,
        prompts_per_round=2,
        num_generations=2,
        dpo_args=dpo_config(output_dir=str(folder), max_steps=1),
        show_progress=False,
        **{"selector_options": {"proj_dim": 32}, "max_completion_length": 3, **options},
    )


def test_a_loop_has_one_setting(tmp_path: Path) -> None:
    with pytest.raises(
        ActiveDPOError,
        match="selector_options.chat_template_kwargs and chat_template_kwargs differ",
    ):
        _small_loop(
            tmp_path,
            selector_options={"chat_template_kwargs": _THINKING},
            chat_template_kwargs=_BRIEF,
        )
    assert list(tmp_path.iterdir()) == []
    # The same setting in another place continues the run. Another setting does not.
    _small_loop(tmp_path, chat_template_kwargs=_THINKING).run()
    _small_loop(
        tmp_path, selector_options={"proj_dim": 32, "chat_template_kwargs": _THINKING}
    ).run()
    for options in ({}, {"chat_template_kwargs": _BRIEF}):
        with pytest.raises(ActiveDPOError, match="other settings: chat_template_kwargs"):
            _small_loop(tmp_path, **options).run()


def test_a_prompts_own_arguments_are_settings(tmp_path: Path) -> None:
    _small_loop(tmp_path).run()
    prompts = [replace(prompt, extra={**prompt.extra, "topic": 1}) for prompt in _prompts()]
    _small_loop(tmp_path, prompts=prompts).run()
    prompts[0] = replace(prompts[0], extra={"chat_template_kwargs": _BRIEF})
    with pytest.raises(ActiveDPOError, match="other settings: prompts"):
        _small_loop(tmp_path, prompts=prompts).run()


def test_runs_of_earlier_versions(tmp_path: Path) -> None:
    """A run without arguments continues. A run that was trained without them is refused."""
    _small_loop(tmp_path).run()
    config = read_checked_json(tmp_path / "config.json")
    del config["settings"]["chat_template_kwargs"], config["format"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    _small_loop(tmp_path).run()
    config["settings"]["selector_options"]["chat_template_kwargs"] = _THINKING
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ActiveDPOError, match="other settings: .*chat_template_kwargs"):
        _small_loop(tmp_path, chat_template_kwargs=_THINKING).run()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tokenize": False}, "'tokenize' is set by the library"),
        ({"return_tensors": "pt"}, "'return_tensors' is set by the library"),
        ({"day": object()}, "'day' is no JSON value"),
        (["enable_thinking"], "expected an object"),
    ],
)
def test_bad_arguments_are_refused_by_every_stage(kwargs: Any, message: str) -> None:
    calls = [
        lambda: _selector(kwargs),
        lambda: tokenize_pool(_pool(), _tokenizer(), chat_template_kwargs=kwargs),
        lambda: generate_responses(_model(), _tokenizer(), _prompts(), chat_template_kwargs=kwargs),
        lambda: respond(_model(), _tokenizer(), _prompts(), chat_template_kwargs=kwargs),
        lambda: _pool(chat_template_kwargs=kwargs),
    ]
    for call in calls:
        with pytest.raises(ActiveDPOError, match=message):
            call()


# -- the command line ------------------------------------------------------------------------------


def test_a_store_is_made_with_the_arguments_and_picks_keep_them(
    tmp_path: Path, capsys: Any
) -> None:
    base = tiny_causal_lm("qwen")
    base.save_pretrained(tmp_path / "model")
    _tokenizer().save_pretrained(tmp_path / "model")
    lora(base, "qwen").save_pretrained(tmp_path / "adapter")
    pool = PreferencePool([*_pool()[:3], *_pool(chat_template_kwargs={"style": "long"})[3:]])
    pool.to_jsonl(tmp_path / "pool.jsonl")
    argv = [
        "features",
        str(tmp_path / "pool.jsonl"),
        "--model",
        str(tmp_path / "model"),
        "--adapter",
        str(tmp_path / "adapter"),
        "--threads",
        "1",
        "--quiet",
        "--output",
    ]
    with_kwargs = ["--chat-template-kwargs", json.dumps(_BRIEF)]
    assert main([*argv, str(tmp_path / "store"), "--proj-dim", "32", *with_kwargs]) == 0
    store = FeatureStore.open(tmp_path / "store")
    assert store.manifest["settings"]["chat_template_kwargs"] == _BRIEF
    selector = _selector(_BRIEF)
    tokens = selector.tokenize(pool)
    expected = selector.extractor.logps(tokens)
    assert store.load().logps.tolist() == pytest.approx(expected.tolist(), rel=1e-4)

    picked_path = tmp_path / "picked.jsonl"
    assert (
        main(
            [
                "select",
                str(tmp_path / "store"),
                "--pairs",
                "4",
                "--quiet",
                "--output",
                str(picked_path),
            ]
        )
        == 0
    )
    picked = Selection.from_jsonl(picked_path)
    assert {p.id: p.chat_template_kwargs for p in picked} == {
        "p0": _BRIEF,
        "p1": _BRIEF,
        "p2": _BRIEF,
        "p3": {**_BRIEF, "style": "long"},
    }
    assert _trained_on(picked.to_dataset([0] * 4), tmp_path) == [
        _scored(tokens)[pool.position(p.id)] if p.pair == (0, 1) else None for p in picked
    ]

    # Other arguments, in the option or in a row, give other features.
    capsys.readouterr()
    assert main([*argv, str(tmp_path / "store"), "--proj-dim", "32"]) == 2
    assert "chat_template_kwargs" in capsys.readouterr().err
    _pool().to_jsonl(tmp_path / "pool.jsonl")
    assert main([*argv, str(tmp_path / "store"), "--proj-dim", "32", *with_kwargs]) == 2
    assert "another pool" in capsys.readouterr().err
    for text, message in (
        ("{", "not JSON"),
        ("[1]", "expected an object"),
        ('{"padding": true}', "'padding' is set by the library"),
    ):
        assert main([*argv, str(tmp_path / "new"), "--chat-template-kwargs", text]) == 2
        error = capsys.readouterr().err
        assert "--chat-template-kwargs: " in error and message in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "new").exists()
