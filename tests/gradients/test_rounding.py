"""Models that round their activations further than their weights' dtype says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from activedpo_fast import FeatureExtractor, PreferencePool, Sketch
from activedpo_fast.gradients.batches import Layout, collate, group_rows
from activedpo_fast.gradients.rounding import disturbed, rounds_its_activations
from activedpo_fast.pool.tokens import TokenizedPool, tokenize_pool
from tests.support.gradients import loop_gradients, relative_error, trainable
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer

ROWS = [
    {
        "prompt": "What is a sketch? TL;DR:",
        "responses": [" a short random projection", " a drawing"],
    },
    {"prompt": "Name the library. TL;DR:", "responses": [" this one", " the quick brown fox"]},
]
EXACT = Sketch("none")


def tokens() -> TokenizedPool:
    return tokenize_pool(PreferencePool.from_rows(ROWS), tiny_tokenizer(), max_length=None)


class Int8Dynamic(nn.Linear):
    """As torchao's int8 dynamic activation quantization: a scale for each token."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.detach().abs().amax(-1, keepdim=True) / 127
        quantized = (x.detach() / scale).round().to(torch.int8)
        rounded = quantized.to(x.dtype) * scale
        return functional.linear(x + (rounded - x).detach(), self.weight)


class HalfInside(nn.Linear):
    """As a quantized weight that computes in bfloat16, or autocast in a model's own `forward`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).to(x.dtype)


class Int4Weights(nn.Linear):
    """Weights in integers alone: what is computed with them is in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "packed"):
            self.step = self.weight.detach().abs().max() / 7
            self.packed = (self.weight.detach() / self.step).round().to(torch.int32)
        return functional.linear(x, self.packed.to(torch.int8).to(x.dtype) * self.step)


def quantized(kind: type[nn.Linear] | None, **sizes: int) -> Any:
    base = tiny_causal_lm("llama", **{"num_hidden_layers": 6, **sizes})
    for module in base.model.modules():
        if kind is not None and isinstance(module, nn.Linear):
            module.__class__ = kind
    model = lora(base, "llama")
    model(input_ids=torch.tensor([[1, 2]]))  # packs weights
    return model


def first(pool: TokenizedPool) -> Any:
    return collate(pool, group_rows(pool, [0], Layout.ALONE), pad_token_id=0)


@pytest.mark.parametrize("kind", [None, Int4Weights, Int8Dynamic, HalfInside])
def test_which_models_round_their_activations(kind: type[nn.Linear] | None) -> None:
    rounds = kind in (Int8Dynamic, HalfInside)
    assert rounds_its_activations(quantized(kind), first(tokens())) == rounds


def test_a_disturbance_is_of_the_size_of_rounding() -> None:
    model = tiny_causal_lm("llama")
    ids = torch.tensor([tokens().sequences[0].input_ids])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with disturbed(model):
            other = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, plain)
    assert 1e-8 < float((other - plain).norm() / plain.norm()) < 1e-5


@pytest.mark.parametrize("kind", [Int8Dynamic, pytest.param(HalfInside, marks=pytest.mark.slow)])
def test_rounding_does_not_make_them_slow(kind: type[nn.Linear]) -> None:
    """A batch rounds other numbers up than a response alone does, and is no less right."""
    model = quantized(kind)
    expected, logps = loop_gradients(model, tokens().sequences, trainable(model))
    extractor = FeatureExtractor(model, EXACT, beta=1.0)
    assert extractor.check(tokens()) is Layout.SHARED
    found = extractor.gradients(tokens())
    # In a model as small as this, int8 may round every number as it does alone.
    least = 1e-3 if kind is HalfInside else 0
    assert least < relative_error(found.gradients, expected) < 0.03
    torch.testing.assert_close(extractor.logps(tokens()), logps.double(), rtol=2e-3, atol=0)
    assert extractor._layouts._forward[model][0] is Layout.SHARED


class ReadElsewhere(Int8Dynamic):
    """Its weight also acts where no hook sees it: an error of the size of a token's part."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.2 * functional.linear(x.roll(1, -1), self.weight)


def test_errors_are_still_found(caplog: pytest.LogCaptureFixture) -> None:
    model = quantized(Int8Dynamic)
    model.requires_grad_(False)
    wrong = model.get_base_model().model.layers[2].mlp.gate_proj
    wrong.__class__ = ReadElsewhere
    wrong.weight.requires_grad_(True)
    expected, _ = loop_gradients(model, tokens().sequences, trainable(model))
    extractor = FeatureExtractor(model, EXACT, beta=1.0)
    assert extractor.check(tokens()) is Layout.ALONE
    assert "gradients are from autograd" in caplog.text
    assert relative_error(extractor.gradients(tokens()).gradients, expected) < 1e-5


def test_other_models_keep_their_tolerance(caplog: pytest.LogCaptureFixture) -> None:
    """Int4 weights round nothing: an error of 1% is not taken for rounding."""

    class Small(Int4Weights):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 0.01 * functional.linear(x.roll(1, -1), self.weight)

    model = quantized(Int4Weights)
    model.requires_grad_(False)
    wrong = model.get_base_model().model.layers[2].mlp.gate_proj
    wrong.__class__ = Small
    wrong.weight.requires_grad_(True)
    assert FeatureExtractor(model, EXACT).check(tokens()) is Layout.ALONE
    assert "(allowed 1e-03)" in caplog.text
