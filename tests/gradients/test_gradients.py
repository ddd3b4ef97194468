"""Captured per-sample gradients against a plain loop of backward passes."""

from __future__ import annotations

import copy
import re
from contextlib import nullcontext
from functools import lru_cache
from itertools import product

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients import lm_head as logprobs
from activedpo_fast.gradients.batches import Layout
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.sketch import Sketch, canonical_name
from activedpo_fast.ops import reference
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.tokens import TokenizedPool, TokenizedResponse, tokenize_pool
from tests.support.gradients import loop_gradients, relative_error, trainable
from tests.support.models import ARCHS, lora, tiny_causal_lm, tiny_tokenizer
from tests.support.quick import slow_except

EXACT = Sketch("none", None)

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


@lru_cache
def all_tokens() -> TokenizedPool:
    pool = PreferencePool.from_rows(ROWS)
    return tokenize_pool(pool, tiny_tokenizer(), max_length=None, truncation_mode="keep_start")


@pytest.fixture
def tokens() -> TokenizedPool:
    return all_tokens()


@lru_cache
def float64_rows(arch: str) -> torch.Tensor:
    """The plain loop over all tokens, by a float64 copy of the float32 model."""
    exact = lora(tiny_causal_lm(arch), arch).double()
    return loop_gradients(exact, all_tokens().sequences, trainable(exact))[0]


def subset(tokens: TokenizedPool, rows: list[int]) -> TokenizedPool:
    return TokenizedPool([tokens.sequences[r] for r in rows], [], [tokens.items[r] for r in rows])


def extract(model, tokens, **options) -> torch.Tensor:
    options.setdefault("beta", 1.0)
    options.setdefault("max_tokens_per_batch", 160)
    return FeatureExtractor(model, EXACT, **options).gradients(tokens).gradients


# Gemma 2 has only "eager".
IMPLEMENTATIONS = [
    (arch, implementation)
    for arch in ARCHS
    for implementation in ("sdpa", "eager")
    if (arch, implementation) != ("gemma2", "sdpa")
]


@pytest.mark.parametrize(
    ("arch", "implementation", "shared"),
    slow_except(
        [
            *((arch, "sdpa", True) for arch in ARCHS if arch != "gemma2"),
            *(("gemma2", "eager", True), ("llama", "eager", True)),
            *(("gpt2", "sdpa", False), ("gemma2", "eager", False)),
        ],
        [(*how, shared) for how in IMPLEMENTATIONS for shared in (True, False)],
    ),
)
def test_float64_equals_the_loop(
    arch: str, implementation: str, shared: bool, tokens: TokenizedPool
) -> None:
    # Eager attention computes its softmax in float32 whatever the model's dtype, so the order of
    # additions alone changes the result by float32 rounding. Where padding attends only to padding
    # (a padded prompt, or more padding than a sliding window), the mask of a float64 model
    # overflows to NaN.
    window = {"sliding_window": 256} if arch == "gemma2" else {}
    model = tiny_causal_lm(arch, torch.float64, attn_implementation=implementation, **window)
    model = lora(model, arch)
    eager = implementation == "eager"
    for item in sorted(set(tokens.items)) if eager else [None]:
        rows = [r for r, owner in enumerate(tokens.items) if item in (owner, None)]
        part = subset(tokens, rows)
        expected, logps = loop_gradients(model, part.sequences, trainable(model))
        extractor = FeatureExtractor(
            model, EXACT, beta=0.3, max_tokens_per_batch=160, verify=shared
        )
        found = extractor.gradients(part)
        assert extractor.check(part) is (Layout.SHARED if shared else Layout.WHOLE)
        assert found.gradients.dtype == torch.float64
        assert relative_error(found.gradients, 0.3 * expected) <= (1e-6 if eager else 1e-9)
        torch.testing.assert_close(found.logps, logps, rtol=1e-7 if eager else 1e-10, atol=0)


