"""The YAML file of `activedpo run`: refusals, presets and defaults."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from activedpo_fast.cli import run_file
from activedpo_fast.cli.run_file import SETTINGS, load_config, make_config
from activedpo_fast.errors import ActiveDPOError


def _given(**changes: Any) -> dict[str, Any]:
    given = {
        "model": "m",
        "prompts": "p.jsonl",
        "output_dir": "o",
        "oracle": {"kind": "people", "via": "files"},
        "adapter": "a",
        **changes,
    }
    return {key: value for key, value in given.items() if value is not ...}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "m"}, "modle: unknown key; did you mean 'model'?"),
        ({"loop": {"batch_sise": 5}}, "loop.batch_sise: unknown key; did you mean 'batch_size'?"),
        (
            {"dpo": {"learning_rat": 1e-4}},
            "dpo.learning_rat: unknown key; did you mean 'learning_rate",
        ),
        ({"loop": {"max_tokens": 5}}, "loop.max_tokens: unknown key"),
        ({"selection": {"beta": 0.1}}, "selection.beta: comes from dpo.beta; leave it out of sel"),
        ({"loop": {"strategy": "apo"}}, "loop.strategy: comes from the run's strategy; leave it"),
        ({"dpo": {"output_dir": "x"}}, "dpo.output_dir: comes from the run's output_dir; leave it"),
        ({"dpo": {"seed": 1}}, "dpo.seed: comes from the run's seed"),
        ({"adapter": ..., "lora": {"task_type": "X"}}, "lora.task_type: comes from this library"),
        ({"dpo": {"zzz": 1}}, "dpo.zzz: unknown key; its keys are the arguments of trl.DPOConfig"),
        ({"adapter": ..., "lora": {"rank": 4}}, "lora.rank: unknown key"),
        ({"oracle": {"kind": "people", "temperature": 1.0}}, "oracle.temperature: unknown key"),
        ({"loop": {"rounds": "five"}}, "loop.rounds: expected an integer, got 'five'"),
        ({"loop": {"rounds": True}}, "loop.rounds: expected an integer, got True"),
        ({"loop": {"rounds": 2.5}}, "loop.rounds: expected an integer, got 2.5"),
        ({"loop": {"rounds": None}}, "loop.rounds: expected an integer, got None"),
        ({"loop": {"train_on": "some"}}, "loop.train_on: expected 'all' or 'newest', got 'some'"),
        ({"loop": {"num_generations": 1}}, "loop.num_generations: 1 is below 2"),
        ({"selection": {"lam": -1}}, "selection.lam: -1 is not positive and finite"),
        ({"strategy": "best"}, "strategy: expected 'activedpo' or 'random' or"),
        ({"loop": [1]}, "loop: expected a section of keys, got [1]"),
        ({"dpo": {"beta": "small"}}, "dpo.beta: expected a number, got 'small'"),
        ({"seed": "x"}, "seed: expected an integer, got 'x'"),
        ({"loop": {"temperature": "hot"}}, "loop.temperature: expected a number"),
        (
            {"rules": {"max_per_promt": 1}},
            "rules.max_per_promt: unknown key; did you mean 'max_per_p",
        ),
        ({"rules": {"seed": 1}}, "rules.seed: comes from the run's seed"),
        ({"rules": {"max_per_prompt": "two"}}, "rules.max_per_prompt: expected an integer or null"),
        (
            {"rules": {"max_per_prompt": 0}},
            "rules: max_per_prompt must be an integer from 1, not 0",
        ),
        ({"rules": {"exclude": "p1"}}, "rules: exclude must be a list of ids, not 'p1'"),
        ({"rules": {"quotas": {"law": 1}}}, "rules: group_by missing"),
        ({"rules": {"group_by": "topic", "quotas": ["law"]}}, "rules: quotas must map groups"),
        (
            {"rules": {"random_fraction": 1.5}},
            "rules: random_fraction must be a number from 0 to 1",
        ),
        ({"rules": [1]}, "rules: expected a section of keys, got [1]"),
        ({"loop": {"rules": {}}}, "loop.rules: unknown key"),
        ({"model": ...}, "model: missing"),
        ({"prompts": None}, "prompts: missing"),
        (
            {"oracle": {"kind": "dice"}},
            "oracle.kind: expected one of people, reward_model, judge, recorded, got 'dice'",
        ),
        (
            {"oracle": {"kind": "people", "via": "phone"}},
            "oracle.via: expected 'page' or 'files' or 'label_studio', got 'phone'",
        ),
        ({"oracle": {"kind": "people", "base_url": "http://h"}}, "oracle.base_url: unknown key"),
        (
            {"oracle": {"kind": "people", "via": "label_studio", "api_key_env": "T"}},
            "oracle.base_url: missing",
        ),
        (
            {"oracle": {"kind": "people", "via": "label_studio", "base_url": "http://h"}},
            "oracle.api_key_env: missing",
        ),
        ({"oracle": {}}, "oracle.kind"),
        ({"strategy": "reward_gap"}, "reward: missing; the strategy reward_gap picks sampled"),
        ({"reward": {"model": "r"}}, "reward: only the strategy reward_gap uses one"),
        ({"strategy": "reward_gap", "reward": {}}, "reward.model: missing"),
        (
            {"strategy": "reward_gap", "reward": {"model": "r", "temperature": 1.0}},
            "reward.temperature: unknown key",
        ),
        ({"oracle": {"kind": []}}, "oracle.kind: expected one of"),
        ({"oracle": {"kind": "reward_model"}}, "oracle.model: missing"),
        ({"oracle": {"kind": "judge", "base_url": "http://h"}}, "oracle.model: missing"),
        ({"oracle": {"kind": "judge", "model": "m"}}, "oracle.base_url: missing"),
        (
            {"oracle": {"kind": "judge", "model": "m", "base_url": "http://h", "api_key": "sk"}},
            "oracle.api_key: unknown key; did you mean 'api_key_env'?",
        ),
        (
            {"oracle": {"kind": "judge", "model": "m", "base_url": "http://h", "journal": "x"}},
            "oracle.journal: unknown key",
        ),
        (
            {"oracle": {"kind": "judge", "model": "m", "base_url": "http://h", "retries": "no"}},
            "oracle.retries: expected an integer, got 'no'",
        ),
        (
            {"oracle": {"kind": "recorded"}, "loop": {"responses": "sampled"}},
            "loop.responses: recorded preferences are of the responses",
        ),
        (
            {"oracle": {"kind": "recorded"}, "loop": {"num_generations": 2}},
            "loop.num_generations: no response is sampled: remove it",
        ),
        (
            {"loop": {"responses": "given", "temperature": 0.5}},
            "loop.temperature: no response is sampled: remove it",
        ),
        ({"oracle": {"kind": "recorded", "path": "x"}}, "oracle.path: unknown key"),
        ({"generation": {"model": "m"}}, "generation.base_url: missing, the address of the server"),
        (
            {"generation": {"base_url": "http://h"}},
            "generation.model: missing, the name of the base",
        ),
        ({"generation": {"server": "http://h"}}, "generation.server: unknown key"),
        (
            {"generation": {"model": "m", "base_url": "http://h", "load_adapter": "yes"}},
            "generation.load_adapter: expected true or false",
        ),
        (
            {"generation": {"model": "m", "base_url": "http://h"}, "oracle": {"kind": "recorded"}},
            "generation: no response is sampled: remove it",
        ),
        ({"evaluate": {}}, "evaluate.prompts: missing, the file of held-out prompts; or give pref"),
        ({"evaluate": {"promts": "h"}}, "evaluate.promts: unknown key; did you mean 'prompts'?"),
        ({"evaluate": {"prompts": "h"}}, "evaluate.oracle: missing, what scores the responses"),
        (
            {"evaluate": {"prompts": "h", "oracle": {"kind": "people"}}},
            "evaluate.oracle.kind: expected one of reward_model, judge, got 'people'",
        ),
        (
            {"evaluate": {"prompts": "h", "oracle": {"kind": "judge", "model": "m"}}},
            "evaluate.oracle.base_url: missing",
        ),
        (
            {"evaluate": {"preferences": "h", "samples": 2}},
            "evaluate.samples: no response is sampled without prompts",
        ),
        (
            {
                "evaluate": {
                    "prompts": "h",
                    "oracle": {"kind": "reward_model", "model": "r"},
                    "samples": 0,
                }
            },
            "evaluate.samples: 0 is below 1",
        ),
        (
            {"evaluate": {"preferences": "h", "temperature": -1.0}},
            "evaluate.temperature: -1.0 is not a finite number from 0",
        ),
        ({"preset": "papr"}, "unknown preset 'papr'"),
        ({"lora": {"r": 4}}, "adapter, lora: give one of them"),
        ({"adapter": ...}, "adapter: missing"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ActiveDPOError) as caught:
        make_config(_given(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_keys_that_come_from_elsewhere_are_fields_of_the_classes() -> None:
    """And no key of the section; a field that is renamed is noticed here."""
    from peft import LoraConfig

    from activedpo_fast import PickRules
    from activedpo_fast.training.trl import dpo_config

    classes = {**SETTINGS, "rules": PickRules, "dpo": type(dpo_config()), "lora": LoraConfig}
    assert classes.keys() == run_file._ELSEWHERE.keys()
    for section, elsewhere in run_file._ELSEWHERE.items():
        assert elsewhere.keys() <= {field.name for field in fields(classes[section])}
        assert not elsewhere.keys() & run_file._sections()[section].keys()


def test_a_preset_fills_settings_that_are_not_given() -> None:
    config = make_config(
        _given(
            preset="paper",
            adapter=...,
            lora={"r": 8},
            loop={"batch_size": 5, "rounds": 2},
            dpo={"learning_rate": 1e-5},
        )
    )
    assert config.lora == {
        "r": 8,
        "lora_alpha": 512,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    }
    assert config.loop == {
        "batch_size": 5,
        "rounds": 2,
        "prompts_per_round": 1000,
        "num_generations": 3,
    }
    assert config.dpo == {"learning_rate": 1e-5, "num_train_epochs": 4}
    assert config.strategy == "activedpo"
    assert config.selection == {"proj_dim": 8192, "normalize": "response"}
    other = make_config(_given(preset="paper", strategy="adpo_plus"))
    # The preset's normalization is for its own strategy.
    assert (other.strategy, other.selection) == ("adpo_plus", {"proj_dim": 8192})
    recorded = make_config(_given(preset="paper", oracle={"kind": "recorded"}))
    assert recorded.loop["responses"] == "given"  # whatever the preset says of sampling
    assert make_config(_given(preset="paper")).lora is None  # the adapter is there already


def test_without_a_preset_the_defaults_of_the_library_apply() -> None:
    config = make_config(_given())
    assert (config.selection, config.loop, config.dpo) == ({}, {}, {})
    assert config.rules == {}
    assert config.strategy is None


def test_held_out_responses_are_scored_by_the_run_s_oracle_if_it_can() -> None:
    oracle = {"kind": "reward_model", "model": "r"}
    config = make_config(_given(oracle=oracle, evaluate={"prompts": "h"}))
    assert config.evaluate == {"prompts": "h", "oracle": oracle}
    assert make_config(_given(evaluate={"preferences": "h"})).evaluate == {"preferences": "h"}


@pytest.mark.parametrize("name", ["evaluate", "generation"])
def test_commented_sections_of_the_example_are_valid(name: str) -> None:
    text = (EXAMPLES / "run.yaml").read_text()
    section = re.search(f"^# {name}:.*?\n\n", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    given = yaml.safe_load(re.sub("^# ", "", section[0], flags=re.MULTILINE))
    assert getattr(make_config(_given(**given)), name) == given[name]


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    head = "model: m\nprompts: p.jsonl\noutput_dir: o\nadapter: a\noracle: {kind: people}\n"
    # YAML 1.1 reads 1e-4 as text.
    path.write_text(head + "dpo: {learning_rate: 1e-4}\n")
    assert load_config(path).dpo == {"learning_rate": 1e-4}

    path.write_text(head + "rules: {exclude: [1, p2], group_by: topic, quotas: {law: 2, 3: 0}}\n")
    assert load_config(path).rules == {
        "exclude": [1, "p2"],
        "group_by": "topic",
        "quotas": {"law": 2, 3: 0},
    }

    for text, expected in (
        (head + "loop: {rounds: 2\n", "line"),
        (head + "loop: !!python/name:os.system x\n", "broken YAML"),
        ("- model\n", "expected a mapping"),
        ("", "expected a mapping"),
        (head + "loops: {}\n", "loops: unknown key; did you mean 'loop'?"),
    ):
        path.write_text(text)
        with pytest.raises(ActiveDPOError, match="run.yaml") as caught:
            load_config(path)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ActiveDPOError, match="no such file"):
        load_config(tmp_path / "none.yaml")


EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_commented_example_is_valid() -> None:
    config = load_config(EXAMPLES / "run.yaml")
    assert config.loop["batch_size"] == 50
    assert config.dpo["learning_rate"] == 1e-4


def test_the_example_of_recorded_preferences_is_valid() -> None:
    assert load_config(EXAMPLES / "recorded.yaml").loop["responses"] == "given"


def test_each_source_of_labels_in_the_example_is_valid() -> None:
    text = (EXAMPLES / "run.yaml").read_text()
    text = re.sub("^# ?", "", text[text.index("\noracle:") :], flags=re.MULTILINE)
    kinds = []
    for section in text.split("\noracle:")[1:]:
        oracle = yaml.safe_load(section)
        kinds.append(oracle["kind"])
        loop = {} if oracle["kind"] == "recorded" else {"num_generations": 2}
        make_config(_given(oracle=oracle, loop=loop))
    assert kinds == ["people", "reward_model", "recorded", "judge"]
