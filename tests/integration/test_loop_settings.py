"""A run continues with the settings it began with: another model, adapter or tokenizer is refused
by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from activedpo_fast._files import read_checked_json, temporary_name, write_checked_json
from activedpo_fast.cli.app import main
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels import CallableOracle, FileOracle, LabelsPending
from activedpo_fast.models.adapters import adapter_state
from activedpo_fast.models.fingerprints import policy_settings
from activedpo_fast.models.loading import load_policy
from activedpo_fast.pool.items import Prompt
from activedpo_fast.selection.ranking import Ranking
from activedpo_fast.selection.strategies import Strategy
from activedpo_fast.training.loop import ActiveDPOLoop
from activedpo_fast.training.trl import dpo_config
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer
from tests.support.rehearsals import rehearsed_once  # noqa: F401

WORDS = "library prompt model sketch label pair".split()
TEXTS = [Prompt(f"p{n}", f"The {word}") for n, word in enumerate(WORDS)]
CHATS = [Prompt(p.id, [{"role": "user", "content": str(p.prompt)}]) for p in TEXTS]


def _policy(
    base: dict[str, Any] | None = None, randomize: bool = True, seed: int = 1, **config: Any
) -> PeftModel:
    return lora(
        tiny_causal_lm("llama", **(base or {})), "llama", seed=seed, randomize=randomize, **config
    )


def _loop(
    folder: Path, model: PeftModel, tokenizer: Any = None, oracle: Any = None, **options: Any
) -> ActiveDPOLoop:
    settings: dict[str, Any] = dict(
        output_dir=folder,
        dpo_args=dpo_config(
            output_dir=str(folder / "trainer"),
            learning_rate=1e-2,
            max_steps=1,
            per_device_train_batch_size=2,
        ),
        selector_options={"proj_dim": 32, "verify": False},
        batch_size=2,
        rounds=1,
        prompts_per_round=3,
        num_generations=2,
        max_completion_length=4,
        show_progress=False,
    )
    tokenizer = tokenizer or tiny_tokenizer()
    prompts = CHATS if tokenizer.chat_template else TEXTS
    oracle = oracle or CallableOracle(lambda prompt, a, b: 0)
    return ActiveDPOLoop(model, tokenizer, prompts, oracle, **{**settings, **options})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one round. Continuing it with two rounds reads the first."""
    folder = tmp_path_factory.mktemp("run")
    _loop(folder, _policy()).run()
    return folder


def _changed_weight(model: PeftModel) -> PeftModel:
    """Change one number of one base weight."""
    weight = model.get_base_model().model.layers[1].mlp.down_proj.base_layer.weight
    with torch.no_grad():
        weight[17, 3] += 1e-3
    return model


def _other_eos(model: PeftModel) -> PeftModel:
    model.get_base_model().generation_config.eos_token_id = [0, 5]
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _policy(lora_alpha=800), r"lora\.lora_alpha \(8, now 800\)"),
        (lambda: _policy(target_modules=["q_proj"]), r"lora\.target_modules"),
        (lambda: _policy({"seed": 7}), r"base\.weights"),
        (lambda: _changed_weight(_policy()), r"base\.weights"),
        (lambda: _policy({"dtype": torch.bfloat16}), r"base\.dtype \('float32', now 'bfloat16'\)"),
        (
            lambda: _policy({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
            r"base\.config\.rope_parameters\.rope_theta \(10000\.0, now 500000\.0\)",
        ),
        (
            lambda: _other_eos(_policy()),
            r"base\.generation_config\.eos_token_id \(0, now \[0, 5\]\)",
        ),
        (lambda: _policy(seed=2), r"the adapter differs from .*start/adapter"),
        (lambda: _policy(randomize=False), r"the adapter differs from .*start/adapter"),
    ],
)
def test_another_policy_is_refused(run: Path, make: Callable[[], PeftModel], message: str) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ActiveDPOError, match=f"holds a run with other settings: {message}"):
        _loop(run, make(), rounds=2).run()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_another_tokenizer_is_refused(run: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|im_end|>"
    with pytest.raises(
        ActiveDPOError,
        match=r"tokenizer\.special_tokens\.eos_token \('<\|endoft"
        r"ext\|>', now '<\|im_end\|>'\)",
    ):
        _loop(run, _policy(), tokenizer, rounds=2).run()
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["label"])
    with pytest.raises(ActiveDPOError, match=r"tokenizer\.vocabulary"):
        _loop(run, _policy(), tokenizer, rounds=2).run()

    _loop(tmp_path, _policy(), tiny_tokenizer(chat=True)).run()
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "model")
    with pytest.raises(ActiveDPOError, match=r"tokenizer\.chat_template"):
        _loop(tmp_path, _policy(), tokenizer, rounds=2).run()


