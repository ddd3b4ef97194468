"""Cases from trying the library as a demanding user: each was computed wrongly, or refused without
reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import nn

from activedpo_fast import (
    ActiveDPOError,
    ActiveDPOSelector,
    PreferencePool,
    Sketch,
    generate_responses,
)
from activedpo_fast.gradients.batches import Layout
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.models.adapters import adapter_state, load_adapter_state
from activedpo_fast.models.ref_model import check_ref_model, reference_policy
from activedpo_fast.pool.tokens import tokenize_pool
from activedpo_fast.training.trl import dpo_config, selector_settings
from tests.support.gradients import loop_gradients, relative_error, trainable
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer

EXACT = Sketch("none")
POOL = PreferencePool.from_rows(
    [
        {
            "id": f"p{n}",
            "prompt": "The quick brown fox " * n + "jumps",
            "responses": [" over the dog", " high", " over the lazy dog and a fence " * n],
        }
        for n in range(1, 5)
    ]
)
TOKENS = tokenize_pool(POOL, tiny_tokenizer())


@pytest.mark.parametrize(
    "config",
    [
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
        PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=3,
            prefix_projection=True,
            encoder_hidden_size=16,
        ),
    ],
)
def test_encoders_of_prompts_have_no_weights_to_put_back(config: Any) -> None:
    """PEFT's state is the output of the encoder. Loading it would replace the encoder's input."""
    model = get_peft_model(tiny_causal_lm("llama"), config)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ActiveDPOError, match="'default'.* computes its prompt by an encoder"):
        adapter_state(model)
    with pytest.raises(ActiveDPOError, match="computes its prompt by an encoder"):
        load_adapter_state(model, {})
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_prompt_tuning_has_weights_to_put_back() -> None:
    model = get_peft_model(
        tiny_causal_lm("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).eval()
    selector = ActiveDPOSelector(
        model, tiny_tokenizer(), strategy="margin_small", ref_model=adapter_state(model)
    )
    assert [pick.score for pick in selector.select(POOL, 3)] == pytest.approx([0.5] * 3, abs=1e-6)


def _doge() -> Any:
    config = transformers.DogeConfig(
        vocab_size=384,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=256,
        keep_window_size=8,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return lora(model.double().eval(), "llama", target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize("verify", [True, False])
def test_attention_to_a_number_of_keys_of_the_batch(verify: bool) -> None:
    """Doge keeps the keys with the highest scores, including padding."""
    model = _doge()
    expected, logps = loop_gradients(model, TOKENS.sequences, trainable(model))
    extractor = FeatureExtractor(model, EXACT, beta=1.0, verify=verify)
    assert extractor.check(TOKENS) is Layout.ALONE
    assert relative_error(extractor.gradients(TOKENS).gradients, expected) <= 1e-6
    torch.testing.assert_close(extractor.logps(TOKENS), logps, rtol=1e-6, atol=0)
    hidden = extractor.hidden(TOKENS)
    for row, sequence in enumerate(TOKENS.sequences):
        with torch.no_grad():
            states = model(
                input_ids=torch.tensor([sequence.input_ids]), output_hidden_states=True
            ).hidden_states[-1]
        torch.testing.assert_close(hidden[row], states[0, -1].float(), rtol=1e-4, atol=1e-5)


def test_a_finding_of_one_check_holds_for_the_other() -> None:
    """A model whose log-probs depend on their batch by less than their own check can detect."""
    model = lora(tiny_causal_lm("llama", torch.float64), "llama")
    extractor = FeatureExtractor(model, EXACT, beta=1.0)
    extractor.gradients(TOKENS)
    longest = max(len(sequence.input_ids) for sequence in TOKENS.sequences)
    (known,) = extractor._layouts._gradients
    extractor._layouts._gradients[known] = (Layout.ALONE, longest)
    seen: list[int] = []
    model.get_submodule("base_model.model.model.layers.0").register_forward_hook(
        lambda module, inputs, output: seen.append(len(inputs[0]))
    )
    extractor._layouts._forward[model] = (Layout.SHARED, longest)
    extractor.logps(TOKENS)
    assert set(seen) == {1} and len(seen) == len(TOKENS.sequences)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("how", ["lora", "whole"])
def test_the_heads_weights_in_every_layout(how: str, verify: bool) -> None:
    base = tiny_causal_lm("llama", torch.float64)
    if how == "lora":
        model: Any = lora(base, "llama", target_modules=["q_proj", "lm_head"])
    else:
        model = base.requires_grad_(False)
        model.lm_head.weight.requires_grad_(True)
    expected, _ = loop_gradients(model, TOKENS.sequences, trainable(model))
    found = FeatureExtractor(model, EXACT, beta=1.0, verify=verify).gradients(TOKENS)
    assert relative_error(found.gradients, expected) <= 1e-9


@pytest.mark.parametrize("verify", [True, False])
def test_an_a_matrix_is_silent_only_where_all_its_readers_are(verify: bool) -> None:
    model = lora(
        tiny_causal_lm("llama", torch.float64), "llama", target_modules=["q_proj"], lora_dropout=0.0
    )
    first, second = (
        model.get_submodule(f"base_model.model.model.layers.{n}.self_attn.q_proj") for n in range(2)
    )
    second.lora_A["default"] = first.lora_A["default"]
    nn.init.zeros_(second.lora_B["default"].weight)
    expected, _ = loop_gradients(model, TOKENS.sequences, trainable(model))
    found = FeatureExtractor(model, EXACT, beta=1.0, verify=verify).gradients(TOKENS)
    assert relative_error(found.gradients, expected) <= 1e-9


@pytest.mark.parametrize("name", ["default", "model", "layers", "norm"])
def test_an_adapter_may_be_called_as_a_part_of_the_model_is(name: str) -> None:
    model = lora(tiny_causal_lm("llama"), "llama", adapter_name=name)
    check_ref_model(model, None)
    with reference_policy(model, None):
        pass
    model.get_submodule("base_model.model.model.norm").weight.requires_grad_(True)
    with pytest.raises(ActiveDPOError, match="is trained besides the adapter"):
        with reference_policy(model, None):
            pass


def test_values_of_a_wrong_type_are_named() -> None:
    model, tokenizer = lora(tiny_causal_lm("llama"), "llama"), tiny_tokenizer()
    for option, values in {
        "beta": ("0.1", float("inf"), float("nan"), True),
        "max_tokens_per_batch": (1.5, 0, True),
        "length_normalized": ("no", 1),
    }.items():
        for value in values:
            with pytest.raises(ActiveDPOError, match=f"{option}: .*{value}"):
                ActiveDPOSelector(model, tokenizer, **{option: value})
    with pytest.raises(ActiveDPOError, match="max_length: expected an integer or null, got 2.5"):
        ActiveDPOSelector(model, tokenizer, max_length=2.5)
    with pytest.raises(ActiveDPOError, match="max_length=2.5 is not an integer"):
        selector_settings(dpo_config(max_length=2.5))
    with pytest.raises(ActiveDPOError, match="n must be an integer, not True"):
        ActiveDPOSelector(model, tokenizer, strategy="random").select(POOL, True)
    for prompts in (["The quick"], [{"id": "a", "prompt": "The quick"}]):
        with pytest.raises(ActiveDPOError, match="prompt 1: expected a Prompt"):
            generate_responses(model, tokenizer, prompts)


def test_the_callers_default_device_changes_nothing() -> None:
    model, tokenizer = lora(tiny_causal_lm("llama"), "llama"), tiny_tokenizer()
    for strategy in ("activedpo", "margin_small", "random"):
        expected = ActiveDPOSelector(
            copy.deepcopy(model), tokenizer, strategy=strategy, proj_dim=32
        ).select(POOL, 3)
        with torch.device("meta"):
            found = ActiveDPOSelector(model, tokenizer, strategy=strategy, proj_dim=32).select(
                POOL, 3
            )
        assert found == expected


def test_a_selection_that_tells_no_pair_from_another_says_so(caplog: Any) -> None:
    """Texts that differ, but not in tokens: the end of a sequence ends every response anyway."""
    tokenizer = tiny_tokenizer()
    end = str(tokenizer.eos_token)
    pool = PreferencePool.from_rows(
        {"id": f"p{n}", "prompt": f"prompt {n}", "responses": [" b", " b" + end]} for n in range(3)
    )
    selector = ActiveDPOSelector(lora(tiny_causal_lm("llama"), "llama"), tokenizer)
    assert [pick.score for pick in selector.select(pool, 2)] == [0.0, 0.0]
    assert "all scores are 0, so activedpo tells no pair from another" in caplog.text
    caplog.clear()
    assert any(pick.score for pick in selector.select(POOL, 2))
    assert "all scores are 0" not in caplog.text