@pytest.mark.parametrize(
    ("arch", "shared"),
    slow_except(
        [("llama", True), ("gemma2", True), ("gpt2", False), ("mixtral", True)],
        product(ARCHS, [True, False]),
    ),
)
def test_float32_equals_the_float64_loop(arch: str, shared: bool, tokens: TokenizedPool) -> None:
    model = lora(tiny_causal_lm(arch), arch)
    expected = float64_rows(arch)
    extractor = FeatureExtractor(model, EXACT, beta=1.0, max_tokens_per_batch=160, verify=shared)
    found = extractor.gradients(tokens).gradients
    assert extractor.check(tokens) is (Layout.SHARED if shared else Layout.WHOLE)
    assert found.dtype == torch.float32
    assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("arch", slow_except(["llama", "gemma2"], ARCHS))
def test_relative_rows_have_the_same_differences(arch: str, tokens: TokenizedPool) -> None:
    model = lora(tiny_causal_lm(arch), arch)
    expected = float64_rows(arch)
    first = torch.tensor([tokens.items.index(item) for item in tokens.items])
    others = torch.arange(len(first)) != first
    for shared in (True, False):
        extractor = FeatureExtractor(
            model, EXACT, beta=1.0, max_tokens_per_batch=160, verify=shared
        )
        found = extractor.gradients(tokens, relative=True)
        assert extractor.check(tokens) is (Layout.SHARED if shared else Layout.WHOLE)
        assert not found.gradients[~others].any()
        assert relative_error(found.gradients[others], (expected - expected[first])[others]) <= 1e-5
        torch.testing.assert_close(found.logps, extractor.logps(tokens))


METHODS = ("sjlt", "rademacher", "kronecker")


@pytest.mark.parametrize(
    ("arch", "method"),
    slow_except(
        [*product(["llama"], METHODS), ("gpt2", "sjlt"), ("mixtral", "kronecker")],
        product(ARCHS, METHODS),
    ),
)
def test_sketched_rows_are_the_sketch_of_autograds(
    arch: str, method: str, tokens: TokenizedPool
) -> None:
    """Prompts are run once and gradients of A and B are sketched as they are formed. Compared with
    plain autograd and the definition of the sketch, applied to whole gradients."""
    k = 96
    model = lora(tiny_causal_lm(arch), arch)
    expected = float64_rows(arch)
    sketch = Sketch(method, k, seed=5)
    defined = torch.zeros(len(expected), k, dtype=torch.float64)
    offset = 0
    for name, parameter in trainable(model).items():
        part = expected[:, offset : offset + parameter.numel()]
        offset += parameter.numel()
        key = sketch.key(canonical_name(name, "default"))
        if method == "kronecker":
            part = part.view(-1, *parameter.shape)
        defined += getattr(reference, method)(part, key, k)
    extractor = FeatureExtractor(model, sketch, beta=1.0, max_tokens_per_batch=160)
    assert extractor.check(tokens) is Layout.SHARED
    assert relative_error(extractor.gradients(tokens).gradients, defined) <= 1e-5


def test_relative_rows_need_whole_items(tokens: TokenizedPool) -> None:
    model = lora(tiny_causal_lm("llama"), "llama")
    extractor = FeatureExtractor(model, EXACT)
    with pytest.raises(ActiveDPOError, match="two or more responses"):
        extractor.gradients(subset(tokens, [0, 1, 3]), relative=True)


@pytest.mark.parametrize("arch", slow_except(["llama", "gemma2", "mixtral"], ARCHS))
def test_log_probs_and_hidden_states(arch: str, tokens: TokenizedPool) -> None:
    model = lora(tiny_causal_lm(arch), arch)
    extractor = FeatureExtractor(model, EXACT, max_tokens_per_batch=160)
    logps, hidden = extractor.logps(tokens), extractor.hidden(tokens)
    assert [layout for layout, _ in extractor._layouts._forward.values()] == [Layout.SHARED]
    for row, sequence in enumerate(tokens.sequences):
        ids = torch.tensor([sequence.input_ids])
        with torch.no_grad():
            output = model(input_ids=ids, output_hidden_states=True)
        scores = output.logits[0, :-1].log_softmax(-1)
        expected = scores.gather(1, ids[0, 1:, None])[max(sequence.completion_start, 1) - 1 :].sum()
        assert float(logps[row]) == pytest.approx(float(expected), rel=1e-5)
        torch.testing.assert_close(
            hidden[row], output.hidden_states[-1][0, -1], rtol=1e-4, atol=1e-5
        )


