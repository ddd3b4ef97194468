"""DPO rounds with TRL: their reference, and that they change nothing except the weights."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from transformers import TrainerCallback

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.models.adapters import adapter_state, load_adapter_state
from activedpo_fast.training.trl import dpo_config, selector_settings, train_dpo
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer

DATA = Dataset.from_dict(
    {
        "id": list("abcd"),
        "prompt": ["A library", "Prompts have", "What is", "The quick"],
        "chosen": [" that decides", " responses", " a sketch?", " brown fox"],
        "rejected": [" jumps", " over the lazy dog", " TL;DR", " 0123"],
    }
)


def _args(tmp_path: Any, **overrides: Any) -> Any:
    settings: dict[str, Any] = dict(
        output_dir=str(tmp_path),
        learning_rate=1e-2,
        max_steps=3,
        per_device_train_batch_size=4,
        logging_steps=1,
        lr_scheduler_type="constant",
        warmup_steps=0,
    )
    return dpo_config(**{**settings, **overrides})


def _model() -> Any:
    return lora(tiny_causal_lm("llama"), "llama")


def _snapshot(model: Any) -> dict[str, Any]:
    """Everything that a training round could leave behind, except the weights' values."""
    modules = {
        name: (
            module.training,
            {
                k: (v.copy() if isinstance(v, (dict, set, list)) else v)
                for k, v in vars(module).items()
                if k not in ("_parameters", "_buffers", "_modules")
            },
            sorted(module._modules),
            sorted(module._parameters),
        )
        for name, module in model.named_modules()
    }
    base = model.get_base_model()
    return {
        "modules": modules,
        "keys": list(model.state_dict()),
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "grads": [name for name, p in model.named_parameters() if p.grad is not None],
        "config": base.config.to_dict(),
        "generation": base.generation_config.to_dict(),
        "adapters": (list(model.peft_config), model.active_adapters),
    }


