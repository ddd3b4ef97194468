"""Adapters of every kind in what surrounds gradients: π_ref, rounds, stores and commands."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from activedpo_fast import (
    ActiveDPOError,
    ActiveDPOLoop,
    ActiveDPOSelector,
    FeatureExtractor,
    FeatureStore,
    PreferencePool,
    Prompt,
    Sketch,
)
from activedpo_fast.cli.app import main
from activedpo_fast.labels import CallableOracle
from activedpo_fast.models.adapters import adapter_state, load_adapter_state
from activedpo_fast.models.loading import load_policy
from activedpo_fast.models.ref_model import reference_policy
from activedpo_fast.pool.tokens import tokenize_pool
from activedpo_fast.training.run_folder import read_adapter, read_records
from activedpo_fast.training.trl import dpo_config, train_dpo
from tests.support.adapters import ADAPTERS, CAPTURED, LORA, adapted, spread
from tests.support.gradients import loop_gradients, relative_error, trainable
from tests.support.models import tiny_causal_lm, tiny_tokenizer
from tests.support.quick import slow_except

ROWS = [
    {"id": "a", "prompt": "The quick", "responses": [" brown fox", " dog jumps over"]},
    {"id": "b", "prompt": "What is a sketch?", "responses": [" A short projection", " It", " x"]},
]
POOL = PreferencePool.from_rows(ROWS)
TOKENS = tokenize_pool(POOL, tiny_tokenizer())
RESTORABLE = [name for name in ADAPTERS if name != "P-tuning"]


def logps(model: Any) -> torch.Tensor:
    return FeatureExtractor(model, Sketch("none")).logps(TOKENS)


# Of each way in which an adapter changes the model, one.
QUICK = ("DoRA", "modules_to_save", "trainable tokens of LoRA", "VeRA", "OFT", "prompt tuning")


@pytest.mark.parametrize("name", slow_except(QUICK, ADAPTERS))
def test_the_base_model_is_the_reference(name: str) -> None:
    model = adapted(ADAPTERS[name])
    base, policy = logps(tiny_causal_lm("llama", torch.float64)), logps(model)
    assert not torch.allclose(base, policy)
    with reference_policy(model, None) as reference:
        torch.testing.assert_close(logps(reference), base, rtol=1e-9, atol=0)
    torch.testing.assert_close(logps(model), policy, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", slow_except(QUICK, RESTORABLE))
def test_an_earlier_state_is_the_reference(name: str) -> None:
    model = adapted(ADAPTERS[name])
    initial, state = logps(model), adapter_state(model)
    spread(model, seed=2)
    policy = logps(model)
    assert not torch.allclose(initial, policy)
    with reference_policy(model, state) as reference:
        torch.testing.assert_close(logps(reference), initial, rtol=1e-9, atol=0)
    torch.testing.assert_close(logps(model), policy, rtol=1e-9, atol=0)
    load_adapter_state(model, state)
    torch.testing.assert_close(logps(model), initial, rtol=1e-9, atol=0)


# -- training with TRL ----------------------------------------------------------------------------

DATA = Dataset.from_list(
    [
        {"prompt": item["prompt"], "chosen": item["responses"][0], "rejected": item["responses"][1]}
        for item in ROWS
    ]
)


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.found.append(logs["loss"])


@pytest.mark.parametrize(
    "name", slow_except(QUICK, [name for name in RESTORABLE if name != "AdaLoRA"])
)
def test_a_round_of_training(name: str, tmp_path: Path) -> None:
    """The reference is the initial policy, all of the adapter is trained, the base model is not."""
    model = adapted(ADAPTERS[name], torch.float32)
    initial = adapter_state(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = Losses()
    args = dpo_config(
        output_dir=str(tmp_path),
        learning_rate=1e-2,
        max_steps=2,
        per_device_train_batch_size=2,
        logging_steps=1,
        lr_scheduler_type="constant",
    )
    train_dpo(
        model,
        tiny_tokenizer(),
        DATA,
        args,
        initial_adapter=initial,
        callbacks=[losses],
        show_progress=False,
    )
    assert losses.found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses.found[-1] < math.log(2)
    trained = adapter_state(model)
    assert {key for key in initial if torch.equal(initial[key], trained[key])} <= {
        key for key in initial if "vera_A" in key or "vera_B" in key
    }
    assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())
    assert list(model.peft_config) == ["default"]


def _loop(folder: Path, model: Any, **options: Any) -> ActiveDPOLoop:
    return ActiveDPOLoop(
        model,
        tiny_tokenizer(),
        [Prompt(str(n), f"{text} brown fox") for n, text in enumerate("abcd")],
        CallableOracle(lambda prompt, a, b: len(a) % 2),
        output_dir=folder,
        dpo_args=dpo_config(
            output_dir=str(folder / "trainer"),
            learning_rate=1e-2,
            max_steps=1,
            per_device_train_batch_size=2,
        ),
        batch_size=2,
        prompts_per_round=2,
        num_generations=2,
        max_completion_length=4,
        selector_options={"proj_dim": 64},
        show_progress=False,
        **options,
    )


def test_rounds(tmp_path: Path) -> None:
    """A run is rehearsed, runs, and goes on in another process, from the weights on disk."""
    model = adapted(ADAPTERS["modules_to_save"], torch.float32)
    initial = adapter_state(model)
    _loop(tmp_path, model, rounds=1).run()
    first = read_adapter(tmp_path / "round-000")
    assert first.keys() == initial.keys()
    assert not any(torch.equal(first[key], initial[key]) for key in initial)
    again = adapted(ADAPTERS["modules_to_save"], torch.float32)
    _loop(tmp_path, again, rounds=2).run()
    assert [record.round for record in read_records(tmp_path)] == [-1, 0, 1]
    second = read_adapter(tmp_path / "round-001")
    assert not any(torch.equal(first[key], second[key]) for key in initial)
    assert all(torch.equal(second[key], value) for key, value in adapter_state(again).items())


def test_adapters_that_rounds_refuse(tmp_path: Path) -> None:
    for name, why in (("AdaLoRA", "AdaLoRA has one adapter only"), ("P-tuning", "an encoder")):
        with pytest.raises(ActiveDPOError, match=why) as error:
            _loop(tmp_path, adapted(ADAPTERS[name], torch.float32), rounds=1).run()
        assert "\n" not in str(error.value)
    with pytest.raises(ActiveDPOError, match="rounds train an adapter.*peft_config"):
        _loop(tmp_path, tiny_causal_lm("llama"), rounds=1)


def test_rounds_refuse_weights_that_are_trained_besides_the_adapter(tmp_path: Path) -> None:
    """They would be trained, but neither kept nor restored."""
    model = adapted(LoraConfig(**LORA), torch.float32)
    model.get_submodule("base_model.model.model.norm").weight.requires_grad_(True)
    loop = _loop(tmp_path, model, rounds=1)
    with pytest.raises(ActiveDPOError, match="model.norm.weight is trained besides the adapter"):
        loop.run()
    assert not (tmp_path / "config.json").exists()
    model.get_submodule("base_model.model.model.norm").weight.requires_grad_(False)
    assert len(loop.run()) == 2


# -- stores ---------------------------------------------------------------------------------------


@pytest.fixture()
def extractor() -> FeatureExtractor:
    model = adapted(ADAPTERS["modules_to_save"], torch.float32)
    return FeatureExtractor(model, Sketch("sjlt", 32), max_tokens_per_batch=16)


@pytest.fixture()
def interrupted(
    extractor: FeatureExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> FeatureStore:
    """A store with some of its rows."""
    store = FeatureStore.create(tmp_path / "s", POOL, {"model": "tiny"}, skipped=[])
    extractor.check(TOKENS)
    module = extractor.model.get_input_embeddings()
    whole = module.forward
    calls: list[int] = []

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, "forward", dies)
        store.fill(extractor, TOKENS, rows_per_shard=2)
    assert 0 < len(store.missing_rows()) < len(TOKENS.sequences)
    return store


def test_an_interrupted_store_is_filled_with_the_same_bits(
    interrupted: FeatureStore, extractor: FeatureExtractor
) -> None:
    interrupted.fill(extractor, TOKENS, rows_per_shard=2)
    assert torch.equal(interrupted.load().gradients, extractor.gradients(TOKENS).gradients)


def test_rows_of_other_parameters_are_not_mixed(
    interrupted: FeatureStore, extractor: FeatureExtractor
) -> None:
    """The same weights, of which others are trained."""
    extractor.model.get_input_embeddings().modules_to_save.requires_grad_(False)
    with pytest.raises(ActiveDPOError, match="filled with trained = '10 parameters.* not '9 param"):
        interrupted.fill(extractor, TOKENS)


@pytest.mark.parametrize("name", ["DoRA", "modules_to_save", "VeRA"])
def test_the_commands(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`features` and `select` with an adapter on disk, against the loop."""
    tiny_causal_lm("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    model = adapted(ADAPTERS[name], torch.float32)
    model.save_pretrained(tmp_path / "adapter")
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    paths = ["--model", str(tmp_path / "model"), "--adapter", str(tmp_path / "adapter")]
    output = ["--output", str(tmp_path / "store"), "--sketch", "none", "--beta", "1"]
    assert main(["features", str(pool), *paths, *output]) == 0
    by_autograd = "gradients are from autograd, one response at a time" in capsys.readouterr().err
    assert by_autograd == (name not in CAPTURED)
    exact = copy.deepcopy(model).double()
    expected, _ = loop_gradients(exact, TOKENS.sequences, trainable(exact))
    rows = FeatureStore.open(tmp_path / "store").load()
    assert relative_error(rows.gradients, expected) <= 1e-5
    picked = tmp_path / "picked.jsonl"
    assert main(["select", str(tmp_path / "store"), "--pairs", "2", "--output", str(picked)]) == 0
    assert len(picked.read_text().splitlines()) == 2


def test_an_adapter_whose_file_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    """PEFT would leave it at its initialization."""
    tiny_causal_lm("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name in ("IA3", "trainable tokens of LoRA", "modules_to_save"):
        folder = tmp_path / name
        adapted(ADAPTERS[name], torch.float32).save_pretrained(folder)
        load_policy(tmp_path / "model", adapter=folder)
        path = folder / "adapter_model.safetensors"
        weights = load_file(path)
        lost = next(key for key in weights if "lora_" not in key)
        del weights[lost]
        save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(ActiveDPOError, match=f"does not fit the model: .*'{lost}'"):
            load_policy(tmp_path / "model", adapter=folder)


def test_lora_on_fused_experts(tmp_path: Path) -> None:
    """Mixtral with LoRA on everything that "all-linear" finds: selected, trained and put back."""
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = spread(get_peft_model(tiny_causal_lm("mixtral"), config))
    base = logps(tiny_causal_lm("mixtral"))
    with reference_policy(model, None) as reference:
        torch.testing.assert_close(logps(reference), base)
    initial, state = logps(model), adapter_state(model)
    picked = ActiveDPOSelector(model, tiny_tokenizer(), proj_dim=64).select(POOL, 2)
    args = dpo_config(output_dir=str(tmp_path), learning_rate=1e-2, max_steps=1)
    data = picked.to_dataset([0, 1])
    train_dpo(model, tiny_tokenizer(), data, args, initial_adapter=state, show_progress=False)
    assert not any(torch.equal(value, state[key]) for key, value in adapter_state(model).items())
    with reference_policy(model, state) as reference:
        torch.testing.assert_close(logps(reference), initial)
