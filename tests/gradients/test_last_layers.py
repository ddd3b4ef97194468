"""Rows of the last decoder layers, against those columns of the whole gradient in float64."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from activedpo_fast import (
    ActiveDPOError,
    ActiveDPOSelector,
    FeatureExtractor,
    PreferencePool,
    Sketch,
)
from activedpo_fast.gradients.batches import Layout
from activedpo_fast.gradients.sketch import SketchPlan
from activedpo_fast.gradients.trainable import trainable_parameters
from tests.gradients.test_any_parameter import CalledAndRead
from tests.gradients.test_response_tokens import ROWS, tokens_of
from tests.gradients.test_response_tokens import loop as loop_of_responses
from tests.support.encoder_decoder import MODELS
from tests.support.gradients import loop_gradients, relative_error, trainable
from tests.support.models import ARCHS, lora, tiny_causal_lm, tiny_tokenizer
from tests.support.quick import slow_except

EXACT = Sketch("none")
GRADIENTS = ("all_tokens", "response_tokens")
LAYERS = 3


def adapted(arch: str = "llama", **config: Any) -> nn.Module:
    base = tiny_causal_lm(arch, torch.float64, num_hidden_layers=LAYERS)
    return lora(base, arch, **config)


def layer_of(name: str) -> int:
    """The number of the decoder layer in a parameter's name; -1 outside of the layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def whole_gradient(model: nn.Module, gradient: str) -> torch.Tensor:
    sequences = tokens_of().sequences
    if gradient == "response_tokens":
        return loop_of_responses(model, sequences)
    return loop_gradients(model, sequences, trainable(model))[0]


def of_last(model: nn.Module, rows: torch.Tensor, count: int) -> torch.Tensor:
    """The columns of `rows` of the parameters in the last layers."""
    kept = [
        torch.full((parameter.numel(),), layer_of(name) >= LAYERS - count)
        for name, parameter in trainable(model).items()
    ]
    return rows[:, torch.cat(kept)]


@pytest.mark.parametrize(
    ("arch", "gradient"),
    slow_except(
        [*product(["llama"], GRADIENTS), ("gpt2", "all_tokens"), ("mixtral", "response_tokens")],
        product(ARCHS, GRADIENTS),
    ),
)
def test_rows_are_columns_of_the_whole_gradient(arch: str, gradient: str) -> None:
    model, tokens = adapted(arch), tokens_of()
    whole = whole_gradient(model, gradient)
    allowed = 1e-9
    if arch == "gemma2":  # in float64 its padding is NaN in batches
        model, allowed = model.float(), 1e-5
    for count in range(1, LAYERS + 1):
        extractor = FeatureExtractor(
            model, EXACT, beta=1.0, gradient=gradient, last_layers=count, max_tokens_per_batch=160
        )
        apart = gradient == "response_tokens"
        assert extractor.check(tokens) is (Layout.APART if apart else Layout.SHARED)
        found = extractor.gradients(tokens).gradients
        assert relative_error(found, of_last(model, whole, count)) <= allowed
    assert found.shape[1] == whole.shape[1]  # all layers have all of LoRA's matrices


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_relative_rows_and_means(gradient: str) -> None:
    model, tokens = adapted(), tokens_of()
    expected = of_last(model, whole_gradient(model, gradient), 2)
    extractor = FeatureExtractor(
        model, EXACT, beta=1.0, gradient=gradient, last_layers=2, length_normalized=True
    )
    lengths = extractor.lengths(tokens)
    assert lengths is not None
    expected = expected / lengths[:, None]
    first = torch.tensor([tokens.items.index(item) for item in tokens.items])
    found = extractor.gradients(tokens, relative=True).gradients
    others = first != torch.arange(len(first))
    assert not found[~others].any()
    assert relative_error(found[others], (expected - expected[first])[others]) <= 1e-7