class _Watch(TrainerCallback):
    """The logged metrics, and the reference adapter's weights when training starts."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.reference: dict[str, torch.Tensor] = {}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.reference = {
            name.replace(".ref.", "."): parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if ".ref." in name
        }

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
        if "loss" in logs:
            self.logs.append(dict(logs))


class _Stop(TrainerCallback):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("stopped")


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_rounds_leave_only_new_weights(tmp_path: Any, checkpointing: bool, capfd: Any) -> None:
    model, tokenizer = _model(), tiny_tokenizer()
    initial = adapter_state(model)
    base_before = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    inputs = tokenizer("The quick", return_tensors="pt")
    # Stores attributes on the PEFT model.
    model.generate(**inputs, max_new_tokens=3, do_sample=False)
    before = _snapshot(model)
    args = _args(tmp_path, gradient_checkpointing=checkpointing)
    weights = initial
    for _ in range(2):
        metrics = train_dpo(
            model, tokenizer, DATA, args, initial_adapter=initial, show_progress=False
        )
        assert metrics["steps"] == 3 and metrics["pairs"] == 4
        assert math.isfinite(metrics["loss"]) and metrics["seconds"] > 0
        assert _snapshot(model) == before
        trained = adapter_state(model)
        assert trained.keys() == initial.keys()
        assert all(not torch.equal(trained[name], weights[name]) for name in trained)
        weights = trained
        assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > 2
    for name, parameter in base_before.items():
        assert torch.equal(model.get_parameter(name), parameter), name
    printed = capfd.readouterr()
    assert "loss" not in printed.out and "%|" not in printed.err


def test_reference_round_is_the_policy_at_its_start(tmp_path: Any) -> None:
    model, tokenizer = _model(), tiny_tokenizer()
    for _ in range(2):
        watch = _Watch()
        train_dpo(
            model,
            tokenizer,
            DATA,
            _args(tmp_path),
            reference="round",
            callbacks=[watch],
            show_progress=False,
        )
        assert watch.logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert watch.logs[-1]["loss"] < math.log(2) - 1e-3


def test_reference_initial_stays_the_first_adapter(tmp_path: Any) -> None:
    model, tokenizer = _model(), tiny_tokenizer()
    initial = adapter_state(model)
    start = {
        name.replace(".default.", "."): p.detach().clone()
        for name, p in model.named_parameters()
        if ".default." in name
    }
    first_losses = []
    for _ in range(2):
        watch = _Watch()
        expected = _dpo_loss(model, initial)
        train_dpo(
            model,
            tokenizer,
            DATA,
            _args(tmp_path),
            reference="initial",
            initial_adapter=initial,
            callbacks=[watch],
            show_progress=False,
        )
        assert watch.reference.keys() == start.keys()
        assert all(torch.equal(watch.reference[name], start[name]) for name in start)
        # The reference log-probs are those of the initial adapter, computed here without TRL.
        assert watch.logs[0]["loss"] == pytest.approx(expected, abs=1e-4)
        first_losses.append(watch.logs[0]["loss"])
    assert first_losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert first_losses[1] < math.log(2) - 1e-3


@torch.no_grad()
def _dpo_loss(model: Any, reference: dict[str, torch.Tensor], beta: float = 0.1) -> float:
    tokenizer = tiny_tokenizer()

    def logp(prompt: str, response: str) -> torch.Tensor:
        start = len(tokenizer(prompt)["input_ids"])
        ids = tokenizer(prompt + response + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        table = model(ids).logits[0, :-1].log_softmax(-1)
        return table.gather(1, ids[0, 1:, None])[start - 1 :].sum()

    def margins() -> torch.Tensor:
        return torch.stack(
            [logp(r["prompt"], r["chosen"]) - logp(r["prompt"], r["rejected"]) for r in DATA]
        )

    policy, current = margins(), adapter_state(model)
    load_adapter_state(model, reference)
    anchor = margins()
    load_adapter_state(model, current)
    return float(-torch.nn.functional.logsigmoid(beta * (policy - anchor)).mean())


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM"),
        pytest.param(
            LoHaConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), marks=pytest.mark.slow
        ),
        IA3Config(
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            task_type="CAUSAL_LM",
        ),
    ],
    ids=["embeddings", "loha", "ia3"],
)
def test_the_reference_has_all_of_the_adapter(tmp_path: Path, config: Any) -> None:
    """TRL copies parameters by a part of their names, which these names lack."""
    model, tokenizer = get_peft_model(tiny_causal_lm("llama"), config), tiny_tokenizer()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    watch = _Watch()
    train_dpo(
        model,
        tokenizer,
        DATA,
        _args(tmp_path),
        reference="round",
        callbacks=[watch],
        show_progress=False,
    )
    assert watch.logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    with pytest.raises(ActiveDPOError, match="precompute_ref_log_probs=True does not go with this"):
        train_dpo(
            model,
            tokenizer,
            DATA,
            _args(tmp_path, precompute_ref_log_probs=True),
            reference="round",
            show_progress=False,
        )


@pytest.mark.parametrize("init", ["pissa", pytest.param("olora", marks=pytest.mark.slow)])
def test_the_reference_adapter_takes_nothing_out_of_the_base(tmp_path: Any, init: str) -> None:
    """These put a part of the base model's weights into each adapter that is added."""
    model, tokenizer = (
        lora(tiny_causal_lm("llama"), "llama", init_lora_weights=init),
        tiny_tokenizer(),
    )
    base = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    watch = _Watch()
    train_dpo(
        model,
        tokenizer,
        DATA,
        _args(tmp_path),
        reference="round",
        callbacks=[watch],
        show_progress=False,
    )
    assert watch.logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(torch.equal(model.get_parameter(n), p) for n, p in base.items())
    assert model.peft_config["default"].init_lora_weights == init


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.slow), True])
def test_state_is_restored_after_an_exception(tmp_path: Any, training: bool) -> None:
    model, tokenizer = _model(), tiny_tokenizer()
    model.train(training)
    before = _snapshot(model)
    args = _args(tmp_path, gradient_checkpointing=True)
    with pytest.raises(RuntimeError, match="stopped"):
        train_dpo(
            model,
            tokenizer,
            DATA,
            args,
            reference="round",
            callbacks=[_Stop()],
            show_progress=False,
        )
    assert _snapshot(model) == before


