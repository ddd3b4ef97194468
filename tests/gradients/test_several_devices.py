"""Models whose layers are on several devices, as `device_map="auto"` places them."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from accelerate import dispatch_model
from peft import IA3Config, get_peft_model
from torch import nn

from activedpo_fast import FeatureExtractor, Sketch
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.batches import Layout
from activedpo_fast.pool.tokens import TokenizedPool, TokenizedResponse
from tests.support.devices import FIRST, SECOND, two_devices
from tests.support.models import lora, tiny_causal_lm
from tests.support.quick import slow_except

TOKENS = TokenizedPool(
    [
        TokenizedResponse([5, 6, 7, 8, 9], 3),
        TokenizedResponse([5, 6, 7, 10, 11, 12], 3),
        TokenizedResponse([20, 21, 22, 23, 24], 2),
        TokenizedResponse([20, 21, 30], 2),
    ],
    skipped=[],
    items=[0, 0, 1, 1],
    ids=["a", "b"],
)


def tiny() -> nn.Module:
    return tiny_causal_lm("llama", torch.float64)


def of_every_kind() -> nn.Module:
    """DoRA, a head of its own, norms and the embedding: each has another rule."""
    model = lora(tiny(), "llama", use_dora=True, modules_to_save=["lm_head"])
    for name, parameter in model.named_parameters():
        if "norm" in name or "embed_tokens" in name:
            parameter.requires_grad_()
    return model


def without_rules() -> nn.Module:
    """Its gradients are autograd's."""
    config = IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    )
    return get_peft_model(tiny(), config).double()


MODELS: dict[str, tuple[Callable[[], nn.Module], Layout]] = {
    "LoRA": (lambda: lora(tiny(), "llama"), Layout.SHARED),
    "every kind of layer": (of_every_kind, Layout.SHARED),
    "from autograd": (without_rules, Layout.ALONE),
}


def split(model: nn.Module) -> nn.Module:
    """Place the second layer and what follows on the second device, as accelerate does it."""
    places = {"model.embed_tokens": FIRST, "model.rotary_emb": FIRST, "model.layers.0": FIRST}
    places |= {"model.layers.1": SECOND, "model.norm": SECOND, "lm_head": SECOND}
    dispatch_model(model.get_base_model(), places, main_device=FIRST, skip_keys="past_key_values")
    return model


@pytest.mark.parametrize("kind", slow_except(["every kind of layer", "from autograd"], MODELS))
def test_features_are_those_of_one_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, layout = MODELS[kind]
    alone = FeatureExtractor(make(), Sketch("sjlt", 64))
    with two_devices(monkeypatch):
        split_up = FeatureExtractor(split(make()), Sketch("sjlt", 64))
        devices = {parameter.device for parameter in split_up.model.parameters()}
        found = split_up.gradients(TOKENS)
        hidden, logps = split_up.hidden(TOKENS), split_up.logps(TOKENS)
        assert split_up.check(TOKENS) is layout
    assert devices == {FIRST, SECOND}
    expected = alone.gradients(TOKENS)
    assert alone.check(TOKENS) is layout
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.logps, expected.logps, rtol=1e-10, atol=0)
    torch.testing.assert_close(hidden, alone.hidden(TOKENS))
    torch.testing.assert_close(logps, alone.logps(TOKENS), rtol=1e-10, atol=0)


def test_devices_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests rest on: a mistake would be seen."""
    with two_devices(monkeypatch):
        one, other = torch.ones(3, device=FIRST), torch.ones(3).to(SECOND)
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            one + other
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            one.index_select(0, torch.tensor([0]))
        assert (one + other.to(FIRST)).device == FIRST
        assert one[torch.tensor([0])].device == FIRST


def test_batches_fit_the_device_with_the_least_room(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with two_devices(monkeypatch):
        FeatureExtractor(split(MODELS["LoRA"][0]()), Sketch("sjlt", 64)).gradients(TOKENS)
    said = {record.args[2] for record in caplog.records if "per token" in record.msg}
    assert said == {FIRST, SECOND}


def test_a_cuda_graph_that_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = FeatureExtractor(MODELS["LoRA"][0](), Sketch("sjlt", 64))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ActiveDPOError, match=r"CUDA graph .* outside of torch\.cuda\.graph"):
        extractor.gradients(TOKENS)
