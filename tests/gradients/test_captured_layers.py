"""Captured gradients of embeddings, norms and DoRA, against the plain loop."""

from __future__ import annotations

import copy
import warnings
from functools import lru_cache
from itertools import product
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from activedpo_fast import ActiveDPOError, PreferencePool
from activedpo_fast.gradients import check_plan
from activedpo_fast.gradients.batches import Layout
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.layers import Call, Elementwise
from activedpo_fast.gradients.sketch import Sketch, canonical_name
from activedpo_fast.gradients.trainable import trainable_parameters
from activedpo_fast.ops import reference
from activedpo_fast.pool.tokens import TokenizedPool, tokenize_pool
from tests.gradients import test_response_tokens
from tests.support.adapters import ADAPTERS, CAPTURED, LORA, adapted, spread
from tests.support.gradients import loop_gradients, relative_error, trainable
from tests.support.models import TINY_SIZES, lora, tiny_causal_lm, tiny_tokenizer
from tests.support.quick import slow_except

# Repeated tokens, the padding token among the others, a prompt of one token; the second response of
# the third prompt is left out.
ROWS = [
    {"prompt": "x x x x TL;DR:", "responses": [" x x x", " x", " <|pad|> x <|pad|><|pad|> y"]},
    {"prompt": "a <|pad|> b TL;DR:", "responses": [" no, no, no, and no again", " yes"]},
    {"prompt": "Alone. TL;DR:", "responses": [" the quick brown fox jumps over it", " left out"]},
    {"prompt": "q", "responses": ["q", "qqq q"]},
]
EXACT = Sketch("none")
GEMMAS = 1e-6  # whose norms compute in float32


@lru_cache
def tokens() -> TokenizedPool:
    found = tokenize_pool(PreferencePool.from_rows(ROWS), tiny_tokenizer(), max_length=None)
    kept = [row for row in range(len(found.items)) if row != 6]
    return TokenizedPool(
        [found.sequences[row] for row in kept], [], [found.items[row] for row in kept]
    )


def loop(model: nn.Module) -> torch.Tensor:
    return loop_gradients(model, tokens().sequences, trainable(model))[0]


def assert_captured(model: nn.Module, tolerance: float = 1e-9) -> None:
    """Rows and relative rows are the loop's, whatever shares a batch."""
    assert not trainable_parameters(model).others
    expected = loop(model)
    assert expected.any()
    for budget in (30, None):
        extractor = FeatureExtractor(model, EXACT, beta=1.0, max_tokens_per_batch=budget)
        found = extractor.gradients(tokens()).gradients
        assert extractor.check(tokens()) is Layout.SHARED
        assert relative_error(found, expected) <= tolerance
    apart = FeatureExtractor(model, EXACT, beta=1.0, verify=False, max_tokens_per_batch=60)
    assert relative_error(apart.gradients(tokens()).gradients, expected) <= tolerance


@pytest.mark.parametrize("name", CAPTURED)
def test_repeated_tokens_padding_and_batches(name: str) -> None:
    assert_captured(adapted(ADAPTERS[name]))


def test_trained_tokens_that_repeat() -> None:
    """In an order of their own, and the padding token, whose row has no gradient."""
    config = LoraConfig(**LORA, trainable_token_indices=[224, 1, 91])
    assert all({1, 91, 224} & set(sequence.input_ids) for sequence in tokens().sequences[:3])
    for tied in (True, False):
        assert_captured(adapted(config, tie_word_embeddings=tied))


@pytest.mark.parametrize("name", ["DoRA", "trainable tokens of LoRA", "norms in modules_to_save"])
def test_relative_rows(name: str) -> None:
    model = adapted(ADAPTERS[name])
    pool = tokenize_pool(
        PreferencePool.from_rows([row for row in ROWS if len(row["responses"]) > 1]),
        tiny_tokenizer(),
        max_length=None,
    )
    extractor = FeatureExtractor(model, EXACT, beta=1.0)
    expected, _ = loop_gradients(model, pool.sequences, trainable(model))
    first = torch.tensor([pool.items.index(item) for item in pool.items])
    found = extractor.gradients(pool, relative=True).gradients
    others = first != torch.arange(len(first))
    assert not found[~others].any()
    assert relative_error(found[others], (expected - expected[first])[others]) <= 1e-7


# -- whole models: norms with and without biases, of heads, Gemma's 1 + w, tied weights ------------


@pytest.mark.parametrize(
    ("arch", "tied"),
    slow_except(
        [("llama", False), ("gemma", True), ("gpt2", True), ("gpt_neox", False)],
        product(["llama", "gemma", "qwen", "gpt2", "gpt_neox"], [True, False]),
    ),
)
def test_full_fine_tuning(arch: str, tied: bool) -> None:
    model = tiny_causal_lm(arch, torch.float64, tie_word_embeddings=tied)
    if arch == "gpt2":
        model.transformer.wpe.requires_grad_(False)
    assert_captured(spread(model), GEMMAS if arch == "gemma" else 1e-9)