@pytest.mark.parametrize("method", ["sjlt", "rademacher", "kronecker"])
def test_sketches_have_the_keys_of_the_whole_gradient(method: str) -> None:
    """What other parameters add is the rest of the row of all."""
    model, tokens, sketch = adapted(), tokens_of(), Sketch(method, 64, seed=3)
    plan = SketchPlan(sketch, trainable_parameters(model).shapes)
    whole = whole_gradient(model, "all_tokens")
    parts: dict[bool, torch.Tensor] = {}
    for upper in (False, True):
        parts[upper] = torch.zeros(len(whole), 64, dtype=torch.float64)
        column = 0
        for name, parameter in trainable_parameters(model).by_name.items():
            block = whole[:, column : column + parameter.numel()].unflatten(1, parameter.shape)
            column += parameter.numel()
            if (layer_of(name) == LAYERS - 1) is upper:
                plan.add_formed(parts[upper], [(name, block)], torch.arange(len(whole)))
    found, everything = (
        FeatureExtractor(model, sketch, beta=1.0, last_layers=layers).gradients(tokens).gradients
        for layers in (1, None)
    )
    assert relative_error(found, parts[True]) <= 1e-9
    assert relative_error(everything - found, parts[False]) <= 1e-9


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_nothing_below_is_differentiated(gradient: str) -> None:
    model, tokens = adapted(), tokens_of()
    seen: dict[int, set[bool]] = {}
    for number, layer in enumerate(model.base_model.model.model.layers):

        def record(module: nn.Module, inputs: Any, output: Any, number: int = number) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            seen.setdefault(number, set()).add(hidden.requires_grad)

        layer.register_forward_hook(record)
    FeatureExtractor(model, EXACT, gradient=gradient, last_layers=1).gradients(tokens)
    assert seen[0] == seen[1] == {False}
    assert True in seen[LAYERS - 1]


# kind of model -> (config, its trained parameters outside of the layers that count)
OUTSIDE: dict[str, tuple[dict[str, Any], set[str]]] = {
    "LlamaConfig": ({"num_key_value_heads": 2}, {"model.norm.weight", "lm_head.weight"}),
    # The head has the embedding's weight.
    "GPT2Config": ({}, {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
    # Attributes stand in another order than they are called in.
    "OPTConfig": (
        {"ffn_dim": 48, "word_embed_proj_dim": 16},
        {
            "model.decoder.project_out.weight",
            "model.decoder.final_layer_norm.weight",
            "model.decoder.final_layer_norm.bias",
        },
    ),
    # The embedding has a norm of its own.
    "BloomConfig": ({"n_head": 4}, {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
}


@pytest.mark.parametrize("config", OUTSIDE)
def test_what_runs_after_the_layers_counts(config: str) -> None:
    own, expected = OUTSIDE[config]
    sizes = dict(vocab_size=384, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4)
    special = dict(bos_token_id=0, eos_token_id=0, pad_token_id=1)
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**sizes, **special, **own)
    )
    model.double().eval()
    tokens, names = tokens_of(), list(trainable(model))
    kept = [name for name in names if layer_of(name) == LAYERS - 1 or name in expected]
    assert list(trainable_parameters(model, 1).by_name) == kept
    whole, _ = loop_gradients(
        model, tokens.sequences, {name: trainable(model)[name] for name in kept}
    )
    found = FeatureExtractor(model, EXACT, beta=1.0, last_layers=1).gradients(tokens).gradients
    # Eager attention computes its softmax in float32.
    assert relative_error(found, whole) <= (1e-9 if config == "LlamaConfig" else 1e-5)


def test_adapters_of_the_head_count_and_those_of_the_embedding_do_not() -> None:
    model = adapted(target_modules=["q_proj", "lm_head", "embed_tokens"])
    names = trainable_parameters(model, 1).by_name
    assert {layer_of(name) for name in names} == {LAYERS - 1, -1}
    assert {name.split(".")[-3] for name in names} == {"q_proj", "lm_head"}
    model = get_peft_model(
        tiny_causal_lm("llama", torch.float64, num_hidden_layers=LAYERS),
        LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["norm", "embed_tokens"]),
    )
    outside = [name for name in trainable_parameters(model, 2).by_name if layer_of(name) < 0]
    assert outside == ["base_model.model.model.norm.modules_to_save.weight"]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_decoders_of_encoder_decoder_models(name: str) -> None:
    config, own, targets = MODELS[name]
    model: Any = transformers.AutoModelForSeq2SeqLM.from_config(
        getattr(transformers, config)(**own)
    )
    model = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    names = list(trainable_parameters(model, 1).by_name)
    layers = "decoder.block.1." if name == "t5" else "decoder.layers.1."
    assert names and all(layers in name for name in names)


def test_the_self_check_is_about_these_parameters() -> None:
    model = tiny_causal_lm("llama", torch.float64, num_hidden_layers=LAYERS)
    model.model.layers[0].self_attn.o_proj.__class__ = CalledAndRead
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.o_proj.requires_grad_(True)
    tokens = tokens_of()
    whole = whole_gradient(model, "all_tokens")
    rows = FeatureExtractor(model, EXACT, beta=1.0, last_layers=1)
    assert rows.check(tokens) is Layout.SHARED
    assert relative_error(rows.gradients(tokens).gradients, of_last(model, whole, 1)) <= 1e-9
    rows = FeatureExtractor(model, EXACT, beta=1.0, last_layers=LAYERS)
    assert rows.check(tokens) is Layout.ALONE
    assert relative_error(rows.gradients(tokens).gradients, whole) <= 1e-9


def test_the_self_check_of_both_stages_is_remembered() -> None:
    model, pool = adapted(), PreferencePool.from_rows(ROWS)
    selector = ActiveDPOSelector(
        model.float(), tiny_tokenizer(), proj_dim=64, preselect=1, last_layers=1
    )
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].numel())
    )
    counts = []
    for _ in range(3):
        seen.clear()
        selector.select(pool, 1)
        counts.append(sum(seen))
    assert counts[0] > counts[1] == counts[2]
    assert selector.extractor.last_layers is None