def test_the_same_policy_continues_whatever_was_done_with_it(tmp_path: Path) -> None:
    """A notebook calls `run` again with its model and tokenizer, and then a new process does."""
    oracle = FileOracle(tmp_path / "people")
    model, tokenizer = _policy(), tiny_tokenizer()
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    loop = _loop(tmp_path / "run", model, tokenizer, oracle, rounds=2)
    for turn in range(2):
        with pytest.raises(LabelsPending):
            loop.run()
        if turn:
            with pytest.raises(LabelsPending):  # the model has the weights of round 0 now
                _loop(tmp_path / "run", model, tokenizer, oracle, rounds=2).run()
        for path in (tmp_path / "people").glob("*.jsonl"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            path.write_text("".join(json.dumps({**row, "label": 1}) + "\n" for row in rows))
    assert [record.labels_total for record in loop.run()] == [0, 2, 4]
    with pytest.raises(LabelsPending):
        _loop(tmp_path / "run", _policy(), oracle=oracle, rounds=3).run()


def test_training_that_breaks_off_leaves_the_weights_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import activedpo_fast.training.loop as module

    model = _policy()
    before = adapter_state(model)

    def breaking(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        raise KeyboardInterrupt

    real = module.train_dpo
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_dpo", breaking)
        with pytest.raises(KeyboardInterrupt):
            _loop(tmp_path, model).run()
    assert all(torch.equal(before[name], now) for name, now in adapter_state(model).items())
    assert len(_loop(tmp_path, model).run()) == 2


def test_a_fresh_adapter_is_replaced_by_the_one_on_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Fresh adapters of two processes differ only in A, and the one of the first process is
    used."""
    caplog.set_level("INFO", logger="activedpo_fast")
    torch.manual_seed(1)
    first = _policy(randomize=False)
    _loop(tmp_path, first).run()
    start = load_file(tmp_path / "start" / "adapter" / "adapter_model.safetensors")
    torch.manual_seed(2)
    second = lora(tiny_causal_lm("llama"), "llama", randomize=False)
    with torch.no_grad():
        for name, parameter in second.named_parameters():
            if "lora_A" in name:
                parameter.normal_()
    assert any(not torch.equal(start[name], now) for name, now in adapter_state(second).items())
    loop = _loop(tmp_path, second, rounds=2)
    loop.run()
    assert "going on from the fresh adapter in" in caplog.text
    assert all(torch.equal(start[name], now) for name, now in loop._initial.items())


def test_remains_of_a_run_are_not_taken_for_a_run(tmp_path: Path) -> None:
    _loop(tmp_path, _policy()).run()
    (tmp_path / "start").rename(tmp_path / "away")
    with pytest.raises(ActiveDPOError, match="start/adapter is gone"):
        _loop(tmp_path, _policy()).run()
    assert not (tmp_path / "start").exists()
    (tmp_path / "away").rename(tmp_path / "start")
    weights = tmp_path / "start" / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    with pytest.raises(ActiveDPOError, match=f"{weights} is gone"):
        _loop(tmp_path, _policy()).run()
    weights.write_bytes(content[:100])
    with pytest.raises(ActiveDPOError, match=f"{weights} has changed since the run wrote it"):
        _loop(tmp_path, _policy()).run()
    weights.write_bytes(content)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ActiveDPOError, match="config.json is gone, which has the settings"):
        _loop(tmp_path, _policy()).run()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ActiveDPOError, match="has no settings of a run"):
        _loop(tmp_path, _policy()).run()
    model = lora(tiny_causal_lm("llama"), "llama", adapter_name="mine")
    with pytest.raises(ActiveDPOError, match="no adapter called 'default'.* it has mine"):
        _loop(tmp_path / "other", model).run()
    assert not (tmp_path / "other").exists()


def test_a_model_that_was_moved_continues(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="activedpo_fast")
    for rounds, name in ((1, "here"), (2, "there")):
        model = _policy()
        model.get_base_model().config._name_or_path = name
        _loop(tmp_path, model, rounds=rounds).run()
    assert "model ('here', now 'there')" in caplog.text
    path = tmp_path / "config.json"
    config = read_checked_json(path)
    config["settings"] = {
        name: value
        for name, value in config["settings"].items()
        if name not in ("base", "lora", "tokenizer")
    }
    path.write_text(json.dumps({**config, "format": 1}))  # only the path is known
    with pytest.raises(ActiveDPOError, match="model \\('there', now ''\\) differs"):
        _loop(tmp_path, _policy()).run()


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    _loop(tmp_path, _policy()).run()
    (tmp_path / "round-001" / temporary_name(Path("adapter"))).mkdir(parents=True)
    _loop(tmp_path, _policy(), rounds=2).run()
    assert not list(tmp_path.glob("*/.adapter-*"))


def test_extra_settings_are_settings(tmp_path: Path) -> None:
    _loop(tmp_path, _policy(), extra_settings={"judge": {"name": "a"}}).run()
    with pytest.raises(ActiveDPOError, match=r"extra_settings\.judge\.name \('a', now 'b'\)"):
        _loop(tmp_path, _policy(), extra_settings={"judge": {"name": "b"}}).run()


def test_a_run_of_an_older_version_continues_and_that_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _loop(tmp_path, _policy()).run()
    config = read_checked_json(tmp_path / "config.json")
    del config["format"]
    for name in ("lora", "base", "tokenizer", "extra_settings"):
        del config["settings"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    _loop(tmp_path, _policy(), rounds=2).run()
    assert "an older version began" in caplog.text and "lora, base, tokenizer" in caplog.text
    with pytest.raises(ActiveDPOError, match="batch_size"):
        _loop(tmp_path, _policy(), batch_size=1).run()
    with pytest.raises(ActiveDPOError, match="the adapter differs"):
        _loop(tmp_path, _policy(seed=2)).run()


def test_other_versions_of_libraries_are_logged_and_fields_only_they_have_do_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _loop(tmp_path, _policy()).run()
    config = read_checked_json(tmp_path / "config.json")
    config["versions"]["peft"] = "0.0.1"
    del config["settings"]["lora"]["use_dora"]
    config["settings"]["base"]["config"]["of_an_older_version"] = 1
    write_checked_json(tmp_path / "config.json", config)
    _loop(tmp_path, _policy()).run()
    assert "was begun with peft 0.0.1" in caplog.text


def test_a_template_with_the_date_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = "{{ strftime_now('%d') }}" + tokenizer.chat_template
    _loop(tmp_path, _policy(), tokenizer).run()
    assert "chat template uses the current date" in caplog.text


def test_settings_do_not_depend_on_use(tmp_path: Path) -> None:
    """The same after a pass, after saving and loading, and for a large weight."""
    model, tokenizer = _policy({"vocab_size": 40_000}), tiny_tokenizer(chat=True)
    before = policy_settings(model, tokenizer)
    model(torch.arange(9)[None])
    assert policy_settings(model, tokenizer) == before
    base = tiny_causal_lm("llama", vocab_size=40_000)
    base.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = policy_settings(
        *load_policy(tmp_path / "model", adapter=tmp_path / "adapter", device="cpu")
    )
    assert loaded["base"] == before["base"] and loaded["tokenizer"] == before["tokenizer"]
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight[33_333, 7] += 1e-3
    assert policy_settings(model, tokenizer)["base"]["weights"] != before["base"]["weights"]


# -- the command line ------------------------------------------------------------------------------


def _yaml(folder: Path, **changes: Any) -> list[str]:
    config: dict[str, Any] = {
        "model": str(folder / "model"),
        "adapter": str(folder / "adapter"),
        "prompts": str(folder / "prompts.jsonl"),
        "output_dir": str(folder / "run"),
        "device": "cpu",
        "selection": {"proj_dim": 32, "verify": False},
        "loop": {
            "rounds": 1,
            "batch_size": 2,
            "prompts_per_round": 3,
            "num_generations": 2,
            "max_completion_length": 4,
        },
        "dpo": {"max_steps": 1},
        "oracle": {"kind": "people", "via": "files"},
        **changes,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return ["run", str(folder / "run.yaml")]


def test_the_adapter_dtype_and_tokenizer_that_are_named_are_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_causal_lm("llama")
    base.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for seed, name in enumerate(("adapter", "other")):  # fresh ones, which only differ in A
        torch.manual_seed(seed)
        policy = lora(tiny_causal_lm("llama"), "llama", randomize=False)
        with torch.no_grad():
            for key, parameter in policy.named_parameters():
                if "lora_A" in key:
                    parameter.add_(seed)
        policy.save_pretrained(str(tmp_path / name))
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"id": p.id, "prompt": p.prompt}) + "\n" for p in TEXTS)
    )
    assert main(_yaml(tmp_path)) == 3
    assert main(_yaml(tmp_path)) == 3
    for changes, named in (
        ({"adapter": str(tmp_path / "other")}, "extra_settings.adapter"),
        ({"dtype": "bfloat16"}, "base.dtype"),
        ({"tokenizer": str(tmp_path / "words")}, "tokenizer.special_tokens.eos_token"),
    ):
        if "tokenizer" in changes:
            tiny_tokenizer(chat=True).save_pretrained(tmp_path / "words")
        capsys.readouterr()
        assert main(_yaml(tmp_path, **changes)) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(error) == 1 and f"other settings: {named}" in error[0], error
    # The adapters of rounds can be given to the other commands: the tokenizer is in the same
    # folder.
    assert (tmp_path / "run" / "start" / "adapter" / "tokenizer.json").is_file()


def test_the_oracle_is_a_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("model", "reward"):
        tiny_tokenizer().save_pretrained(tmp_path / name)
    tiny_causal_lm("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"id": p.id, "prompt": p.prompt}) + "\n" for p in TEXTS)
    )

    def run(seed: int = 0, **options: Any) -> int:
        torch.manual_seed(seed)
        LlamaForSequenceClassification(
            LlamaConfig(
                num_labels=1,
                vocab_size=384,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                pad_token_id=tiny_tokenizer().pad_token_id,
            )
        ).save_pretrained(tmp_path / "reward")
        oracle = {"kind": "reward_model", "model": str(tmp_path / "reward"), **options}
        capsys.readouterr()
        return main(
            _yaml(
                tmp_path, adapter=None, lora={"r": 2, "target_modules": ["q_proj"]}, oracle=oracle
            )
        )

    assert run() == 0
    assert run(temperature=1.0, batch_size=3) == 0  # the default, and settings that change no label
    assert run(temperature=0.5) == 2
    assert "oracle.temperature (1.0, now 0.5)" in capsys.readouterr().err
    assert run(seed=1) == 2
    assert "extra_settings.oracle.model (" in capsys.readouterr().err


def test_a_field_that_another_version_of_trl_has_or_lacks_is_no_difference(tmp_path: Path) -> None:
    _loop(tmp_path, _policy()).run()
    path = tmp_path / "config.json"
    config = read_checked_json(path)
    del config["settings"]["dpo"]["f_alpha_divergence_coef"]
    config["settings"]["dpo"]["of_an_older_version"] = 3
    config["versions"]["trl"] = "1.15.0"
    write_checked_json(path, config)
    _loop(tmp_path, _policy(), rounds=2).run()


def test_a_custom_strategy_is_a_setting_with_its_options(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Last(Strategy):
        """The last candidates of the pool."""

        name: ClassVar[str] = "last"
        requires: ClassVar[frozenset[str]] = frozenset()
        step: int = 1

        def select(self, signals: Any, n: int, **options: Any) -> Ranking:
            places = torch.arange(len(signals.pairs) - 1, -1, -self.step)[:n]
            return Ranking(places, torch.zeros(n, dtype=torch.float64))

    _loop(tmp_path, _policy(), strategy=Last()).run()
    picked = [
        json.loads(line)
        for line in (tmp_path / "round-000" / "picked.jsonl").read_text().splitlines()
    ]
    pool = [
        json.loads(line)["id"]
        for line in (tmp_path / "round-000" / "pool.jsonl").read_text().splitlines()
    ]
    assert [pick["id"] for pick in picked] == pool[:0:-1]
    _loop(tmp_path, _policy(), strategy=Last(), rounds=2).run()
    with pytest.raises(ActiveDPOError, match=r"other settings: strategy\.step \(1, now 2\)"):
        _loop(tmp_path, _policy(), strategy=Last(step=2), rounds=3).run()
