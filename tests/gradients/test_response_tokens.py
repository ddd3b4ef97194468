"""Gradients of the response's tokens, against a plain loop in which the prompt is a constant."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from activedpo_fast import ActiveDPOError, ActiveDPOSelector, PreferencePool
from activedpo_fast.gradients.batches import Layout, group_rows
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.sketch import Sketch
from activedpo_fast.pool.tokens import TokenizedPool, TokenizedResponse, tokenize_pool
from tests.support.gradients import relative_error, trainable
from tests.support.models import ARCHS, lora, tiny_causal_lm, tiny_tokenizer
from tests.support.quick import slow_except

ROWS = [
    {
        "prompt": "What is a sketch? TL;DR:",
        "responses": [" a short random projection", " a drawing", " no idea, sorry, none at all"],
    },
    {
        "prompt": "Name the library that decides which pairs to label next. TL;DR:",
        "responses": [" this one", " the quick brown fox jumps over the lazy dog 0123456789"],
    },
    {"prompt": "x", "responses": [" y", " zzzz"]},
]


def tokens_of(**options) -> TokenizedPool:
    settings = {"max_length": None, "truncation_mode": "keep_start", **options}
    return tokenize_pool(PreferencePool.from_rows(ROWS), tiny_tokenizer(), **settings)


def loop(model: PeftModel, sequences: Sequence[TokenizedResponse]) -> torch.Tensor:
    """For each response: the prompt, except its last token, under no_grad; the rest by autograd."""
    parameters = list(trainable(model).values())
    rows = []
    for sequence in sequences:
        ids = torch.tensor([sequence.input_ids])
        cut = max(sequence.completion_start, 1) - 1
        past = None
        if cut:
            with torch.no_grad():
                past = model(ids[:, :cut], use_cache=True).past_key_values
        logits = model(ids[:, cut:], past_key_values=past, use_cache=cut > 0).logits[0, :-1]
        logp = logits.log_softmax(-1).gather(1, ids[0, cut + 1 :, None]).sum()
        gradients = torch.autograd.grad(logp, parameters)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def extract(model: PeftModel, tokens: TokenizedPool, **options) -> torch.Tensor:
    extractor = FeatureExtractor(
        model,
        Sketch("none"),
        beta=1.0,
        gradient="response_tokens",
        **{"max_tokens_per_batch": 160, **options},
    )
    assert extractor.check(tokens) is Layout.APART
    return extractor.gradients(tokens).gradients


@pytest.mark.parametrize("arch", slow_except(["llama", "gemma2", "gpt2"], ARCHS))
def test_rows_are_those_of_the_loop(arch: str) -> None:
    model = lora(tiny_causal_lm(arch), arch)
    tokens = tokens_of()
    expected = loop(lora(tiny_causal_lm(arch), arch).double(), tokens.sequences)
    for budget in (40, 160, 4000):
        assert relative_error(extract(model, tokens, max_tokens_per_batch=budget), expected) <= 1e-5


def test_padding_whose_numbers_are_nan_is_no_other_layout(caplog: pytest.LogCaptureFixture) -> None:
    """Gemma 2's mask in float64 is infinite: padding that may attend to nothing gives NaN."""
    pool = PreferencePool.from_rows(
        {"prompt": "fox " * n + "x", "responses": [" y", " z z z z z z z z z z z z"]}
        for n in (1, 5, 20, 8)
    )
    tokens = tokenize_pool(pool, tiny_tokenizer())
    model = lora(tiny_causal_lm("gemma2", torch.float64), "gemma2")
    rows = extract(model, tokens, max_tokens_per_batch=2048)
    assert "not finite in a batch" in caplog.text
    assert relative_error(rows, loop(model, tokens.sequences)) <= 1e-6  # norms are in float32


def test_a_row_does_not_depend_on_the_other_responses() -> None:
    """Truncated from the left, the responses of an item have different prompt tokens."""
    model = lora(tiny_causal_lm("llama", torch.float64), "llama")
    tokens = tokens_of(max_length=20, truncation_mode="keep_end")
    assert any(
        len({tuple(tokens.sequences[row].input_ids[:2]) for row in range(start, end)}) > 1
        for start, end in ((0, 3), (3, 5))
    )
    expected = loop(model, tokens.sequences)
    assert relative_error(extract(model, tokens), expected) <= 1e-9
    alone = [
        extract(model, TokenizedPool([sequence], [], [item]))
        for sequence, item in zip(tokens.sequences, tokens.items, strict=True)
    ]
    assert relative_error(torch.cat(alone), expected) <= 1e-9


