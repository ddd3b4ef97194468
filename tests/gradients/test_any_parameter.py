"""Gradients of any trainable parameter, captured or from autograd, against the plain loop."""

from __future__ import annotations

import copy
import logging
from functools import lru_cache
from itertools import product
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from activedpo_fast import ActiveDPOError, ActiveDPOSelector, PreferencePool
from activedpo_fast.gradients.batches import Layout
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.sketch import Sketch, canonical_name
from activedpo_fast.gradients.trainable import trainable_parameters
from activedpo_fast.ops import reference
from activedpo_fast.pool.tokens import TokenizedPool, tokenize_pool
from tests.support.adapters import ADAPTERS, CAPTURED, LORA, adapted, spread
from tests.support.gradients import loop_gradients, relative_error, trainable
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer
from tests.support.quick import slow_except

ROWS = [
    {"prompt": "What is a sketch? TL;DR:", "responses": [" a short projection", " no idea"]},
    {"prompt": "Name the library. TL;DR:", "responses": [" this one", " quick brown fox", " x"]},
]
EXACT = Sketch("none")


@lru_cache
def tokens() -> TokenizedPool:
    return tokenize_pool(PreferencePool.from_rows(ROWS), tiny_tokenizer(), max_length=None)


def defined(
    model: nn.Module, sketch: Sketch, beta: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of the sketch, applied to the gradients of the plain loop; and log π."""
    parameters = trainable(model)
    whole, logps = loop_gradients(model, tokens().sequences, parameters)
    if sketch.dim is None:
        return beta * whole, logps
    rows = torch.zeros(len(whole), sketch.dim, dtype=torch.float64)
    for (name, parameter), part in zip(
        parameters.items(), whole.split([p.numel() for p in parameters.values()], 1), strict=True
    ):
        if sketch.method == "kronecker":
            columns = parameter.shape[-1] if parameter.dim() > 1 else 1
            part = part.view(len(whole), -1, columns)
        key = sketch.key(canonical_name(name, "default"))
        rows += getattr(reference, sketch.method)(part, key, sketch.dim)
    return beta * rows, logps


def assert_exact(model: nn.Module, *, by_hooks: bool = False, sketch: Sketch = EXACT) -> None:
    """The rows are the loop's, with the self-check and without."""
    expected, logps = defined(model, sketch, beta=0.3)
    assert expected.any()
    assert (not trainable_parameters(model).others) == by_hooks
    for verify in (True, False):
        extractor = FeatureExtractor(model, sketch, beta=0.3, verify=verify)
        found = extractor.gradients(tokens())
        assert found.gradients.dtype == torch.float64
        assert relative_error(found.gradients, expected) <= 1e-9
        torch.testing.assert_close(found.logps, logps, rtol=1e-10, atol=0)
        layout = (Layout.SHARED if verify else Layout.WHOLE) if by_hooks else Layout.ALONE
        assert extractor.check(tokens()) is layout


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name: str) -> None:
    assert_exact(adapted(ADAPTERS[name]), by_hooks=name in CAPTURED)


def test_a_frozen_magnitude() -> None:
    """DoRA also calls A and B for the norm of the whole weight, which is no token."""
    model = adapted(ADAPTERS["DoRA"])
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.requires_grad_(False)
    assert_exact(model, by_hooks=True)


def test_linear_layers_in_modules_to_save_are_captured() -> None:
    assert_exact(adapted(LoraConfig(**LORA, modules_to_save=["lm_head"])), by_hooks=True)


@pytest.mark.parametrize(
    ("arch", "tied"),
    slow_except(
        [("llama", True), ("gpt2", True), ("mixtral", False)],
        product(["llama", "gpt2", "mixtral"], [True, False]),
    ),
)
def test_full_fine_tuning(arch: str, tied: bool) -> None:
    """A weight that two modules share has one gradient, the sum of both."""
    model = tiny_causal_lm(arch, torch.float64, tie_word_embeddings=tied)
    # GPT-2 embeds positions, Mixtral has fused experts.
    assert_exact(model, by_hooks=arch == "llama")
    assert len(trainable_parameters(model).by_name) == len(list(model.parameters()))


def test_a_shared_head_alone() -> None:
    model = tiny_causal_lm("gpt2", torch.float64, tie_word_embeddings=True)
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    assert_exact(model, by_hooks=True)


