"""The rows of a model that trl.DPOTrainer has trained in bf16 are those of its weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset

from activedpo_fast import ActiveDPOSelector, FeatureExtractor, PreferencePool, Prompt, Sketch
from activedpo_fast.gradients.self_check import _TOLERANCE
from activedpo_fast.models.adapters import adapter_state
from activedpo_fast.pool.tokens import tokenize_pool
from activedpo_fast.training.generation import respond
from activedpo_fast.training.trl import dpo_config, train_dpo
from tests.support.gradients import loop_gradients, relative_error, trainable
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer
from tests.support.state import differences, snapshot

trl = pytest.importorskip("trl")

TOKENIZER = tiny_tokenizer()
POOL = PreferencePool.from_rows(
    [
        {
            "prompt": "What is a sketch? TL;DR:",
            "responses": [" a short random projection", " a drawing"],
        },
        {"prompt": "Name the library. TL;DR:", "responses": [" this one", " the quick brown fox"]},
    ]
)
DATA = Dataset.from_list(
    [
        {"prompt": item.prompt, "chosen": item.responses[0], "rejected": item.responses[1]}
        for item in POOL
    ]
)
EXACT = Sketch("none")


def _args(folder: Any, **options: Any) -> Any:
    return dpo_config(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        **options,
    )


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_after_a_bf16_trainer_rows_are_those_of_the_weights(
    tmp_path: Any, checkpointing: bool
) -> None:
    model = lora(tiny_causal_lm("llama"), "llama")
    trl.DPOTrainer(
        model=model,
        args=_args(tmp_path, bf16=True, use_cpu=True, gradient_checkpointing=checkpointing),
        train_dataset=DATA,
        processing_class=TOKENIZER,
    ).train()
    assert "_original_forward" in vars(model)  # accelerate's wrapper is in place
    plain = lora(tiny_causal_lm("llama"), "llama")
    plain.load_state_dict(
        {name: weight for name, weight in model.state_dict().items() if ".ref." not in name}
    )
    tokens = tokenize_pool(POOL, TOKENIZER)
    expected, logps = loop_gradients(plain, tokens.sequences, trainable(plain))

    before = snapshot(model, TOKENIZER)
    for verify in (True, False):
        extractor = FeatureExtractor(model, EXACT, beta=1.0, verify=verify)
        found = extractor.gradients(tokens)
        assert relative_error(found.gradients, expected) < _TOLERANCE[torch.float32].gradient / 10
        torch.testing.assert_close(found.logps, logps.double(), rtol=1e-5, atol=0)
        torch.testing.assert_close(extractor.logps(tokens), logps.double(), rtol=1e-5, atol=0)
    for strategy in ("activedpo", "aplp", "apo"):
        picks = [
            [
                (pick.id, pick.pair)
                for pick in ActiveDPOSelector(
                    of, TOKENIZER, strategy=strategy, proj_dim=64, ref_model=ref
                ).select(POOL, 2)
            ]
            for of, ref in ((model, None), (plain, adapter_state(model, adapter_name="ref")))
        ]
        assert picks[0] == picks[1]
    prompts = [Prompt("a", "The quick")]
    assert respond(model, TOKENIZER, prompts, max_completion_length=4) == respond(
        plain, TOKENIZER, prompts, max_completion_length=4
    )
    assert differences(before, snapshot(model, TOKENIZER)) == []


@pytest.mark.parametrize("bf16", [False, True])
def test_a_training_round_leaves_everything_but_the_weights(tmp_path: Any, bf16: bool) -> None:
    model, tokenizer = lora(tiny_causal_lm("llama"), "llama"), tiny_tokenizer()
    model.train()
    before = snapshot(model, tokenizer, weights=False)
    train_dpo(
        model,
        tokenizer,
        DATA,
        _args(tmp_path, bf16=bf16, use_cpu=True),
        initial_adapter=adapter_state(model),
        show_progress=False,
    )
    assert differences(before, snapshot(model, tokenizer, weights=False)) == []


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_a_training_round_does_not_depend_on_the_callers_modes(tmp_path: Any, mode: Any) -> None:
    start = lora(tiny_causal_lm("llama"), "llama")
    states = []
    for around in (None, mode):
        model = copy.deepcopy(start)
        options = dict(initial_adapter=adapter_state(model), show_progress=False)
        if around is None:
            train_dpo(model, TOKENIZER, DATA, _args(tmp_path), **options)
        else:
            with around():
                train_dpo(model, TOKENIZER, DATA, _args(tmp_path), **options)
        states.append(adapter_state(model))
    for name, weight in states[0].items():
        assert torch.equal(weight, states[1][name]), name
