"""A model is left as it was found, and the state it was found in does not change any result."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

from activedpo_fast import ActiveDPOSelector, FeatureExtractor, PreferencePool, Prompt, Sketch
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.tokens import TokenizedPool, TokenizedResponse, tokenize_pool
from activedpo_fast.training.generation import generate_responses, respond
from tests.support.gradients import loop_gradients, relative_error, trainable
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer
from tests.support.quick import slow_except
from tests.support.state import differences, snapshot

TOKENIZER = tiny_tokenizer()
# As in many a tokenizer.json. A call without truncation switches it off.
TOKENIZER.backend_tokenizer.enable_truncation(max_length=500)
POOL = PreferencePool.from_rows(
    [
        {
            "prompt": "What is a sketch? TL;DR:",
            "responses": [" a short random projection", " a drawing"],
        },
        {
            "prompt": "Name the library that decides. TL;DR:",
            "responses": [" this one", " the quick brown fox jumps over"],
        },
        {"prompt": "TL;DR:", "responses": [" choose", " label less"]},
    ]
)
PROMPTS = [Prompt("a", "The quick"), Prompt("b", "What is a sketch?")]
EXACT = Sketch("none")


def tokens() -> TokenizedPool:
    return tokenize_pool(POOL, TOKENIZER)


def select(model: Any, strategy: str = "activedpo", **options: Any) -> Any:
    chooser = ActiveDPOSelector(model, TOKENIZER, strategy=strategy, proj_dim=64, **options)
    return [(p.id, p.pair, p.score) for p in chooser.select(POOL, 2)]


def extractor(model: Any, **options: Any) -> FeatureExtractor:
    return FeatureExtractor(model, EXACT, beta=1.0, **options)


DOORS: dict[str, Callable[[Any], Any]] = {
    "select": select,
    "aplp": lambda model: select(model, "aplp"),
    "apo": lambda model: select(model, "apo"),
    "gradients": lambda model: extractor(model).gradients(tokens()).gradients,
    "plain gradients": lambda model: extractor(model, verify=False).gradients(tokens()).gradients,
    "logps": lambda model: extractor(model).logps(tokens()),
    "hidden": lambda model: extractor(model).hidden(tokens()),
    "generate": lambda model: [
        item.responses
        for item in generate_responses(model, TOKENIZER, PROMPTS, max_completion_length=4)
    ],
    "respond": lambda model: respond(model, TOKENIZER, PROMPTS, max_completion_length=4),
}


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


class _Counting(ModelHook):  # type: ignore[misc]
    calls = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


def hooked(model: Any) -> Any:
    """A model as `device_map` leaves it: accelerate's hooks replace `forward` on instances."""
    for module in list(model.modules()):
        if not isinstance(module, (torch.nn.ModuleDict, torch.nn.ModuleList)):
            add_hook_to_module(module, _Counting())
    return model