def test_one_group_for_each_beginning() -> None:
    tokens = tokens_of()
    everything = range(len(tokens.sequences))
    for group in group_rows(tokens, everything, Layout.APART):
        starts = {tokens.sequences[row].completion_start - 1 for row in group.rows}
        assert starts == {group.shared}


def test_relative_rows_are_differences() -> None:
    model = lora(tiny_causal_lm("llama", torch.float64), "llama")
    tokens = tokens_of()
    rows = extract(model, tokens)
    extractor = FeatureExtractor(model, Sketch("none"), beta=1.0, gradient="response_tokens")
    relative = extractor.gradients(tokens, relative=True).gradients
    first = torch.tensor([tokens.items.index(item) for item in tokens.items])
    torch.testing.assert_close(relative, rows - rows[first], rtol=1e-9, atol=1e-12)


def test_log_probs_are_the_same() -> None:
    model = lora(tiny_causal_lm("qwen", torch.float64), "qwen")
    tokens = tokens_of()
    of_response, of_all = (
        FeatureExtractor(model, Sketch("none"), gradient=gradient).gradients(tokens)
        for gradient in ("response_tokens", "all_tokens")
    )
    torch.testing.assert_close(of_response.logps, of_all.logps, rtol=1e-10, atol=0)
    difference = (of_response.gradients - of_all.gradients).norm() / of_all.gradients.norm()
    assert 1e-3 < difference < 1.0


def test_a_response_that_is_not_finite_is_named_or_skipped() -> None:
    tokens = tokens_of()
    odd, sequence = 4, tokens.sequences[4]
    model = lora(tiny_causal_lm("llama"), "llama")
    expected = extract(model, tokens)
    used = {token for s in tokens.sequences for token in s.input_ids}
    rare = max(set(range(384)) - used)
    ids = [*sequence.input_ids[:-1], rare, sequence.input_ids[-1]]
    tokens.sequences[odd] = TokenizedResponse(ids, sequence.completion_start)
    extractor = FeatureExtractor(
        model, Sketch("none"), beta=1.0, gradient="response_tokens", skip_non_finite=True
    )
    extractor.check(tokens)
    model.get_input_embeddings().weight.data[rare] = torch.nan
    found = extractor.gradients(tokens).gradients
    others = torch.arange(len(found)) != odd
    assert not found[odd].any()
    assert relative_error(found[others], expected[others]) <= 1e-6
    extractor.skip_non_finite = False
    with pytest.raises(ActiveDPOError, match="response 2: .*not finite"):
        extractor.gradients(tokens)


def test_selector_and_its_refusals() -> None:
    model = lora(tiny_causal_lm("llama"), "llama")
    pool = PreferencePool.from_rows(ROWS)
    options = {"processing_class": tiny_tokenizer(), "proj_dim": 64}
    selector = ActiveDPOSelector(model, gradient="response_tokens", **options)
    assert selector.extractor.gradient == "response_tokens"
    assert len(selector.select(pool, 2)) == 2
    with pytest.raises(ActiveDPOError, match="gradient"):
        ActiveDPOSelector(model, gradient="responses", **options)
    with pytest.raises(ActiveDPOError, match="gradient must be one of all_tokens, response_tokens"):
        FeatureExtractor(model, Sketch("none"), gradient="response")
    unchecked = FeatureExtractor(model, Sketch("none"), gradient="response_tokens", verify=False)
    with pytest.raises(ActiveDPOError, match="verify=True"):
        unchecked.gradients(tokens_of())


def test_a_model_whose_prompts_cannot_run_apart_is_refused() -> None:
    config = transformers.MambaConfig(
        vocab_size=384, hidden_size=16, num_hidden_layers=1, state_size=4, intermediate_size=32
    )
    torch.manual_seed(0)
    model = get_peft_model(
        transformers.MambaForCausalLM(config), LoraConfig(r=2, target_modules=["x_proj"])
    ).eval()
    with pytest.raises(ActiveDPOError, match="use gradient='all_tokens'"):
        FeatureExtractor(model, Sketch("none"), gradient="response_tokens").gradients(tokens_of())
