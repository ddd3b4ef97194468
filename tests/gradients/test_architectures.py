"""Architectures whose layers see tokens in an unusual way, captured on real tiny models of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from activedpo_fast import ActiveDPOError, FeatureExtractor
from activedpo_fast.gradients.batches import Layout
from activedpo_fast.gradients.hooks import _which_tokens
from activedpo_fast.gradients.layers import Call, TrainableLinear
from activedpo_fast.gradients.trainable import trainable_parameters
from activedpo_fast.models.adapters import causal_lm
from tests.gradients.test_response_tokens import loop as loop_of_responses
from tests.gradients.test_supported import (
    EXACT,
    LATENT,
    SIZES,
    a_model,
    adapted,
    assert_refused,
    tokens,
)
from tests.support.adapters import LORA
from tests.support.adapters import adapted as adapted_llama
from tests.support.gradients import loop_gradients, relative_error, trainable
from tests.support.models import lora, tiny_causal_lm


def assert_captured(model: Any, layout: Layout, *, tolerance: float = 2e-5) -> None:
    """By hooks, in this layout, with the rows of the plain loop; without the self-check too."""
    expected, logps = loop_gradients(model, tokens().sequences, trainable(model))
    assert not trainable_parameters(model).others
    for verify in (True, False):
        extractor = FeatureExtractor(model, EXACT, beta=1.0, verify=verify)
        if verify:
            assert extractor.check(tokens()) is layout
            assert not extractor._layouts._failed
        found = extractor.gradients(tokens())
        assert relative_error(found.gradients, expected) < tolerance
        torch.testing.assert_close(found.logps, logps.double(), rtol=1e-5, atol=0)


# -- keys and values that are kept compressed -----------------------------------------------------

ATTENTION = ["kv_b_proj", "kv_a_proj_with_mqa", "q_a_proj", "o_proj"]


@pytest.mark.parametrize("name", ["DeepseekV2", "DeepseekV3", "MiniCPM3", "Glm4MoeLite", "Youtu"])
def test_latent_attention(name: str) -> None:
    """A response's pass applies `kv_b_proj` to the prompt's tokens again."""
    model = adapted(a_model(f"{name}ForCausalLM", f"{name}Config", **LATENT), ATTENTION)
    assert_captured(model, Layout.SHARED)


def test_latent_attention_relative_to_the_first_response() -> None:
    model = adapted(a_model("MiniCPM3ForCausalLM", "MiniCPM3Config", **LATENT), ATTENTION)
    expected, _ = loop_gradients(model, tokens().sequences, trainable(model))
    first = torch.tensor([tokens().items.index(item) for item in tokens().items])
    extractor = FeatureExtractor(model, EXACT, beta=1.0)
    found = extractor.gradients(tokens(), relative=True).gradients
    error = (found - (expected - expected[first])).norm(dim=1) / expected.norm(dim=1)
    assert float(error.max()) < 1e-5


def test_latent_attention_with_constant_prompts() -> None:
    """What `kv_b_proj` makes of the prompt's tokens is a constant then, in every layer."""

    def model() -> Any:
        return adapted(a_model("MiniCPM3ForCausalLM", "MiniCPM3Config", **LATENT), ATTENTION)

    extractor = FeatureExtractor(model(), EXACT, beta=1.0, gradient="response_tokens")
    assert extractor.check(tokens()) is Layout.APART
    found = extractor.gradients(tokens()).gradients

    reference = model().double()
    cut = {len(s.input_ids): s.completion_start - 1 for s in tokens().sequences}
    for _, module in reference.named_modules():
        if type(module).__name__ == "MiniCPM3Attention":
            module.kv_b_proj.register_forward_hook(
                # Only a response's pass has gradients; its input is [1, 1, prompt + response, n].
                lambda module, inputs, output: (
                    torch.cat(
                        [output[:, :, : (at := cut[output.shape[2]])].detach(), output[:, :, at:]],
                        dim=2,
                    )
                    if torch.is_grad_enabled()
                    else output
                )
            )
    assert relative_error(found, loop_of_responses(reference, tokens().sequences)) < 1e-5


def test_which_shapes_have_one_row_for_each_token() -> None:
    of_either = ((3, 6), (3, 8))
    for shape in ((3, 6), (18,), (1, 18), (3, 1, 6), (3, 2, 3)):
        assert _which_tokens(torch.zeros(*shape, 4), of_either) == 0
    for shape in ((3, 8), (3, 1, 8), (24,)):
        assert _which_tokens(torch.zeros(*shape, 4), of_either) == 1
    layer = TrainableLinear(nn.Linear(4, 4), "a layer", None)
    for shape in ((6, 3), (2, 3, 3), (3, 7), (17,)):
        states = torch.zeros(*shape, 4)
        with pytest.raises(ActiveDPOError, match=r"each of 3 × 6 tokens \(shape"):
            layer.seen(Call((states,), {}, of_either[_which_tokens(states, of_either)]))


# -- layers that are called without the tokens that need no logits --------------------------------

