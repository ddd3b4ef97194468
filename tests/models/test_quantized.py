"""Gradients through quantized layers. Packages that quantize are tried where they are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional

from activedpo_fast import ActiveDPOError, FeatureExtractor, PreferencePool, Sketch
from activedpo_fast.pool.tokens import TokenizedPool, tokenize_pool
from tests.support.gradients import loop_gradients, relative_error, trainable
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer

ROWS = [
    {"prompt": "What is a sketch? TL;DR:", "responses": [" a short projection", " a drawing"]},
    {"prompt": "Name the library. TL;DR:", "responses": [" this one", " the quick brown fox"]},
]
EXACT = Sketch("none")


def tokens() -> TokenizedPool:
    return tokenize_pool(PreferencePool.from_rows(ROWS), tiny_tokenizer(), max_length=None)


class RoundedInputs(nn.Linear):
    """As int8 dynamic quantization for inference: numbers are rounded, which has no gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return functional.linear((x * 64).round() / 64, self.weight, self.bias)


class RoundedStraightThrough(RoundedInputs):
    """The same, with a gradient as if nothing were rounded, as in quantization-aware training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain = functional.linear(x, self.weight, self.bias)
        return plain + (super().forward(x) - plain).detach()


def with_layers(kind: type[nn.Linear]) -> Any:
    model = tiny_causal_lm("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj.__class__ = kind
    return lora(model, "llama", target_modules=["q_proj", "up_proj"])


@pytest.mark.parametrize("verify", [True, False])
def test_a_layer_that_passes_no_gradient_back_is_refused(verify: bool) -> None:
    extractor = FeatureExtractor(with_layers(RoundedInputs), EXACT, verify=verify)
    with pytest.raises(ActiveDPOError, match=r"layers\.0\.mlp\.up_proj\S* \(RoundedInputs") as told:
        extractor.gradients(tokens())
    assert "passes no gradient back to its input" in str(told.value)
    assert "\n" not in str(told.value)
    with torch.no_grad():  # whatever the caller's mode
        with pytest.raises(ActiveDPOError, match="passes no gradient back"):
            extractor.check(tokens())
    assert extractor.logps(tokens()).isfinite().all()  # those need no gradient


def test_a_layer_that_rounds_and_passes_gradients_back_is_not_refused() -> None:
    model = with_layers(RoundedStraightThrough)
    expected, _ = loop_gradients(model, tokens().sequences, trainable(model))
    with torch.inference_mode():
        found = FeatureExtractor(model, EXACT, beta=1.0).gradients(tokens())
    assert relative_error(found.gradients, expected) < 0.1


def four_bits(folder: Path) -> Any:
    """A tiny Llama with 4-bit weights, several blocks a row; the dequantized one, in float64."""
    bnb = pytest.importorskip("bitsandbytes")
    sizes = dict(hidden_size=64, intermediate_size=128)
    tiny_causal_lm("llama", **sizes).save_pretrained(folder)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )
    plain = tiny_causal_lm("llama", **sizes)
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(weight)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    found = []
    for base in (model, plain):
        torch.manual_seed(1)
        adapted = get_peft_model(base, adapter)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05)
        found.append(adapted.eval())
    return found[0], found[1].double()


@pytest.mark.parametrize("verify", [True, False])
def test_four_bit_weights_have_the_gradients_of_the_dequantized_model(
    verify: bool, tmp_path: Path
) -> None:
    """Also after log-probs, a pass without gradients, in which bitsandbytes packs for inference."""
    model, dequantized = four_bits(tmp_path)
    expected, _ = loop_gradients(dequantized, tokens().sequences, trainable(dequantized))
    extractor = FeatureExtractor(model, EXACT, beta=1.0, verify=verify)
    extractor.logps(tokens())
    found = extractor.gradients(tokens()).gradients
    assert relative_error(found, expected) <= 1e-5
    assert not any(module.training for module in model.modules())


def test_weights_packed_for_inference_are_refused(tmp_path: Path) -> None:
    """Autograd's gradient would silently leave out all that is below such a layer."""
    bnb = pytest.importorskip("bitsandbytes")
    model, _ = four_bits(tmp_path)
    with torch.no_grad():
        model(torch.arange(5, 15)[None])
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    if not any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in layers):
        pytest.skip("bitsandbytes packs on CPUs with bfloat16 instructions only")
    with pytest.raises(ActiveDPOError, match="packed .* for inference.*call its train") as told:
        FeatureExtractor(model, EXACT).gradients(tokens())
    assert "\n" not in str(told.value)


def test_torchao_weights_alone_are_exact_and_quantized_inputs_refused(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    tiny_causal_lm("llama").save_pretrained(tmp_path)

    def quantized(config: Any) -> Any:
        base = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=transformers.TorchAoConfig(config), dtype=torch.float32
        )
        return lora(base, "llama")

    model = quantized(quantization.Int8WeightOnlyConfig())
    expected, _ = loop_gradients(model, tokens().sequences, trainable(model))
    found = FeatureExtractor(model, EXACT, beta=1.0).gradients(tokens()).gradients
    assert relative_error(found, expected) <= 1e-5
    with pytest.raises(ActiveDPOError, match="Int8Tensor.*passes no gradient back"):
        dynamic = quantized(quantization.Int8DynamicActivationInt8WeightConfig())
        FeatureExtractor(dynamic, EXACT).gradients(tokens())