def test_refusals() -> None:
    model = adapted()
    for wrong in (0, True, "1", 1.0):
        with pytest.raises(ActiveDPOError, match="last_layers must be an integer from 1, not"):
            FeatureExtractor(model, EXACT, last_layers=wrong)
    message = "last_layers: 4, and LlamaForCausalLM has 3 decoder layers"
    with pytest.raises(ActiveDPOError, match=message):
        FeatureExtractor(model, EXACT, last_layers=4)
    options: dict[str, Any] = {"processing_class": tiny_tokenizer(), "last_layers": 4}
    for others in ({}, {"preselect": 2}):
        with pytest.raises(ActiveDPOError, match=message):
            ActiveDPOSelector(model, **options, **others)
    with pytest.raises(ActiveDPOError, match="last_layers: 0 is below 1"):
        ActiveDPOSelector(model, **{**options, "last_layers": 0})
    below = adapted(layers_to_transform=[0, 1])
    with pytest.raises(
        ActiveDPOError, match="none of the 24 trainable parameters is in the last 1"
    ):
        FeatureExtractor(below, EXACT, last_layers=1).gradients(tokens_of())


def test_a_model_without_one_list_of_layers_is_refused() -> None:
    """XLM has a list of attentions, one of norms, and so on."""
    config = transformers.XLMConfig(
        vocab_size=384, emb_dim=32, n_layers=2, n_heads=4, causal=True, pad_index=1
    )
    model = transformers.XLMWithLMHeadModel(config)
    with pytest.raises(ActiveDPOError, match="XLMWithLMHeadModel has no single list"):
        trainable_parameters(model, 1)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_trained_tokens_of_a_tied_embedding_are_below(arch: str) -> None:
    """PEFT's embedding and head share them: like a tied weight, they are not the last layers'."""
    for tied in (False, True):
        base = tiny_causal_lm(arch, num_hidden_layers=LAYERS, tie_word_embeddings=tied)
        model = lora(base, arch, trainable_token_indices=[5, 20])
        assert any("trainable_tokens" in name for name in trainable_parameters(model).by_name)
        names = trainable_parameters(model, 1).by_name
        assert names and all(layer_of(name) == LAYERS - 1 for name in names)
