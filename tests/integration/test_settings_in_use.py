"""Settings in one piece do what the same keyword options do, and reach the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import TrainerCallback

from activedpo_fast import (
    ActiveDPOError,
    ActiveDPOLoop,
    ActiveDPOSelector,
    LoopConfig,
    PreferencePool,
    Prompt,
    SelectorConfig,
    make_strategy,
)
from activedpo_fast.labels import CallableOracle
from activedpo_fast.models.adapters import adapter_state
from activedpo_fast.training.trl import dpo_config
from tests.support.models import lora, saved_model, tiny_causal_lm, tiny_tokenizer

trl = pytest.importorskip("trl")

POOL = PreferencePool.from_rows(
    [
        {"prompt": f"The {word}", "responses": [f" {word}", " fox and dog", f" {n}"]}
        for n, word in enumerate("library prompt model sketch".split())
    ]
)
PROMPTS = [Prompt(item.id, item.prompt) for item in POOL]
SMALL: dict[str, Any] = {
    "rounds": 1,
    "batch_size": 2,
    "prompts_per_round": 3,
    "num_generations": 2,
    "max_completion_length": 4,
    "selector_options": {"proj_dim": 32, "verify": False},
}


class Steps(TrainerCallback):
    """Counts the trainer's steps, and keeps its arguments."""

    def __init__(self) -> None:
        self.count = 0
        self.args: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.count, self.args = self.count + 1, args


def _policy() -> PeftModel:
    return lora(tiny_causal_lm("llama"), "llama")


def _loop(model: Any, **options: Any) -> ActiveDPOLoop:
    oracle = CallableOracle(lambda prompt, a, b: int(len(b) < len(a)))
    return ActiveDPOLoop(model, tiny_tokenizer(), PROMPTS, oracle, show_progress=False, **options)


def test_a_selector_takes_args_or_keywords() -> None:
    model, tokenizer = _policy(), tiny_tokenizer()
    options: dict[str, Any] = {"normalize": "pair", "seed": 1, "proj_dim": 32, "verify": False}
    by_keywords = ActiveDPOSelector(model, processing_class=tokenizer, **options)
    by_args = ActiveDPOSelector(model, args=SelectorConfig(**options), processing_class=tokenizer)
    assert by_args.select(POOL, 5) == by_keywords.select(POOL, 5)
    with pytest.raises(ActiveDPOError, match="seed: settings are given twice"):
        ActiveDPOSelector(model, tokenizer, args=SelectorConfig(), seed=1)
    with pytest.raises(ActiveDPOError, match="preset: settings are given twice"):
        ActiveDPOSelector(model, tokenizer, args=SelectorConfig(), preset="paper")
    own = make_strategy("random", seed=3)
    picked = ActiveDPOSelector(model, tokenizer, args=SelectorConfig(), strategy=own)
    assert picked.select(POOL, 2).strategy == "random"
    with pytest.raises(ActiveDPOError, match="lam would have no effect on a Strategy"):
        ActiveDPOSelector(model, tokenizer, args=SelectorConfig(lam=2.0), strategy=own)


def test_what_a_strategy_lacks_is_said_at_once() -> None:
    base = tiny_causal_lm("llama")
    for strategy in ("aplp", "margin_small", "adpo_plus"):
        with pytest.raises(ActiveDPOError, match="needs the reference model"):
            ActiveDPOSelector(base, tiny_tokenizer(), strategy=strategy)


def test_bf16_of_the_features_and_of_training() -> None:
    instructions = torch.cpu.get_capabilities().items()
    if any(has for name, has in instructions if name.endswith("bf16")):
        selector = ActiveDPOSelector(_policy(), tiny_tokenizer(), bf16=True)
        assert selector.extractor.precision == "bf16"
    else:
        with pytest.raises(ActiveDPOError, match="this CPU has no bfloat16 instructions"):
            ActiveDPOSelector(_policy(), tiny_tokenizer(), bf16=True)
    assert dpo_config(bf16=True).bf16 and not dpo_config(bf16=False).bf16