def test_tied_embeddings_with_adapters() -> None:
    for config in (
        LoraConfig(**LORA, trainable_token_indices=[323, 364]),
        LoraConfig(**LORA, modules_to_save=["embed_tokens"]),
        LoraConfig(**LORA, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ):
        assert_exact(adapted(config, tie_word_embeddings=True), by_hooks=True)


# -- experts --------------------------------------------------------------------------------------

EXPERTS: dict[str, Any] = dict(
    vocab_size=384,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=16,
    moe_intermediate_size=16,
    num_experts=8,
    num_local_experts=8,
    num_experts_per_tok=2,
    pad_token_id=1,
)


def experts_lm(name: str, implementation: str = "eager") -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**EXPERTS)
    model = transformers.AutoModelForCausalLM.from_config(
        config, experts_implementation=implementation
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4.0)
    return model.eval()


@pytest.mark.parametrize("name", slow_except(["Mixtral"], ["Mixtral", "Qwen3Moe", "Olmoe"]))
@pytest.mark.parametrize(
    "config",
    [
        dict(target_modules="all-linear"),
        dict(
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
    ],
    ids=["all-linear", "target_parameters"],
)
def test_lora_on_fused_experts(name: str, config: dict[str, Any]) -> None:
    model = get_peft_model(
        experts_lm(name).double(), LoraConfig(r=2, task_type="CAUSAL_LM", **config)
    )
    assert_exact(spread(model.double()))


def test_an_expert_without_a_token_has_no_gradient() -> None:
    model = experts_lm("Qwen3Moe").double()
    model.requires_grad_(False)
    model.model.layers[1].mlp.experts.down_proj.requires_grad_(True)
    assert_exact(model)
    found = FeatureExtractor(model, EXACT).gradients(tokens()).gradients
    by_expert = found.view(len(found), EXPERTS["num_experts"], -1).norm(dim=2)
    assert (by_expert == 0).any() and (by_expert > 0).any()


class RoutedLinears(nn.Module):
    """An MLP whose experts are linear layers, called with the tokens routed to them alone."""

    def __init__(self, width: int, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)
        weights, chosen = self.router(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            tokens_of = (chosen == number).nonzero().squeeze(1).flip(0)  # in another order
            if len(tokens_of):
                out[tokens_of] = expert(flat[tokens_of]) * weights[tokens_of, None]
        return out.view_as(x)


def test_experts_that_are_linear_layers(caplog: pytest.LogCaptureFixture) -> None:
    base = tiny_causal_lm("llama", torch.float64)
    torch.manual_seed(2)
    for layer in base.model.layers:
        layer.mlp = RoutedLinears(32).double()
    targets = r".*(q_proj|experts\.\d)"
    model = lora(base, "llama", target_modules=targets)
    assert not trainable_parameters(model).others
    expected, _ = defined(model, EXACT)
    extractor = FeatureExtractor(model, EXACT, beta=1.0)
    assert relative_error(extractor.gradients(tokens()).gradients, expected) <= 1e-9
    assert extractor.check(tokens()) is Layout.ALONE
    assert caplog.text.count("gradients are from autograd") == 1
    assert "is a routed expert" in caplog.text
    with pytest.raises(ActiveDPOError, match="is a routed expert.* use verify=True"):
        FeatureExtractor(model, EXACT, verify=False).gradients(tokens())


# -- the rest of the pipeline ---------------------------------------------------------------------


def everything() -> nn.Module:
    """Full fine-tuning: linear layers with biases, norms, embeddings of tokens and positions."""
    return tiny_causal_lm("gpt2", torch.float64, tie_word_embeddings=True)


@pytest.mark.parametrize("method", ["sjlt", "rademacher", "kronecker"])
def test_sketches(method: str) -> None:
    sketch = Sketch(method, 96, seed=5)
    assert_exact(everything(), sketch=sketch)
    if method == "sjlt":
        return
    experts = experts_lm("Mixtral").double()  # parameters of three dimensions
    experts.requires_grad_(False)
    experts.model.layers[0].mlp.experts.gate_up_proj.requires_grad_(True)
    assert_exact(experts, sketch=sketch)


@pytest.mark.parametrize("method", ["none", "sjlt", "rademacher", "kronecker"])
def test_both_ways_give_a_linear_layer_the_same_row(method: str) -> None:
    """So that a row of LoRA does not depend on what else is trained, except for the latter's."""
    sketch = Sketch(method, None if method == "none" else 256)
    model = lora(tiny_causal_lm("llama"), "llama")
    captured = FeatureExtractor(model, sketch).gradients(tokens()).gradients
    extractor = FeatureExtractor(model, sketch)
    extractor._layouts._failed.add(frozenset(trainable_parameters(model).by_name))
    assert extractor.check(tokens()) is Layout.ALONE
    assert relative_error(extractor.gradients(tokens()).gradients, captured) <= 1e-5


def test_half_precision() -> None:
    model = adapted(ADAPTERS["DoRA"], torch.float32)
    expected, _ = defined(copy.deepcopy(model).double(), EXACT)
    single = FeatureExtractor(model, EXACT, beta=1.0).gradients(tokens()).gradients
    assert single.dtype == torch.float32
    assert relative_error(single, expected) <= 1e-5
    half = copy.deepcopy(model).to(torch.bfloat16)
    found = FeatureExtractor(half, EXACT, beta=1.0).gradients(tokens()).gradients
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < 0.1
    if any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16")):
        found = FeatureExtractor(model, EXACT, beta=1.0, precision="bf16").gradients(tokens())
        assert 1e-5 < relative_error(found.gradients, expected) < 0.1


def test_relative_rows_and_means() -> None:
    model = everything()
    expected, logps = defined(model, EXACT)
    first = torch.tensor([tokens().items.index(item) for item in tokens().items])
    extractor = FeatureExtractor(model, EXACT, beta=1.0)
    found = extractor.gradients(tokens(), relative=True).gradients
    torch.testing.assert_close(found, expected - expected[first], rtol=1e-9, atol=1e-11)
    means = FeatureExtractor(model, EXACT, beta=1.0, length_normalized=True)
    lengths = means.lengths(tokens())
    assert lengths is not None and len(set(lengths.tolist())) > 1
    found = means.gradients(tokens())
    assert relative_error(found.gradients, expected / lengths[:, None]) <= 1e-9
    torch.testing.assert_close(found.logps, logps / lengths, rtol=1e-10, atol=0)


def test_rows_do_not_depend_on_the_adapter_name() -> None:
    for kind in ("DoRA", "trainable tokens of LoRA", "IA3", "prompt tuning"):
        rows = []
        for name in ("default", "policy"):
            model = adapted(ADAPTERS[kind], adapter_name=name)
            extractor = FeatureExtractor(model, Sketch("sjlt", 128))
            rows.append(extractor.gradients(tokens()).gradients)
        assert torch.equal(*rows)


@pytest.mark.parametrize("name", ["modules_to_save", "trainable tokens of LoRA", "prompt tuning"])
def test_only_the_active_adapter_counts(name: str) -> None:
    model = adapted(ADAPTERS[name])
    own = trainable(model)
    model.add_adapter("other", copy.deepcopy(ADAPTERS[name]))
    model.double()
    # Even with a gradient flag left on: TRL's reference adapter looks like this.
    for parameter_name, parameter in model.named_parameters():
        if ".other." in parameter_name or parameter_name.endswith(".other"):
            parameter.requires_grad_(True)
    assert len(trainable(model)) > len(own)
    expected, _ = loop_gradients(model, tokens().sequences, own)
    found = FeatureExtractor(model, EXACT, beta=1.0).gradients(tokens()).gradients
    assert relative_error(found, expected) <= 1e-9


def test_the_model_is_left_as_it_was() -> None:
    model = everything().train()
    parameters = list(model.parameters())
    parameters[0].grad = torch.ones_like(parameters[0])
    parameters[1].requires_grad_(False)
    stepped: list[int] = []
    for parameter in parameters:  # as optimizers that step in the backward pass do
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: stepped.append(id(p)))
    before = [parameter.detach().clone() for parameter in parameters]
    rows = FeatureExtractor(model, EXACT).gradients(tokens()).gradients
    assert rows.any() and not stepped
    assert model.training and all(module.training for module in model.modules())
    assert parameters[0].grad is not None and bool((parameters[0].grad == 1).all())
    assert all(parameter.grad is None for parameter in parameters[1:])
    assert [parameter.requires_grad for parameter in parameters] == [
        n != 1 for n in range(len(parameters))
    ]
    assert all(map(torch.equal, before, parameters))


def test_dropout_is_off() -> None:
    model = adapted(ADAPTERS["DoRA"], attention_dropout=0.5).train()
    once, again = (FeatureExtractor(model, EXACT).gradients(tokens()).gradients for _ in range(2))
    assert torch.equal(once, again)


def test_one_line_says_what_is_slow_and_why(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(ADAPTERS["prompt tuning"])
    extractor = FeatureExtractor(model, EXACT)
    with caplog.at_level(logging.WARNING, "activedpo_fast"):
        extractor.gradients(tokens())
        extractor.gradients(tokens())
    (record,) = caplog.records
    message = record.getMessage()
    assert "one response at a time, which is exact and slower: about 1." in message
    assert "1 of Embedding; first: 'prompt_encoder.embedding.weight'" in message


def test_flags_may_change_between_calls() -> None:
    model = lora(tiny_causal_lm("gpt2", torch.float64), "gpt2")
    positions = model.get_base_model().transformer.wpe.weight.requires_grad_(True)
    extractor = FeatureExtractor(model, EXACT, beta=1.0)
    assert extractor.check(tokens()) is Layout.ALONE
    positions.requires_grad_(False)
    expected, _ = loop_gradients(model, tokens().sequences, trainable(model))
    assert extractor.check(tokens()) is Layout.SHARED
    assert relative_error(extractor.gradients(tokens()).gradients, expected) <= 1e-9


class CalledAndRead(nn.Linear):
    """A layer whose weight also acts where no hook sees it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.5 * x.pow(2) @ self.weight.mT


def test_parameters_that_were_frozen_at_the_self_check_are_checked() -> None:
    """What it found of others says nothing of them."""
    model = tiny_causal_lm("llama", torch.float64)
    for layer in model.model.layers:
        layer.self_attn.o_proj.__class__ = CalledAndRead
    model.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.requires_grad_(True)
    extractor = FeatureExtractor(model, EXACT, beta=1.0)
    assert extractor.check(tokens()) is Layout.SHARED
    for layer in model.model.layers:
        layer.self_attn.o_proj.requires_grad_(True)
    expected, _ = loop_gradients(model, tokens().sequences, trainable(model))
    found = extractor.gradients(tokens()).gradients
    assert relative_error(found, expected) <= 1e-9
    for layer in model.model.layers:
        layer.self_attn.o_proj.requires_grad_(False)
    assert extractor.check(tokens()) is Layout.SHARED


def test_gradients_of_the_response_tokens_are_refused() -> None:
    model = everything()
    extractor = FeatureExtractor(model, EXACT, gradient="response_tokens")
    with pytest.raises(
        ActiveDPOError, match="trains 1 of Embedding; first: .*use gradient='all_tokens'"
    ) as error:
        extractor.gradients(tokens())
    assert "\n" not in str(error.value)


def test_a_parameter_that_takes_no_part() -> None:
    model = tiny_causal_lm("llama", torch.float64)
    model.requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    with pytest.raises(ActiveDPOError, match="no trainable parameter took part.*'unused'"):
        FeatureExtractor(model, EXACT).gradients(tokens())
    model.lm_head.weight.requires_grad_(True)
    found = FeatureExtractor(model, EXACT, beta=1.0).gradients(tokens()).gradients
    expected, _ = loop_gradients(model, tokens().sequences, trainable(model))
    assert relative_error(found, expected) <= 1e-9


def test_a_response_that_is_not_finite_is_named_or_skipped() -> None:
    model = everything()
    expected = FeatureExtractor(model, EXACT).gradients(tokens()).gradients
    odd = 3
    others = [s.input_ids for row, s in enumerate(tokens().sequences) if row != odd]
    rare = next(i for i in tokens().sequences[odd].input_ids if all(i not in ids for ids in others))
    model.transformer.wte.weight = nn.Parameter(model.transformer.wte.weight.detach().clone())
    model.transformer.wte.weight.data[rare] = torch.nan  # its own, so that no other row reads it
    assert model.lm_head.weight is not model.transformer.wte.weight
    skipping = FeatureExtractor(model, Sketch("sjlt", 64), skip_non_finite=True)
    found = skipping.gradients(tokens())
    assert not found.gradients[odd].any() and found.logps[odd].isnan()
    assert found.gradients.isfinite().all() and len(expected) == len(found.gradients)
    skipping.skip_non_finite = False
    with pytest.raises(ActiveDPOError, match="not finite"):
        skipping.gradients(tokens())


@pytest.mark.parametrize("name", ["modules_to_save", "full"])
def test_the_front_door(name: str) -> None:
    full = name == "full"
    model = tiny_causal_lm("llama") if full else adapted(ADAPTERS[name], torch.float32)
    pool = PreferencePool.from_rows(ROWS)
    selector = ActiveDPOSelector(model, processing_class=tiny_tokenizer(), proj_dim=64)
    picked = selector.select(pool, 2)
    assert len(picked) == 2
    expected, _ = defined(copy.deepcopy(model).double(), Sketch("sjlt", 64), beta=0.1)
    rows = selector.extractor.gradients(selector.tokenize(pool)).gradients
    assert relative_error(rows, expected) <= 1e-5