GEMMA4: dict[str, Any] = dict(
    SIZES,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=SIZES["vocab_size"],
    num_hidden_layers=4,
    num_kv_shared_layers=2,
    layer_types=["sliding_attention", "full_attention"] * 2,
    sliding_window=16,
    global_head_dim=8,
)
MODERNBERT: dict[str, Any] = dict(SIZES, cls_token_id=0, sep_token_id=0, local_attention=8)
LFM2: dict[str, Any] = dict(SIZES, layer_types=["conv", "full_attention"], block_ff_dim=32)


@pytest.mark.parametrize(
    ("name", "config", "options", "targets", "layout"),
    [
        ("Gemma4", "Gemma4TextConfig", GEMMA4, ["q_proj", "o_proj", "up_proj"], Layout.SHARED),
        ("ModernBertDecoder", "ModernBertDecoderConfig", MODERNBERT, ["dense"], Layout.SHARED),
        ("ModernBertDecoder", "ModernBertDecoderConfig", MODERNBERT, ["decoder"], Layout.SHARED),
        ("Lfm2", "Lfm2Config", LFM2, ["in_proj", "q_proj", "lm_head"], Layout.WHOLE),
    ],
)
def test_layers_that_leave_tokens_out(
    name: str, config: str, options: dict[str, Any], targets: list[str], layout: Layout
) -> None:
    model = adapted(a_model(f"{name}ForCausalLM", config, **options), targets)
    assert_captured(model, layout)


def test_hidden_states_before_a_head_of_several_layers() -> None:
    model = a_model("ModernBertDecoderForCausalLM", "ModernBertDecoderConfig", **MODERNBERT)
    expected = [
        model.model(input_ids=torch.tensor([sequence.input_ids])).last_hidden_state[0, -1]
        for sequence in tokens().sequences
    ]
    for verify in (True, False):
        found = FeatureExtractor(model, EXACT, verify=verify).hidden(tokens())
        torch.testing.assert_close(found, torch.stack(expected).detach(), rtol=1e-4, atol=1e-5)


# -- sparse attention -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DeepseekV32", "GlmMoeDsa"])
@pytest.mark.parametrize("kept", [4, 64])
def test_sparse_attention(name: str, kept: int) -> None:
    """Which of equal keys are kept depends on padding; if all are kept, batches are right."""
    options = dict(LATENT, index_topk=kept, index_n_heads=2, index_head_dim=8)
    model = adapted(a_model(f"{name}ForCausalLM", f"{name}Config", **options), ATTENTION)
    longest = max(len(sequence.input_ids) for sequence in tokens().sequences)
    assert 4 < longest < 64
    assert_captured(model, Layout.ALONE if kept < longest else Layout.WHOLE)
    extractor = FeatureExtractor(model, EXACT, verify=False)
    _, expected = loop_gradients(model, tokens().sequences, trainable(model))
    torch.testing.assert_close(extractor.logps(tokens()), expected.double(), rtol=1e-5, atol=0)


# -- heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [dict(modules_to_save=["lm_head"]), dict(target_modules=["q_proj", "lm_head"])],
    ids=["copied", "LoRA"],
)
def test_trained_heads(tied: bool, options: dict[str, Any]) -> None:
    """PEFT gives a head that is tied to the embedding a copy, or LoRA beside the shared weight."""
    config = LoraConfig(**{**LORA, **options})
    model = adapted_llama(config, tie_word_embeddings=tied)
    assert_captured(model, Layout.SHARED, tolerance=1e-9)


# -- Unsloth --------------------------------------------------------------------------------------


def _unsloths(name: str, module: str) -> Any:
    """A function as Unsloth puts in place of others. Unsloth itself is not a test dependency: what
    is tested is that a function with its `__module__` or its name is recognized."""

    def function(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was run")

    function.__module__, function.__name__ = module, name
    return function


@pytest.mark.parametrize("where", ["an attribute", "a method of a module", "a method of a class"])
def test_unsloths_kernels(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(tiny_causal_lm("llama"), "llama")
    layer: Any = causal_lm(model).get_submodule("model.layers.1")
    if where == "an attribute":
        layer.self_attn.apply_qkv = _unsloths("apply_lora_qkv", "unsloth.kernels.fast_lora")
        message = r"layers\.1\.self_attn runs Unsloth's 'apply_lora_qkv'"
    elif where == "a method of a module":
        fused = _unsloths("apply_lora_mlp_swiglu", "unsloth.kernels.fast_lora")
        layer.mlp.forward = fused.__get__(layer.mlp)
        message = r"layers\.1\.mlp runs Unsloth's 'apply_lora_mlp_swiglu'"
    else:
        compiled = _unsloths("unsloth_forward", "Linear_peft_forward")
        monkeypatch.setattr(type(layer.self_attn.q_proj), "forward", compiled)
        message = r"q_proj runs Unsloth's 'unsloth_forward'"
    assert_refused(model, f"{message}.*save the adapter, and load", gradients_only=True)
