"""The results of a response do not depend on what else is in its batch."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from peft import PeftModel

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.batches import Layout, group_rows, plan_batches
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.sketch import Sketch
from activedpo_fast.models.positions import fresh_positions, length_class
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.tokens import TokenizedPool, TokenizedResponse, tokenize_pool
from tests.support.gradients import loop_gradients, relative_error, trainable
from tests.support.models import (
    ORIGINAL_LENGTH,
    VARYING,
    lora,
    tiny_causal_lm,
    tiny_tokenizer,
    varying_lm,
)
from tests.support.quick import slow_except

EXACT = Sketch("none")


def sequences(*lengths: tuple[int, ...]) -> TokenizedPool:
    """One item per tuple: the length of the prompt, then those of its responses."""
    found, items = [], []
    for item, (prompt, *responses) in enumerate(lengths):
        prompt_ids = [20 + (7 * item + n) % 300 for n in range(prompt)]
        for m, length in enumerate(responses):
            found.append(
                TokenizedResponse(
                    [*prompt_ids, *(30 + (5 * n + 11 * m + item) % 300 for n in range(length))],
                    prompt,
                )
            )
            items.append(item)
    return TokenizedPool(found, [], items, [f"p{n}" for n in range(len(lengths))])


# Items below and above the threshold, one that crosses it although its prompt is below, one of
# which only one response crosses it, and lengths at the threshold and one off.
POOL = sequences((5, 3, 4), (30, 4, 9, 9), (20, 9, 12), (18, 2, 17), (12, 12, 11, 13), (24, 1, 3))


def by_itself(model: PeftModel, pool: TokenizedPool) -> tuple[torch.Tensor, torch.Tensor]:
    """∇ log π and log π of every response, by a model that has run nothing else."""
    rows, logps = [], []
    for sequence in pool.sequences:
        fresh = copy.deepcopy(model)
        row, logp = loop_gradients(fresh, [sequence], trainable(fresh))
        rows.append(row)
        logps.append(logp)
    return torch.cat(rows), torch.cat(logps)


# One kind of each way to embed positions by length; the others are of the same code here.
varying = pytest.mark.parametrize("name", slow_except(["phi3 longrope", "gemma3 dynamic"], VARYING))


@varying
def test_positions_that_depend_on_the_longest_of_a_batch(name: str) -> None:
    # Experts are computed in float32, whatever the dtype of the model.
    tolerance = 1e-4 if "moe" in name else 1e-8
    model = varying_lm(name)
    expected, expected_logps = by_itself(model, POOL)
    first = torch.tensor([POOL.items.index(item) for item in POOL.items])
    others = torch.arange(len(first)) != first
    for verify in (True, False):
        extractor = FeatureExtractor(model, EXACT, beta=1.0, verify=verify)
        found = extractor.gradients(POOL)
        assert relative_error(found.gradients, expected) <= tolerance
        torch.testing.assert_close(found.logps, expected_logps, rtol=tolerance, atol=0)
        torch.testing.assert_close(extractor.logps(POOL), expected_logps, rtol=tolerance, atol=0)
        relative = extractor.gradients(POOL, relative=True).gradients
        assert not relative[~others].any()
        assert relative_error(relative[others], (expected - expected[first])[others]) <= tolerance
    alone = []
    for sequence in POOL.sequences:
        with torch.no_grad():
            output = copy.deepcopy(model)(
                input_ids=torch.tensor([sequence.input_ids]), output_hidden_states=True
            )
        alone.append(output.hidden_states[-1][0, -1].float())
    for verify in (True, False):
        hidden = FeatureExtractor(model, EXACT, beta=1.0, verify=verify).hidden(POOL)
        torch.testing.assert_close(hidden, torch.stack(alone), rtol=1e-4, atol=1e-5)


@varying
def test_prompts_are_shared_where_the_length_changes_nothing(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = varying_lm(name)
    classify = length_class(model)
    assert classify is not None
    groups = group_rows(POOL, range(len(POOL.sequences)), Layout.SHARED, classify)
    shared = {POOL.item_of(group.rows[0]) for group in groups if group.shared}
    # Below the threshold as usual; beyond it only with "longrope", if the prompt is also beyond it.
    assert shared == ({0, 1, 4} if "longrope" in name else {0, 4})
    for batch in plan_batches(groups, 1000, split=True):
        kinds = {classify(len(POOL.sequences[row].input_ids)) for g in batch for row in g.rows}
        kinds |= {classify(group.shared) for group in batch if group.shared}
        assert len(kinds) == 1
    with caplog.at_level(logging.WARNING):
        extractor = FeatureExtractor(model, EXACT)
        extractor.gradients(POOL)
        extractor.logps(POOL)
    lines = [r.getMessage() for r in caplog.records if "embeds positions" in r.getMessage()]
    assert len(lines) == 1 and "9 of 14 responses are longer" in lines[0]
    assert extractor.check(POOL) is Layout.SHARED
    # Nothing is longer than the original length: no warning, and nothing is slower.
    caplog.clear()
    FeatureExtractor(model, EXACT).gradients(sequences((5, 3, 4), (9, 2, 8)))
    assert "embeds positions" not in caplog.text


def test_earlier_passes_change_nothing_and_their_state_is_kept() -> None:
    """Dynamic RoPE keeps the frequencies of the longest sequence that it has seen."""
    model = varying_lm("llama dynamic")
    expected = FeatureExtractor(model, EXACT, beta=1.0).gradients(POOL).gradients
    ids = torch.arange(100)[None] + 50
    with torch.no_grad():
        model(input_ids=ids)
        rotary = model.get_submodule("base_model.model.model.rotary_emb")
        grown = rotary.inv_freq.clone()
        assert int(rotary.max_seq_len_cached) == 100
        before = {name: value for name, value in vars(rotary).items() if name != "_buffers"}
        buffers = dict(rotary._buffers)
    found = FeatureExtractor(model, EXACT, beta=1.0).gradients(POOL).gradients
    assert torch.equal(found, expected)
    assert {n: v for n, v in vars(rotary).items() if n != "_buffers"} == before
    assert rotary._buffers.keys() == buffers.keys()
    assert all(rotary._buffers[name] is buffer for name, buffer in buffers.items())
    assert torch.equal(rotary.inv_freq, grown)
    with pytest.raises(KeyError), fresh_positions(model):
        assert rotary.max_seq_len_cached == ORIGINAL_LENGTH
        raise KeyError
    assert int(rotary.max_seq_len_cached) == 100 and torch.equal(rotary.inv_freq, grown)


def test_ordinary_models_have_no_length_classes() -> None:
    yarn = dict(
        rope_type="yarn",
        rope_theta=1e4,
        factor=4.0,
        original_max_position_embeddings=ORIGINAL_LENGTH,
    )
    for overrides in ({}, {"rope_parameters": yarn}):
        assert length_class(tiny_causal_lm("llama", **overrides)) is None
    assert length_class(tiny_causal_lm("gpt2")) is None


def test_samples_that_influence_each_other_run_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing in the model shows it except the numbers: its results depend on the batch."""
    model = lora(tiny_causal_lm("llama", torch.float64), "llama")
    mlp = model.get_submodule("base_model.model.model.layers.0.mlp")
    mlp.register_forward_hook(lambda module, inputs, output: output + output.mean(dim=0))
    expected, logps = by_itself(model, POOL)
    extractor = FeatureExtractor(model, EXACT, beta=1.0)
    found = extractor.gradients(POOL)
    assert extractor.check(POOL) is Layout.ALONE
    assert relative_error(found.gradients, expected) <= 1e-9
    torch.testing.assert_close(extractor.logps(POOL), logps, rtol=1e-9, atol=0)
    relative = extractor.gradients(POOL, relative=True).gradients
    assert relative_error(relative[1:2], expected[1:2] - expected[0:1]) <= 1e-9
    assert caplog.text.count("differently than alone") == 2  # gradients, log-probs


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_half_precision_hides_no_wrong_prompt(
    precision: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that computes a continued prompt slightly differently: by less than the tolerance for
    half precision, by more than its rounding."""
    if precision and not any(
        has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16")
    ):
        pytest.skip("this CPU has no bfloat16 instructions")
    pool = sequences((25, 3, 4), (30, 4, 9), (28, 9, 12))
    plain = lora(tiny_causal_lm("llama"), "llama")
    plain = plain if precision else plain.to(torch.bfloat16)
    extractor = FeatureExtractor(plain, EXACT, precision=precision)
    assert extractor.check(pool) is Layout.SHARED  # rounding alone
    model = copy.deepcopy(plain)
    mlp = model.get_submodule("base_model.model.model.layers.1.mlp")
    mlp.register_forward_hook(
        lambda module, inputs, output: output * (1.1 if output.shape[1] < 20 else 1.0)
    )
    found = FeatureExtractor(model, EXACT, precision=precision)
    assert found.check(pool) is Layout.WHOLE
    assert "where every response runs with its prompt" in caplog.text


def test_the_check_looks_at_the_longest_response_of_every_pool() -> None:
    """Nothing in the config shows that long sequences differ, and the first pool has none."""
    model = lora(tiny_causal_lm("llama", torch.float64), "llama")
    mlp = model.get_submodule("base_model.model.model.layers.1.mlp")

    def long_batches_differ(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1.0 + 0.2 * (output.shape[1] > 30))

    mlp.register_forward_hook(long_batches_differ)
    extractor = FeatureExtractor(model, EXACT, beta=1.0)
    short, long = sequences((5, 3, 4), (9, 2, 8)), sequences((5, 3, 4), (9, 2, 4), (26, 9, 2))
    for pool in (short, long):
        expected, _ = by_itself(model, pool)
        assert relative_error(extractor.gradients(pool).gradients, expected) <= 1e-9
    assert extractor.check(long) is Layout.ALONE


def test_padding_that_overflows_in_float64() -> None:
    """Gemma 2's eager softmax is in float32, in which the mask of a float64 model is infinite: a
    position that attends only to padding is NaN."""
    model = lora(tiny_causal_lm("gemma2", torch.float64, attn_implementation="eager"), "gemma2")
    pool = sequences((40, 3, 4), (3, 2, 30), (22, 9, 12), (3, 2, 2))
    expected, logps = by_itself(model, pool)
    for verify in (True, False):
        extractor = FeatureExtractor(model, EXACT, beta=1.0, verify=verify)
        found = extractor.gradients(pool)
        assert relative_error(found.gradients, expected) <= 1e-6
        torch.testing.assert_close(found.logps, logps, rtol=1e-6, atol=0)
        torch.testing.assert_close(extractor.logps(pool), logps, rtol=1e-6, atol=0)
        relative = extractor.gradients(pool, relative=True).gradients
        assert relative_error(relative[1::2], expected[1::2] - expected[::2]) <= 1e-6


@pytest.mark.parametrize("verify", [True, False])
def test_a_response_that_is_not_finite_is_named(verify: bool) -> None:
    pool = PreferencePool.from_rows(
        [
            {
                "id": f"row-{n}",
                "prompt": f"The {word}",
                "responses": [" fox", " lazy dog", " label"],
            }
            for n, word in enumerate("library prompt model sketch pair zebra choose".split())
        ]
    )
    tokens = tokenize_pool(pool, tiny_tokenizer())
    model = lora(tiny_causal_lm("llama"), "llama")
    odd = next(
        row for row, s in enumerate(tokens.sequences) if tokens.items[row] == 5 and row % 3 == 1
    )
    # A token that occurs only in this response.
    elsewhere = {t for row, s in enumerate(tokens.sequences) if row != odd for t in s.input_ids}
    model.get_input_embeddings().weight.data[0] = 1.0
    sequence = tokens.sequences[odd]
    rare = max(set(range(384)) - elsewhere)
    ids = [*sequence.input_ids[:-1], rare, sequence.input_ids[-1]]
    tokens.sequences[odd] = TokenizedResponse(ids, sequence.completion_start)
    model.get_input_embeddings().weight.data[rare] = torch.nan
    extractor = FeatureExtractor(model, EXACT, verify=False)
    for take in (
        extractor.gradients,
        extractor.logps,
        extractor.hidden,
        lambda tokens: extractor.gradients(tokens, relative=True),
    ):
        with pytest.raises(ActiveDPOError, match="'row-5', response 2: .*not finite"):
            take(tokens)