def test_a_head_with_an_adapter_is_captured_chunk_by_chunk(
    tokens: TokenizedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "_CHUNK_CPU", 5 * 384)  # five tokens at a time
    model = lora(
        tiny_causal_lm("llama", torch.float64), "llama", target_modules=["v_proj", "lm_head"]
    )
    expected, _ = loop_gradients(model, tokens.sequences, trainable(model))
    extractor = FeatureExtractor(model, EXACT, beta=1.0)
    assert relative_error(extractor.gradients(tokens).gradients, expected) <= 1e-9
    assert extractor.check(tokens) is Layout.SHARED
    first = torch.tensor([tokens.items.index(item) for item in tokens.items])
    found = extractor.gradients(tokens, relative=True).gradients
    difference = expected - expected[first]
    assert float((found - difference).norm() / difference.norm()) <= 1e-6


def test_responses_that_leave_the_prompt_early_or_have_none(tokens: TokenizedPool) -> None:
    """Shared beginnings of every length: none, one token, and less than the prompt."""
    prompt = tokens.sequences[0].input_ids[:6]
    sequences = [
        TokenizedResponse([*prompt, 40, 41], 6),
        TokenizedResponse([*prompt[:3], 50, 51, 52, 53], 6),
        TokenizedResponse([60, 61, 62], 0),
        TokenizedResponse([70, 71], 0),
        TokenizedResponse([80, 81, 82], 1),
        TokenizedResponse([80, 83], 1),
        TokenizedResponse([90, 91, 92], 2),
        TokenizedResponse([90, 91, 93, 94], 2),
        TokenizedResponse([*prompt], 6),
        TokenizedResponse([*prompt], 6),  # nothing is scored
    ]
    odd = TokenizedPool(sequences, [4], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    model = lora(tiny_causal_lm("llama", torch.float64), "llama")
    expected, logps = loop_gradients(model, sequences[:8], trainable(model))
    extractor = FeatureExtractor(model, EXACT, beta=1.0)
    found = extractor.gradients(odd)
    assert extractor.check(odd) is Layout.SHARED
    assert relative_error(found.gradients[:8], expected) <= 1e-9
    torch.testing.assert_close(found.logps[:8], logps, rtol=1e-10, atol=0)
    assert not found.gradients[8:].any()
    assert not found.logps[8:].any()


def test_a_batch_with_nothing_to_score() -> None:
    for dtype, exact in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        logps, gradient = logprobs.chunked_logps(
            lambda hidden: hidden,
            torch.empty(0, 8, dtype=dtype),
            torch.empty(0).long(),
            vocabulary=8,
            weights=torch.empty(0, dtype=exact),
            around=lambda i, j: nullcontext(),
        )
        assert logps.shape == (0,) and logps.dtype == exact
        assert gradient is not None and gradient.shape == (0, 8)


def test_long_prompts_leave_the_sliding_window(tokens: TokenizedPool) -> None:
    """Gemma 2 with a window of 16 tokens, far shorter than the sequences."""
    model = lora(tiny_causal_lm("gemma2"), "gemma2")
    assert model.config.sliding_window == 16
    sequences = [
        TokenizedResponse([*range(20, 70 + n), 5, 6 + m], 50 + n) for n in (0, 9) for m in (0, 1)
    ]
    pool = TokenizedPool(sequences, [], [0, 0, 1, 1])
    exact = copy.deepcopy(model).double()
    expected, _ = loop_gradients(exact, sequences, trainable(exact))
    extractor = FeatureExtractor(model, EXACT, beta=1.0)
    assert extractor.check(pool) is Layout.SHARED
    assert relative_error(extractor.gradients(pool).gradients, expected) <= 1e-5


@pytest.mark.parametrize("config_class", ["BloomConfig", "MambaConfig", "FalconConfig"])
def test_other_architectures_share_or_are_run_plainly(
    config_class: str, tokens: TokenizedPool, caplog: pytest.LogCaptureFixture
) -> None:
    """ALiBi, recurrent states: the self-check finds whether prompts can be shared, and the rows are
    right."""
    config = getattr(transformers, config_class)(
        vocab_size=384,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        n_head=4,
        n_layer=2,
        state_size=4,
        alibi=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    targets = {"MambaConfig": ["in_proj", "x_proj"]}.get(config_class, ["query_key_value"])
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.eval()
    expected, _ = loop_gradients(model, tokens.sequences, trainable(model))
    extractor = FeatureExtractor(model, EXACT, beta=1.0, max_tokens_per_batch=160)
    found = extractor.gradients(tokens).gradients
    assert relative_error(found, expected) <= 1e-4
    warned = [r for r in caplog.records if "cannot continue a prompt" in r.message]
    assert len(warned) == (0 if extractor.check(tokens) is Layout.SHARED else 1)
    if config_class == "MambaConfig":
        assert warned


def test_out_of_memory_halves_the_batches(
    tokens: TokenizedPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The allocator's own error, raised where a real one would be: inside a layer."""
    model = lora(tiny_causal_lm("llama"), "llama")
    expected = extract(model, tokens)
    limit = 60

    def allocate(module, inputs) -> None:
        if inputs[0].shape[0] * inputs[0].shape[1] > limit:
            torch.empty(1 << 60, dtype=torch.uint8)

    mlp = model.get_submodule("base_model.model.model.layers.1.mlp")
    extractor = FeatureExtractor(model, EXACT, beta=1.0)
    extractor.check(tokens)
    handle = mlp.register_forward_pre_hook(allocate)
    found = extractor.gradients(tokens).gradients
    assert relative_error(found, expected) <= 5e-6
    assert "out of memory: going on with batches of" in caplog.text
    limit = 3
    with pytest.raises(ActiveDPOError, match="out of memory for 1 responses of one prompt"):
        extractor.gradients(tokens)
    handle.remove()


def test_bf16_autocast(tokens: TokenizedPool) -> None:
    model = lora(tiny_causal_lm("llama"), "llama")
    expected = extract(model, tokens)
    with pytest.raises(ActiveDPOError, match="precision is 'fp8'"):
        extract(model, tokens, precision="fp8")
    if not any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16")):
        with pytest.raises(ActiveDPOError, match="no bfloat16"):
            extract(model, tokens, precision="bf16")
        return
    found = extract(model, tokens, precision="bf16")
    assert found.dtype == torch.float32
    assert 1e-5 < relative_error(found, expected) < 0.1
    for method in ("sjlt", "rademacher", "kronecker"):
        full, half = (
            FeatureExtractor(model, Sketch(method, 256), precision=precision).gradients(tokens)
            for precision in (None, "bf16")
        )
        assert 1e-5 < relative_error(half.gradients, full.gradients) < 0.2
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_rslora_bias_and_untrained_adapter(tokens: TokenizedPool) -> None:
    model = lora(
        tiny_causal_lm("llama", torch.float64),
        "llama",
        use_rslora=True,
        lora_bias=True,
        randomize=False,
    )
    expected, _ = loop_gradients(model, tokens.sequences, trainable(model))
    found = extract(model, tokens)
    assert relative_error(found, expected) <= 1e-9
    # At initialization B = 0, and so are the gradients of A: exactly.
    offset = 0
    for name, parameter in trainable(model).items():
        block = found[:, offset : offset + parameter.numel()]
        assert bool((block == 0).all()) == ("lora_A" in name)
        offset += parameter.numel()


def test_only_the_active_adapter_counts(tokens: TokenizedPool) -> None:
    model = lora(tiny_causal_lm("llama", torch.float64), "llama")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.double()
    # Even with a gradient flag left on: TRL's reference adapter looks like this.
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.requires_grad_(True)
    own = {n: p for n, p in trainable(model).items() if ".other." not in n}
    expected, _ = loop_gradients(model, tokens.sequences, own)
    assert relative_error(extract(model, tokens), expected) <= 1e-9
    model.set_adapter("other")
    found = extract(model, tokens)
    assert found.shape[1] == sum(p.numel() for n, p in trainable(model).items() if ".other." in n)


def test_rows_do_not_depend_on_the_adapter_name(tokens: TokenizedPool) -> None:
    rows = [
        FeatureExtractor(
            lora(tiny_causal_lm("llama"), "llama", adapter_name=name), Sketch("sjlt", 128)
        )
        .gradients(tokens)
        .gradients
        for name in ("default", "policy")
    ]
    assert torch.equal(rows[0], rows[1])


def test_two_active_adapters(tokens: TokenizedPool) -> None:
    model = lora(tiny_causal_lm("llama", torch.float64), "llama")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.double()
    model.base_model.set_adapter(["default", "other"])
    expected, _ = loop_gradients(model, tokens.sequences, trainable(model))
    assert relative_error(extract(model, tokens), expected) <= 1e-9


def test_trainable_base_linears_and_conv1d(tokens: TokenizedPool) -> None:
    for arch, chosen in (("llama", "mlp.down_proj"), ("gpt2", "mlp.c_fc")):
        model = tiny_causal_lm(arch, torch.float64)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(chosen in name)
        expected, _ = loop_gradients(model, tokens.sequences, trainable(model))
        assert relative_error(extract(model, tokens), expected) <= 1e-9


def test_gradient_checkpointing_changes_nothing(tokens: TokenizedPool) -> None:
    model = lora(tiny_causal_lm("llama", torch.float64), "llama")
    expected = extract(model, tokens)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    model.train()
    assert relative_error(extract(model, tokens), expected) <= 1e-12
    assert model.training


def test_bfloat16_model(tokens: TokenizedPool) -> None:
    model = lora(tiny_causal_lm("llama"), "llama")
    expected = extract(model, tokens)
    half = copy.deepcopy(model).to(torch.bfloat16)
    found = extract(half, tokens)
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < 0.1
    cosine = torch.nn.functional.cosine_similarity(found, expected)
    assert float(cosine.min()) > 0.995


def test_rows_do_not_depend_on_batch_or_order(tokens: TokenizedPool) -> None:
    model = lora(tiny_causal_lm("llama"), "llama")
    alone = extract(model, tokens, max_tokens_per_batch=1)
    generator = torch.Generator().manual_seed(3)
    for max_tokens in (100, 200, 10_000):
        order = torch.randperm(len(tokens.sequences), generator=generator).tolist()
        shuffled = subset(tokens, order)
        found = extract(model, shuffled, max_tokens_per_batch=max_tokens)
        assert relative_error(found, alone[order]) <= 5e-6


def test_tiny_gradients_keep_their_relative_accuracy(tokens: TokenizedPool) -> None:
    """Entries of size 1e-8 and below, from an adapter that is scaled down, compared with
    float64."""
    model = lora(tiny_causal_lm("llama"), "llama", lora_alpha=1e-7)
    exact = copy.deepcopy(model).double()
    expected, _ = loop_gradients(exact, tokens.sequences, trainable(exact))
    assert float(expected.abs().max()) < 1e-5
    assert relative_error(extract(model, tokens), expected) <= 1e-5
    sketched = FeatureExtractor(model, Sketch("sjlt", 64), beta=1.0).gradients(tokens).gradients
    wanted = FeatureExtractor(exact, Sketch("sjlt", 64), beta=1.0).gradients(tokens).gradients
    assert relative_error(sketched, wanted) <= 1e-5


def snapshot(model: torch.nn.Module) -> dict:
    return {
        "modes": [m.training for m in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "hooks": [
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
            for m in model.modules()
        ],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    }


def assert_same_state(before: dict, after: dict) -> None:
    for key in ("modes", "flags", "hooks"):
        assert before[key] == after[key], key
    for one, other in zip(before["grads"], after["grads"], strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_model_is_left_as_it_was(tokens: TokenizedPool) -> None:
    model = lora(tiny_causal_lm("llama"), "llama")
    model.train()
    list(model.modules())[5].eval()
    next(iter(trainable(model).values())).grad = torch.ones(4, 32)
    before = snapshot(model)
    with torch.no_grad():
        rows = extract(model, tokens)
    assert float(rows.abs().max()) > 0
    assert_same_state(before, snapshot(model))


def test_model_is_left_as_it_was_after_an_exception(tokens: TokenizedPool) -> None:
    model = lora(tiny_causal_lm("llama"), "llama")
    model.train()
    before = snapshot(model)

    def fail(*args: object) -> None:
        raise RuntimeError("in the middle")

    handle = model.get_submodule("base_model.model.model.layers.1.mlp").register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        extract(model, tokens)
    handle.remove()
    assert_same_state(before, snapshot(model))


def test_dropout_is_off(tokens: TokenizedPool) -> None:
    model = lora(tiny_causal_lm("llama"), "llama", lora_dropout=0.5)
    model.train()
    assert torch.equal(extract(model, tokens), extract(model, tokens))


def test_other_unsupported_set_ups(tokens: TokenizedPool) -> None:
    model = tiny_causal_lm("llama").requires_grad_(False)
    with pytest.raises(ActiveDPOError, match="no trainable parameter"):
        extract(model, tokens)
    adapted = lora(tiny_causal_lm("llama"), "llama")
    adapted.merge_adapter()
    with pytest.raises(ActiveDPOError, match="merged"):
        extract(adapted, tokens)
    adapted.unmerge_adapter()
    with adapted.disable_adapter(), pytest.raises(ActiveDPOError, match="disabled"):
        extract(adapted, tokens)


def test_self_check_finds_a_layer_whose_weight_is_used_without_calling_it(
    tokens: TokenizedPool, caplog: pytest.LogCaptureFixture
) -> None:
    model = lora(tiny_causal_lm("llama"), "llama")
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    inner = layer.lora_A["default"]

    def around(x: torch.Tensor) -> torch.Tensor:
        half = torch.nn.functional.linear(x, inner.weight)
        return layer.base_layer(x) + layer.lora_B["default"](half) * layer.scaling["default"]

    layer.forward = around
    expected, _ = loop_gradients(model, tokens.sequences, trainable(model))
    extractor = FeatureExtractor(model, EXACT, beta=1.0)
    assert relative_error(extractor.gradients(tokens).gradients, expected) <= 1e-5
    assert re.search(
        r"gradients are from autograd.*layers\.0\.self_attn\.q_proj\.lora_A", caplog.text
    )
    # A longer response is not checked again.
    sequence = tokens.sequences[0]
    longer = TokenizedResponse([*sequence.input_ids, *range(20, 60)], sequence.completion_start)
    assert extractor.check(TokenizedPool([longer], [], [0])) is Layout.ALONE
    assert caplog.text.count("gradients are from autograd") == 1


def test_a_layer_used_twice_counts_twice(tokens: TokenizedPool) -> None:
    model = lora(tiny_causal_lm("llama", torch.float64), "llama")
    layers = model.get_submodule("base_model.model.model.layers")
    layers[1].mlp = layers[0].mlp
    expected, _ = loop_gradients(model, tokens.sequences, trainable(model))
    assert relative_error(extract(model, tokens), expected) <= 1e-9