def test_adapters_of_eight_bit_models_keep_their_dtype(tmp_path: Any) -> None:
    model, tokenizer = _model(), tiny_tokenizer()
    model.get_base_model().is_loaded_in_8bit = (
        True  # the only thing that TRL checks before it casts
    )
    initial = adapter_state(model)
    during: set[torch.dtype] = set()

    class Watch(TrainerCallback):
        def on_step_end(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            during.update(p.dtype for name, p in model.named_parameters() if ".default." in name)

    for callbacks, message in (([Watch()], None), ([_Stop()], "stopped")):
        with pytest.raises(RuntimeError, match=message) if message else nullcontext():
            train_dpo(
                model,
                tokenizer,
                DATA,
                _args(tmp_path),
                initial_adapter=initial,
                callbacks=callbacks,
                show_progress=False,
            )
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert during == {torch.bfloat16}
    trained = adapter_state(model)
    assert all(not torch.equal(trained[name], initial[name]) for name in initial)


def test_rotary_frequencies_that_grew_in_training_are_put_back(tmp_path: Any) -> None:
    """`dynamic` RoPE changes its frequencies at the first sequence that is longer than all
    before."""
    base = tiny_causal_lm(
        "llama",
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    )
    model, tokenizer = lora(base, "llama"), tiny_tokenizer()
    initial = adapter_state(model)
    inputs = tokenizer("The quick fox", return_tensors="pt")
    assert inputs["input_ids"].shape[1] < 16

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs).logits

    before = logits()
    long = DATA.map(lambda row: {"prompt": row["prompt"] + " jumps over the lazy dog" * 4})
    train_dpo(model, tokenizer, long, _args(tmp_path), initial_adapter=initial, show_progress=False)
    load_adapter_state(model, initial)
    assert torch.equal(logits(), before)


def test_weights_do_not_depend_on_earlier_rounds(tmp_path: Any) -> None:
    model, tokenizer = _model(), tiny_tokenizer()
    initial = adapter_state(model)
    results = []
    for _ in range(2):
        load_adapter_state(model, initial)
        train_dpo(
            model, tokenizer, DATA, _args(tmp_path), initial_adapter=initial, show_progress=False
        )
        results.append(adapter_state(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in initial)


def test_a_model_that_cannot_be_trained_is_one_clear_error(tmp_path: Any) -> None:
    tokenizer, args = tiny_tokenizer(), _args(tmp_path)

    def error(model: Any, dataset: Any = DATA, config: Any = args, **options: Any) -> str:
        with pytest.raises(ActiveDPOError) as caught:
            train_dpo(model, tokenizer, dataset, config, **{"reference": "round", **options})
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "PEFT" in error(tiny_causal_lm("llama"))
    assert "'default'" in error(lora(tiny_causal_lm("llama"), "llama", adapter_name="mine"))
    model = _model()
    assert "initial_adapter" in error(model, reference="initial")
    assert "neither" in error(model, reference="first")
    assert "no labeled pair" in error(model, DATA.select([]))
    precompute = _args(tmp_path, precompute_ref_log_probs=True)
    assert "precompute" in error(
        model, config=precompute, reference="initial", initial_adapter=adapter_state(model)
    )
    assert "max_length=2" in error(model, config=_args(tmp_path, max_length=2))
    assert list(model.peft_config) == ["default"]
    model.add_adapter("ref", model.peft_config["default"])
    assert "'ref'" in error(model)
    with pytest.raises(ActiveDPOError, match="do not fit"):
        load_adapter_state(model, {})
    with pytest.raises(ActiveDPOError, match="no_such"):
        dpo_config(no_such=1)


def test_selector_settings_are_the_trainers(tmp_path: Any) -> None:
    args = _args(tmp_path, beta=0.3, max_length=77)
    assert selector_settings(args) == {
        "beta": 0.3,
        "max_length": 77,
        "truncation_mode": "keep_start",
    }


def test_rounds_of_a_script_of_ones_own(tmp_path: Path) -> None:
    """What docs/trl.md says under "Several rounds": whose policy is π_ref."""
    from trl import DPOTrainer

    model, args = _model(), _args(tmp_path)

    def trainer() -> DPOTrainer:
        return DPOTrainer(
            model=model, args=args, train_dataset=DATA, processing_class=tiny_tokenizer()
        )

    trainer().train()
    trained = adapter_state(model)
    with pytest.raises(ValueError, match="ref"):
        trainer()
    model.delete_adapter("ref")
    second = trainer()
    of_ref = {n: p for n, p in model.named_parameters() if ".ref." in n}
    own = dict(model.named_parameters())
    assert of_ref and trained
    assert all(torch.equal(p, own[n.replace(".ref.", ".default.")]) for n, p in of_ref.items())
    assert all(torch.equal(tensor, trained[name]) for name, tensor in adapter_state(model).items())
    second.train()
    assert any(
        not torch.equal(tensor, trained[name]) for name, tensor in adapter_state(model).items()
    )
