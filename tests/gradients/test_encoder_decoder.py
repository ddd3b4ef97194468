"""Encoder-decoder models against the plain loop, in which the model itself shifts the labels."""

from __future__ import annotations

import copy
from functools import lru_cache
from itertools import product
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from activedpo_fast import ActiveDPOError, ActiveDPOSelector, PreferencePool, Sketch
from activedpo_fast.gradients.batches import Layout
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.trainable import trainable_parameters
from activedpo_fast.models.encoder_decoder import begins_decoder
from activedpo_fast.models.ref_model import reference_policy
from activedpo_fast.pool.tokens import TokenizedPool, TokenizedResponse, tokenize_pool
from tests.support.adapters import spread
from tests.support.encoder_decoder import MODELS, loop_rows, tiny_model, tokenized, with_lora
from tests.support.gradients import relative_error, trainable
from tests.support.models import VOCAB_SIZE, lora, tiny_causal_lm, tiny_tokenizer
from tests.support.quick import slow_except

POOL = PreferencePool.from_rows(
    [
        {"prompt": "What is a sketch? TL;DR:", "responses": [" a short projection", " no idea"]},
        {"prompt": "Name the library.", "responses": [" this one", " quick brown fox", " x"]},
        {"prompt": "label less:", "responses": [" people prefer one of them", " x y"]},
    ]
)
EXACT = Sketch("none")


@lru_cache
def texts() -> list[tuple[list[int], list[int]]]:
    """The tokens of every prompt and response, by hand."""
    ids = tiny_tokenizer().encode
    eos = tiny_tokenizer().eos_token_id
    return [(ids(item.prompt), [*ids(str(r)), eos]) for item in POOL for r in item.responses]