def test_norms_at_zero() -> None:
    """Nothing is divided by a weight."""
    for arch in ("llama", "gpt_neox"):
        model = tiny_causal_lm(arch, torch.float64)
        model.requires_grad_(False)
        for module in model.modules():
            if "Norm" in type(module).__name__:
                module.requires_grad_(True)
                module.weight.data[::3] = 0.0
        assert_captured(model)
    dora = adapted(ADAPTERS["DoRA"])
    for name, parameter in dora.named_parameters():
        if "magnitude" in name:
            parameter.data[::3] = 0.0
    assert_captured(dora)


def gemma3(**config: Any) -> Any:
    """Embeddings that scale, and norms of heads after heads and time have changed places."""
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(
        transformers.Gemma3TextConfig(**TINY_SIZES, tie_word_embeddings=False)
    )
    config = {**LORA, "task_type": "CAUSAL_LM", **config}
    return spread(get_peft_model(base, LoraConfig(**config)).double())


@pytest.mark.parametrize(
    "config",
    [
        dict(modules_to_save=["embed_tokens", "q_norm", "input_layernorm"]),
        dict(trainable_token_indices=[323, 343, 364]),
        dict(target_modules=["q_proj", "embed_tokens"]),
    ],
    ids=["modules_to_save", "trainable tokens", "LoRA"],
)
def test_embeddings_that_scale(config: dict[str, Any]) -> None:
    assert_captured(gemma3(**config), GEMMAS)


def test_dora_on_transposed_weights_and_on_the_head() -> None:
    assert_captured(lora(tiny_causal_lm("gpt2", torch.float64), "gpt2", use_dora=True))
    assert_captured(adapted(LoraConfig(r=4, target_modules=["q_proj", "lm_head"], use_dora=True)))


def test_two_adapters_at_once() -> None:
    model = adapted(ADAPTERS["DoRA"])
    model.add_adapter("other", LoraConfig(**LORA, use_dora=True, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])
    assert_captured(spread(model.double()))


def test_biases_that_dora_reads_are_from_autograd() -> None:
    """It takes them out of the output again: its calls of the layer do not show their gradient."""
    model = lora(tiny_causal_lm("gpt2", torch.float64), "gpt2", use_dora=True, bias="lora_only")
    kinds = trainable_parameters(model).others
    assert kinds and all(name.endswith("bias") for name in kinds)
    found = FeatureExtractor(model, EXACT, beta=1.0, verify=False).gradients(tokens()).gradients
    assert relative_error(found, loop(model)) <= 1e-9


# -- what rests with autograd ----------------------------------------------------------------------


class OddEmbedding(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids).tanh()


def test_an_embedding_with_its_own_forward_pass() -> None:
    model: Any = tiny_causal_lm("llama", torch.float64)
    model.model.embed_tokens.__class__ = OddEmbedding
    assert trainable_parameters(model).others == {"model.embed_tokens.weight": "OddEmbedding"}
    found = FeatureExtractor(model, EXACT, beta=1.0, verify=False).gradients(tokens()).gradients
    assert relative_error(found, loop(model)) <= 1e-9


def test_embeddings_that_look_at_the_batch() -> None:
    for option in ("max_norm", "scale_grad_by_freq"):
        model: Any = tiny_causal_lm("llama")
        setattr(model.model.embed_tokens, option, 1)
        assert trainable_parameters(model).others == {"model.embed_tokens.weight": "Embedding"}


def test_a_weight_that_an_adapter_reads_without_a_call() -> None:
    model = adapted(ADAPTERS["trainable tokens of LoRA"])
    layer = model.get_base_model().model.embed_tokens.token_adapter
    layer.base_layer.requires_grad_(True)
    assert list(trainable_parameters(model).others.values()) == ["Embedding"]
    found = FeatureExtractor(model, EXACT, beta=1.0, verify=False).gradients(tokens()).gradients
    assert relative_error(found, loop(model)) <= 1e-9