def test_a_loop_takes_args_or_keywords(tmp_path: Path) -> None:
    _loop(_policy(), output_dir=tmp_path / "a", **SMALL).run()
    _loop(_policy(), args=LoopConfig(tmp_path / "b", **SMALL)).run()
    for name in ("pool.jsonl", "picked.jsonl", "adapter/adapter_model.safetensors"):
        first, second = (tmp_path / run / "round-000" / name for run in "ab")
        assert first.read_bytes() == second.read_bytes(), name
    with pytest.raises(ActiveDPOError, match="rounds: settings are given twice"):
        _loop(_policy(), args=LoopConfig(tmp_path), rounds=2)
    with pytest.raises(ActiveDPOError, match="selector_options: 'strategy' is a setting of the"):
        _loop(_policy(), output_dir=tmp_path, selector_options={"strategy": "random"})
    with pytest.raises(ActiveDPOError, match="kapa: unknown option; did you mean 'kappa'"):
        _loop(_policy(), output_dir=tmp_path, selector_options={"kapa": 1.0})


def test_trls_own_config_trains_on_a_cpu_as_it_is(tmp_path: Path) -> None:
    """With bf16, TRL's default, and what it reports to; callbacks reach every round's trainer."""
    seen = Steps()
    args = trl.DPOConfig(output_dir=str(tmp_path / "t"), use_cpu=True, max_steps=2, report_to=[])
    assert args.bf16
    loop = _loop(_policy(), output_dir=tmp_path / "run", dpo_args=args, callbacks=[seen], **SMALL)
    before = adapter_state(loop.model)
    loop.run()
    assert seen.count == 2 and seen.args.bf16 and seen.args.report_to == []
    after = adapter_state(loop.model)
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("named", [False, True])
def test_peft_config_puts_an_adapter_on_a_model_without_one(named: bool, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    base: Any = tiny_causal_lm("llama")
    if named:
        base = saved_model(tmp_path / "models")[0]
    tokenizer = tiny_tokenizer()
    state = torch.random.get_rng_state()
    selector = ActiveDPOSelector(
        base, tokenizer, peft_config=config, seed=5, proj_dim=32, verify=False
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(selector.model, PeftModel) and len(selector.select(POOL, 3)) == 3
    trainable = [p for p in selector.model.parameters() if p.requires_grad]
    assert {p.shape[0] for p in trainable if p.shape[1] != 4} == {4}
    with pytest.raises(ActiveDPOError, match="peft_config: the model has an adapter already"):
        ActiveDPOSelector(selector.model, tokenizer, peft_config=config)
    with pytest.raises(ActiveDPOError, match="peft_config: the model has an adapter already"):
        ActiveDPOSelector(selector.model.get_base_model(), tokenizer, peft_config=config)
    inside = tiny_causal_lm("llama")
    inside.add_adapter(config)
    with pytest.raises(ActiveDPOError, match="peft_config: the model has an adapter already"):
        ActiveDPOSelector(inside, tokenizer, peft_config=config)
    with pytest.raises(ActiveDPOError, match="peft_config: expected a peft.PeftConfig"):
        ActiveDPOSelector(base, tokenizer, peft_config={"r": 4})  # type: ignore[arg-type]


def test_a_loop_puts_it_on_too(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    first = _loop(tiny_causal_lm("llama"), peft_config=config, output_dir=tmp_path, **SMALL)
    assert [record.labels_total for record in first.run()] == [0, 2]
    # The same seed gives the same adapter, so that a run continues.
    again = _loop(tiny_causal_lm("llama"), peft_config=config, output_dir=tmp_path, **SMALL)
    assert [record.labels_total for record in again.run()] == [0, 2]
    with pytest.raises(ActiveDPOError, match="or peft_config for a fresh one"):
        _loop(tiny_causal_lm("llama"), output_dir=tmp_path, **SMALL)