def patched(model: Any) -> Any:
    """A model as optimized kernels leave it: `forward` is replaced on the decoder and on a
    layer."""
    decoder = model.get_base_model().get_decoder()
    for module in (decoder, decoder.layers[0].mlp, model.get_base_model()):
        forward = type(module).forward

        @functools.wraps(forward)
        def own(self: Any, *args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            return forward(self, *args, **kwargs)

        module.forward = MethodType(own, module)
    return model


def untidy(model: Any) -> Any:
    """Half in training mode, some gradients, one parameter frozen, a hook, a generation config."""
    model.train()
    list(model.modules())[7].eval()
    parameters = list(trainable(model).values())
    parameters[0].grad = torch.ones_like(parameters[0])
    parameters[1].requires_grad_(False)
    model.get_base_model().generation_config.top_k = 3
    model.enable_input_require_grads()
    return model


CONDITIONS = {"hooked": hooked, "patched": patched, "untidy": untidy}


def a_model(condition: str) -> Any:
    return CONDITIONS[condition](lora(tiny_causal_lm("llama"), "llama"))


@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_entry_point_leaves_everything_as_it_was(condition: str) -> None:
    model = a_model(condition)
    for name, door in DOORS.items():
        before = snapshot(model, TOKENIZER)
        door(model)
        assert differences(before, snapshot(model, TOKENIZER)) == [], name


def test_an_exception_leaves_everything_as_it_was() -> None:
    model = a_model("patched")

    def fail(*args: Any) -> None:
        raise RuntimeError("in the middle")

    handle = model.get_base_model().get_decoder().layers[1].mlp.register_forward_hook(fail)
    for name, door in DOORS.items():
        before = snapshot(model, TOKENIZER)
        with pytest.raises(RuntimeError, match="in the middle"):
            door(model)
        assert differences(before, snapshot(model, TOKENIZER)) == [], name
    handle.remove()


def test_the_heads_pass_leaves_the_decoders_own_forward() -> None:
    """The hooks of accelerate are called after a selection, as before it."""
    model = hooked(lora(tiny_causal_lm("llama"), "llama"))
    decoder = model.get_base_model().get_decoder()
    select(model)
    calls = decoder._hf_hook.calls
    model(input_ids=torch.arange(5, 9)[None])
    assert decoder._hf_hook.calls == calls + 1


MODES = {
    "inference_mode": lambda: torch.inference_mode(),
    "no_grad": lambda: torch.no_grad(),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", slow_except(["autocast"], MODES))
def test_the_callers_modes_change_nothing(mode: str) -> None:
    model = lora(tiny_causal_lm("llama"), "llama")
    expected = {name: door(model) for name, door in DOORS.items()}
    for name, door in DOORS.items():
        with MODES[mode]():
            before = snapshot(model, TOKENIZER)
            found = door(model)
            assert differences(before, snapshot(model, TOKENIZER)) == [], name
        assert same(found, expected[name]), name
        if isinstance(found, torch.Tensor):
            assert not found.is_inference(), name


def test_modes_are_the_callers_own_between_two_batches() -> None:
    """A generator that is abandoned halfway must not leave its modes behind."""
    model = lora(tiny_causal_lm("llama"), "llama")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        parts = extractor(model, max_tokens_per_batch=20).iter_gradients(tokens(), range(6))
        next(parts)
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
        del parts
    assert not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")


def test_a_model_loaded_in_inference_mode_is_refused_for_gradients_only() -> None:
    with torch.inference_mode():
        base = tiny_causal_lm("llama")
    model = lora(base, "llama")
    expected = extractor(lora(tiny_causal_lm("llama"), "llama")).logps(tokens())
    torch.testing.assert_close(extractor(model).logps(tokens()), expected)
    for verify in (True, False):
        with pytest.raises(ActiveDPOError, match=r"embed_tokens.*torch\.inference_mode"):
            extractor(model, verify=verify).gradients(tokens())


def test_autocast_around_a_model_without_an_adapter_is_taken_off() -> None:
    """Here the wrapped `forward` serves the whole pass and the head."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    model = tiny_causal_lm("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    expected = {name: door(model) for name, door in DOORS.items() if name != "aplp"}
    # There is one per process: trainers in other tests make it, and these tests reuse it.
    AcceleratorState._reset_state(reset_partial_state=True)
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "forward" in vars(model)
    for name, found in expected.items():
        before = snapshot(model)
        assert same(DOORS[name](model), found), name
        assert differences(before, snapshot(model)) == [], name


@pytest.mark.parametrize("bound", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_autocast_around_forward_is_taken_off(bound: bool) -> None:
    """As accelerate's `prepare_model` does for bf16, on a bound `forward` and on a hooked one."""
    from accelerate.utils import convert_outputs_to_fp32

    model = lora(tiny_causal_lm("llama"), "llama")
    expected = {name: door(model) for name, door in DOORS.items()}
    if not bound:
        add_hook_to_module(model, _Counting())
    context = torch.autocast("cpu", torch.bfloat16)
    model._original_forward = model.forward
    if bound:
        model.forward = MethodType(context(model.forward.__func__), model)
        model.forward = MethodType(convert_outputs_to_fp32(model.forward.__func__), model)
    else:
        model.forward = convert_outputs_to_fp32(context(model.forward))
    for name, door in DOORS.items():
        before = snapshot(model)
        assert same(door(model), expected[name]), name
        assert differences(before, snapshot(model)) == [], name


def test_compiled_layers_are_run_as_they_are() -> None:
    model = lora(tiny_causal_lm("llama"), "llama")
    expected = extractor(model).gradients(tokens()).gradients
    for layer in model.get_base_model().get_decoder().layers:
        layer.compile(backend="eager")
    model(input_ids=torch.arange(5, 19)[None])
    compiled = extractor(model)
    torch.testing.assert_close(compiled.gradients(tokens()).gradients, expected)
    assert compiled.check(tokens())  # prompts are shared


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {
            "rope_type": "longrope",
            "original_max_position_embeddings": 16,
            "short_factor": [1.0] * 4,
            "long_factor": [3.0] * 4,
        },
    ],
)
def test_rows_do_not_depend_on_what_ran_before(rope: dict[str, Any]) -> None:
    """A sequence of 37 tokens, after one of 295 and after none: rotary frequencies remember it."""
    rows = TokenizedPool(
        [TokenizedResponse([*range(20, 55), 60 + n, 5], 35) for n in (0, 1)], [], [0, 1]
    )
    model = lora(
        tiny_causal_lm(
            "llama", rope_parameters={"rope_theta": 1e4, **rope}, max_position_embeddings=16
        ),
        "llama",
    )
    expected, logps = loop_gradients(model, rows.sequences, trainable(model))
    model(input_ids=torch.arange(5, 300)[None])
    before = snapshot(model)
    found = extractor(model, verify=False).gradients(rows)
    DOORS["generate"](model)
    assert differences(before, snapshot(model)) == []
    assert relative_error(found.gradients, expected) < 1e-4
    torch.testing.assert_close(found.logps, logps.double(), rtol=1e-5, atol=0)


def test_a_generation_config_of_the_peft_model_is_hidden_and_kept() -> None:
    """`model.generation_config = ...` on a PEFT model sets it beside that of the model inside."""
    model = lora(tiny_causal_lm("llama"), "llama")
    expected = DOORS["generate"](model)
    own = copy.deepcopy(model.get_base_model().generation_config)
    own.suppress_tokens = list(range(5, 384, 2))
    model.generation_config = own
    before = snapshot(model, TOKENIZER)
    assert DOORS["generate"](model) == expected
    assert differences(before, snapshot(model, TOKENIZER)) == []