class LikeANorm(nn.Module):
    """Named like a norm, with a weight that mixes numbers: only the self-check finds out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.flip(0)


LikeANorm.__name__ = "OddRMSNorm"


def test_a_module_that_is_not_what_its_name_says(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_causal_lm("llama", torch.float64)
    model.requires_grad_(False)
    model.model.norm = LikeANorm(32).double()
    expected = loop(model)
    found = FeatureExtractor(model, EXACT, beta=1.0).gradients(tokens()).gradients
    assert relative_error(found, expected) <= 1e-9
    assert "self-check failed: the captured gradient of 'model.norm.weight'" in caplog.text


def test_calls_that_no_rule_fits_are_named() -> None:
    norm = nn.LayerNorm(8)
    layer = Elementwise(norm, {"weight": "n.weight"})
    with pytest.raises(ActiveDPOError, match="'n.weight'.*not one row for each of 2 × 3 tokens"):
        layer.seen(Call((torch.randn(6, 8),), {}, (2, 3)))
    rule = layer.seen(Call((torch.randn(1, 6, 8),), {}, (1, 6)))
    with pytest.raises(ActiveDPOError, match="several responses in one sequence; use verify=True"):
        rule(torch.randn(1, 6, 8), torch.tensor([[0, 2, 0], [2, 6, 1]]))


# -- sketches, the self-check and the model --------------------------------------------------------


def several() -> Any:
    """Embeddings by row and by column, magnitudes, norms, and linear layers."""
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "embed_tokens"],
        use_dora=False,
        modules_to_save=["norm", "lm_head"],
    )
    return adapted(config)


METHODS = ("sjlt", "rademacher", "kronecker")


# "several" has every kind of layer but DoRA's.
@pytest.mark.parametrize(
    ("name", "method"),
    slow_except(
        [
            ("several", "sjlt"),
            ("several", "rademacher"),
            ("several", "kronecker"),
            ("DoRA", "sjlt"),
        ],
        product(["several", "modules_to_save", "DoRA"], ["sjlt", "rademacher", "kronecker"]),
    ),
)
def test_sketches(method: str, name: str) -> None:
    model = several() if name == "several" else adapted(ADAPTERS[name])
    sketch = Sketch(method, 96, seed=5)
    parameters = trainable(model)
    whole = loop(model)
    expected = torch.zeros(len(whole), 96, dtype=torch.float64)
    for (full_name, parameter), part in zip(
        parameters.items(), whole.split([p.numel() for p in parameters.values()], 1), strict=True
    ):
        if method == "kronecker":
            part = part.view(len(whole), -1, parameter.shape[-1] if parameter.dim() > 1 else 1)
        key = sketch.key(canonical_name(full_name, "default"))
        expected += getattr(reference, method)(part, key, 96)
    extractor = FeatureExtractor(model, sketch, beta=1.0, max_tokens_per_batch=60)
    assert relative_error(extractor.gradients(tokens()).gradients, expected) <= 1e-9
    assert extractor.check(tokens()) is Layout.SHARED


@pytest.mark.parametrize("name", ["DoRA", "modules_to_save", "trainable tokens of LoRA"])
def test_response_tokens_alone(name: str) -> None:
    model = adapted(ADAPTERS[name])
    given = test_response_tokens.tokens_of()
    expected = test_response_tokens.loop(model, given.sequences)
    assert relative_error(test_response_tokens.extract(model, given), expected) <= 1e-9


@pytest.mark.parametrize("name", ["DoRA", "modules_to_save", "norms in modules_to_save"])
def test_half_precision(name: str) -> None:
    model = adapted(ADAPTERS[name], torch.float32)
    expected = loop(copy.deepcopy(model).double())
    single = FeatureExtractor(model, EXACT, beta=1.0)
    assert relative_error(single.gradients(tokens()).gradients, expected) <= 1e-5
    half = FeatureExtractor(copy.deepcopy(model).to(torch.bfloat16), EXACT, beta=1.0)
    assert relative_error(half.gradients(tokens()).gradients, expected) < 0.1
    assert half.check(tokens()) is not Layout.ALONE
    if any(has for kind, has in torch.cpu.get_capabilities().items() if kind.endswith("bf16")):
        mixed = FeatureExtractor(model, EXACT, beta=1.0, precision="bf16")
        assert 1e-5 < relative_error(mixed.gradients(tokens()).gradients, expected) < 0.1
        assert mixed.check(tokens()) is not Layout.ALONE


def test_dora_at_the_start_is_as_it_was_left() -> None:
    """B is zero then: A has no gradient, and is called for the norm all the same."""
    model = adapted(ADAPTERS["DoRA"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    before = {id(module): set(vars(module)) for module in model.modules()}
    assert_captured(model)
    assert before == {id(module): set(vars(module)) for module in model.modules()}
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_norms_of_dora_are_of_the_weights_now() -> None:
    model = adapted(ADAPTERS["DoRA"])
    extractor = FeatureExtractor(model, EXACT, beta=1.0)
    extractor.gradients(tokens())
    spread(model, seed=9)
    assert relative_error(extractor.gradients(tokens()).gradients, loop(model)) <= 1e-9


def test_large_gradients_are_compared_by_a_sketch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(check_plan, "_LARGE", 100)
    monkeypatch.setattr(check_plan, "_BLOCK", 64)
    model = several()
    plan = check_plan.CheckPlan(trainable_parameters(model).shapes)
    assert plan.dim <= 64 * len(plan.blocks)
    extractor = FeatureExtractor(model, EXACT, beta=1.0)
    assert extractor.check(tokens()) is Layout.SHARED and not caplog.records
    model = tiny_causal_lm("llama", torch.float64)
    model.requires_grad_(False)
    head = model.lm_head.requires_grad_(True)
    head.forward = lambda h: nn.functional.linear(h, head.weight) + 0.1 * h @ head.weight.T
    assert FeatureExtractor(model, EXACT).check(tokens()) is Layout.ALONE
    assert "the captured gradient of 'lm_head.weight' differs" in caplog.text


def test_nothing_is_said_of_captured_layers(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as said:
        FeatureExtractor(adapted(ADAPTERS["modules_to_save"]), EXACT).gradients(tokens())
    assert not caplog.records and not said