def adapted(name: str, dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    return with_lora(tiny_model(name, dtype), name, **config)


@lru_cache
def looped(name: str) -> tuple[Any, TokenizedPool, torch.Tensor, torch.Tensor]:
    """A model with LoRA, its tokens, and its rows and log-probs by the loop."""
    model = adapted(name)
    return model, tokenized(model, POOL), *loop_rows(model, texts(), trainable(model))


def assert_exact(model: nn.Module, layout: Layout, *, verify: bool = True) -> None:
    tokens = tokenized(model, POOL)
    expected, logps = loop_rows(model, texts(), trainable(model))
    extractor = FeatureExtractor(model, EXACT, beta=0.3, verify=verify)
    found = extractor.gradients(tokens)
    assert extractor.check(tokens) is layout
    assert found.gradients.dtype == torch.float64
    assert relative_error(found.gradients, 0.3 * expected) <= 1e-9
    torch.testing.assert_close(found.logps, logps, rtol=1e-10, atol=0)
    torch.testing.assert_close(extractor.logps(tokens), logps, rtol=1e-10, atol=0)


# The other models are as these, with classes of their own.
@pytest.mark.parametrize(
    "name", slow_except(["t5", "bart", "led"], [name for name in MODELS if name != "t5gemma"])
)
def test_lora(name: str) -> None:
    """The encoder runs once for a prompt's responses."""
    model = adapted(name)
    assert not trainable_parameters(model).others
    assert_exact(model, Layout.SHARED)


def test_t5gemma() -> None:
    """Its attention computes the softmax in float32, whatever the model's dtype."""
    model = adapted("t5gemma")
    expected, logps = loop_rows(model, texts(), trainable(model))
    found = FeatureExtractor(model, EXACT, beta=1.0).gradients(tokenized(model, POOL))
    assert relative_error(found.gradients, expected) <= 1e-5
    torch.testing.assert_close(found.logps, logps, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_whole_sequences(name: str) -> None:
    assert_exact(adapted(name), Layout.WHOLE, verify=False)


@pytest.mark.parametrize("targets", [r".*encoder\..*\.(q|v)", r".*decoder\..*EncDec.*\.(k|v|o)"])
def test_one_side_alone(targets: str) -> None:
    assert_exact(adapted("t5", target_modules=targets), Layout.SHARED)


def test_a_fresh_adapter() -> None:
    """B = 0, so that no gradient goes through A."""
    assert_exact(adapted("bart", init_lora_weights=True), Layout.SHARED)
    model = get_peft_model(tiny_model("t5"), LoraConfig(r=2, target_modules=["q", "wo"])).double()
    assert_exact(model.eval(), Layout.SHARED)


def test_an_adapter_of_the_head() -> None:
    assert_exact(adapted("flan-t5", target_modules=["lm_head", "wo"]), Layout.SHARED)


# Captured, or left to autograd.
ADAPTERS: dict[str, tuple[PeftConfig, Layout]] = {
    "IA3": (peft.IA3Config(target_modules=["k", "wo"], feedforward_modules=["wo"]), Layout.ALONE),
    "DoRA": (LoraConfig(r=2, target_modules=["q"], use_dora=True), Layout.SHARED),
    "prompt tuning": (peft.PromptTuningConfig(num_virtual_tokens=3), Layout.ALONE),
    "prefix tuning": (peft.PrefixTuningConfig(num_virtual_tokens=3), Layout.ALONE),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_other_adapters(name: str) -> None:
    config, layout = ADAPTERS[name]
    config = copy.deepcopy(config)
    config.task_type = "SEQ_2_SEQ_LM"
    assert_exact(spread(get_peft_model(tiny_model("t5"), config).double()), layout)


def test_full_fine_tuning() -> None:
    """With the embedding that both sides and the head share, and T5's relative positions."""
    assert_exact(tiny_model("t5"), Layout.ALONE)


def test_an_adapter_made_for_causal_models() -> None:
    """PEFT's wrapper for these passes on what it does not know."""
    assert_exact(adapted("bart", task_type="CAUSAL_LM"), Layout.SHARED)


@pytest.mark.parametrize("verify", [True, False])
def test_as_many_tokens_for_the_decoder_as_for_the_encoder(verify: bool) -> None:
    """Layers that read the one and those that read the other cannot be told apart by shape."""
    model = adapted("bart")
    prompts, labels = [[9, 10, 11, 12], [13, 14]], [[20, 21, 0], [22, 0], [23, 24, 0], [25, 0]]
    pairs = [(prompts[n // 2], response) for n, response in enumerate(labels)]
    sequences = [TokenizedResponse([*p, 0, *y], len(p) + 1) for p, y in pairs]
    tokens = TokenizedPool(sequences, [], [0, 0, 1, 1], encoder_decoder=True)
    expected, _ = loop_rows(model, pairs, trainable(model))
    for relative in (False, True):
        extractor = FeatureExtractor(model, EXACT, beta=1.0, verify=verify)
        found = extractor.gradients(tokens, relative=relative).gradients
        first = expected[[0, 0, 2, 2]] if relative else 0.0
        torch.testing.assert_close(found, expected - first, rtol=1e-9, atol=1e-9)


# -- other rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_tokens", "verify"), slow_except([(1, True), (40, False)], product([1, 40], [True, False]))
)
def test_relative_rows_in_small_batches(max_tokens: int, verify: bool) -> None:
    """BART: T5's norm has a part in float32, in which a difference of rows rounds differently."""
    model, tokens, expected, _ = looped("bart")
    assert tokens.items is not None
    first = [tokens.items.index(item) for item in tokens.items]
    extractor = FeatureExtractor(
        model, EXACT, beta=1.0, max_tokens_per_batch=max_tokens, verify=verify
    )
    assert relative_error(extractor.gradients(tokens).gradients, expected) <= 1e-9
    found = extractor.gradients(tokens, relative=True).gradients
    torch.testing.assert_close(found, expected - expected[first], rtol=1e-9, atol=1e-9)


def test_means_of_log_probs() -> None:
    model, tokens, expected, logps = looped("t5")
    lengths = torch.tensor([len(response) for _, response in texts()])
    extractor = FeatureExtractor(model, EXACT, beta=1.0, length_normalized=True)
    found = extractor.gradients(tokens)
    assert relative_error(found.gradients, expected / lengths[:, None]) <= 1e-9
    torch.testing.assert_close(found.logps, logps / lengths, rtol=1e-10, atol=0)


def test_response_tokens_take_the_encoders_output_for_a_constant() -> None:
    model, tokens, whole, _ = looped("t5")
    parameters, expected = trainable(model), []
    for prompt, response in texts():
        ids, labels = torch.tensor([prompt]), torch.tensor([response])
        states = model.get_base_model().encoder(input_ids=ids).last_hidden_state.detach()
        logits = model(encoder_outputs=BaseModelOutput(states), labels=labels).logits[0]
        logp = torch.log_softmax(logits, -1)[torch.arange(len(response)), labels[0]].sum()
        found = torch.autograd.grad(logp, list(parameters.values()), allow_unused=True)
        expected.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(parameters.values(), found, strict=True)
                ]
            )
        )
    extractor = FeatureExtractor(model, EXACT, beta=1.0, gradient="response_tokens")
    rows = extractor.gradients(tokens).gradients
    assert relative_error(rows, torch.stack(expected)) <= 1e-9
    assert relative_error(rows, whole) > 1e-3


def test_single_precision_and_bfloat16() -> None:
    model, tokens, expected, logps = looped("bart")
    single = copy.deepcopy(model).float()
    found = FeatureExtractor(single, EXACT, beta=1.0).gradients(tokens)
    assert found.gradients.dtype == torch.float32
    assert relative_error(found.gradients, expected) <= 1e-5
    half = FeatureExtractor(copy.deepcopy(model).bfloat16(), EXACT, beta=1.0).gradients(tokens)
    assert relative_error(half.gradients, expected) < 0.2
    torch.testing.assert_close(half.logps, logps, rtol=0.02, atol=0)


def test_hidden_states_are_those_of_the_decoders_last_token() -> None:
    model, tokens, _, _ = looped("t5")
    found = FeatureExtractor(model, EXACT).hidden(tokens)
    assert torch.equal(found, FeatureExtractor(model, EXACT, verify=False).hidden(tokens))
    for row, (prompt, response) in enumerate(texts()):
        start = model.config.decoder_start_token_id
        output = model(
            input_ids=torch.tensor([prompt]),
            decoder_input_ids=torch.tensor([[start, *response]]),
            output_hidden_states=True,
        )
        last = output.decoder_hidden_states[-1][0, -1]
        torch.testing.assert_close(found[row].double(), last, rtol=1e-5, atol=1e-6)


def test_log_probs_of_the_reference() -> None:
    model, tokens, _, logps = looped("t5")
    _, expected = loop_rows(base := tiny_model("t5"), texts(), trainable(base))
    with reference_policy(model, None) as reference:
        found = FeatureExtractor(model, EXACT).logps(tokens, model=reference)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    assert (found - logps).abs().min() > 1e-6


# -- tokens and models that are refused -----------------------------------------------------------


def test_positions_are_counted_for_either_side() -> None:
    model = adapted("bart", torch.float32)
    extractor = FeatureExtractor(model, EXACT)
    long = "0 1 2 3 4 5 6 7 8 9 " * 8
    fits = PreferencePool.from_rows([{"prompt": long[:60], "responses": [long[:60], "b"]}])
    tokens = tokenized(model, fits)
    assert len(tokens.sequences[0].input_ids) > 64
    assert extractor.gradients(tokens).gradients.isfinite().all()
    for row, where in (
        ({"prompt": long, "responses": ["a", "b"]}, "in its prompt"),
        ({"prompt": "a", "responses": ["b", long]}, "beside its prompt"),
    ):
        tokens = tokenized(model, PreferencePool.from_rows([row]))
        with pytest.raises(ActiveDPOError, match=f"tokens {where}, and the model has 64 positions"):
            extractor.logps(tokens)


def test_tokens_for_another_kind_of_model_are_refused() -> None:
    model, tokens, _, _ = looped("t5")
    with pytest.raises(ActiveDPOError, match="for a decoder-only model, and T5For.* is an encoder"):
        FeatureExtractor(model, EXACT).gradients(tokenize_pool(POOL, tiny_tokenizer()))
    causal = lora(tiny_causal_lm("llama"), "llama")
    with pytest.raises(ActiveDPOError, match="an encoder-decoder model, and Llama.* a decoder-onl"):
        FeatureExtractor(causal, EXACT).logps(tokens)
    with pytest.raises(ActiveDPOError, match="begin with 1, those of BartFor.* with 0: tokenize"):
        FeatureExtractor(adapted("bart"), EXACT).logps(tokens)


def test_where_the_decoder_begins() -> None:
    assert begins_decoder(tiny_model("t5"), [7, 8]) == 1
    assert begins_decoder(tiny_model("bart"), [7, 8]) == 0
    assert begins_decoder(tiny_model("mbart"), [7, 8]) == 8  # the labels end with the language
    assert begins_decoder(tiny_model("m2m100"), [7, 8]) == 0
    for name in ("t5", "m2m100"):
        model = tiny_model(name)
        model.config.decoder_start_token_id = None
        with pytest.raises(ActiveDPOError, match="set decoder_start_token_id"):
            ActiveDPOSelector(model, tiny_tokenizer(), strategy="apo").tokenize(POOL)


def test_kinds_that_are_refused() -> None:
    whisper = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=VOCAB_SIZE,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            pad_token_id=1,
        )
    )
    bert: Any = dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**bert), transformers.BertConfig(**bert)
    )
    headless = transformers.T5Model(transformers.T5Config(**MODELS["t5"][1]))
    rope = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)
    own = MODELS["t5gemma"][1]
    varying = tiny_model("t5gemma", decoder=dict(own["decoder"], rope_parameters=rope))
    for model, why in (
        (varying, "embeds positions by the longest sequence of a batch"),
        (whisper, "its encoder reads input_features"),
        (transformers.EncoderDecoderModel(config), "has no decoder apart from its head"),
        (headless, "T5Model has no language model head"),
    ):
        with pytest.raises(ActiveDPOError, match=why):
            FeatureExtractor(model, EXACT)
