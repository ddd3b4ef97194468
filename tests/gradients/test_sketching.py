"""What the hooks capture is sketched: at once, or put aside and sketched together."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from activedpo_fast import FeatureExtractor, PreferencePool, Sketch
from activedpo_fast.gradients import rows, sketching
from activedpo_fast.gradients.hooks import Capture
from activedpo_fast.gradients.layers import Call, TrainableLinear
from activedpo_fast.gradients.sketch import SketchPlan
from activedpo_fast.gradients.sketching import Sketching
from activedpo_fast.pool.tokens import tokenize_pool
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer

POOL = PreferencePool.from_rows(
    [
        {"prompt": "What is a sketch?", "responses": [" a projection", " a drawing", " no idea"]},
        {"prompt": "x", "responses": [" y", " zzzz"]},
    ]
)


@pytest.mark.parametrize("method", ["sjlt", "kronecker", "rademacher", "none"])
@pytest.mark.parametrize("most", [1, 20_000, 1 << 40])
def test_rows_are_the_same_whatever_is_put_aside(method, most, monkeypatch):
    """One layer, some, or a whole backward pass."""
    tokens = tokenize_pool(POOL, tiny_tokenizer(), max_length=None, truncation_mode="keep_start")
    model = lora(tiny_causal_lm("llama"), "llama")
    extractor = FeatureExtractor(
        model, Sketch(method, None if method == "none" else 96), max_tokens_per_batch=40
    )
    expected = extractor.gradients(tokens, show_progress=False).gradients
    flushes = []

    class Counting(Sketching):
        def __init__(self, plan, out):
            super().__init__(plan, out, most)

        def finish(self):
            flushes.append(sum(len(captured.gradients) for captured in self._aside.values()))
            super().finish()

    monkeypatch.setattr(rows, "Sketching", Counting)
    found = extractor.gradients(tokens, show_progress=False).gradients
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (max(flushes) == 1) == (most == 1)


def test_nothing_is_sketched_after_an_error():
    class Plan:
        def add(self, *arguments):
            raise AssertionError("sketched")

    layer = TrainableLinear(nn.Linear(4, 4, bias=False).requires_grad_(False), "w", None)
    out = torch.zeros(1, 8, dtype=torch.float64)
    consumer = Sketching(Plan(), out, 1 << 40)  # type: ignore[arg-type]
    with Capture([layer], consumer) as capture:
        with capture.forward((1, 3)):
            output = layer.module(torch.ones(1, 3, 4))
        with pytest.raises(KeyError), capture.backward(torch.tensor([[0, 3, 0]])):
            output.sum().backward()
            raise KeyError
    assert consumer._aside  # there was something to sketch


def test_what_a_term_keeps_is_what_the_graph_does_not():
    """Inputs of layers, which are not counted, live until the pass ends: until its output goes."""
    layers = [
        TrainableLinear(nn.Linear(4, 4, bias=False).requires_grad_(False), f"w{i}", None)
        for i in range(3)
    ]
    terms, inputs = [], []

    class Keeping:
        def add(self, found, segments):
            terms.extend(found)
            inputs.extend(weakref.ref(term.right) for term in found)

        def finish(self):
            assert len(terms) == len(layers)
            assert [term.kept for term in terms] == [term.left.nbytes for term in terms]
            terms.clear()

    with Capture(layers, Keeping()) as capture:
        with capture.forward((1, 3)):
            x = torch.ones(1, 3, 4)
            for layer in layers:
                x = layer.module(x)
        with capture.backward(torch.tensor([[0, 3, 0]])):
            x.sum().backward()
        assert all(h() is not None for h in inputs)
        del x
        assert all(h() is None for h in inputs)


def test_terms_of_another_dtype_are_copies():
    """Under autocast the input is there before the cast."""
    layer = TrainableLinear(nn.Linear(4, 5), "w", "b")
    rule = layer.seen(Call((torch.ones(1, 3, 4),), {}, (1, 3)))
    weight, bias = rule(torch.ones(1, 3, 5).bfloat16(), torch.tensor([[0, 3, 0]]))
    assert weight.left.dtype == weight.right.dtype == torch.float32
    assert weight.kept == 3 * 5 * 4  # g in float32; h is the graph's
    assert bias.kept == 3 * 5 * 2 + 3 * 2


@pytest.mark.parametrize(
    ("rank", "dtype", "tiles"),
    [(16, torch.float32, 2), (16, torch.bfloat16, 2), (128, torch.float32, 1)],
)
@pytest.mark.parametrize("method", ["sjlt", "kronecker"])
def test_launches_of_a_batch_of_llama_7b(rank, dtype, tiles, method, monkeypatch):
    """LoRA on q, k, v and o of 32 layers; ten prompts of 350 tokens run back twice, and twenty
    responses of 40 once: at most 64 launches, a few for each GiB of gradients of outputs."""
    pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction

    launched = []
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda self, *args, **options: launched.append(self)
    )
    monkeypatch.setenv("ACTIVEDPO_BACKEND", "triton")
    monkeypatch.setenv("ACTIVEDPO_DETERMINISTIC", "0")
    side, layers = 4096, []
    for i in range(128):
        with torch.device("meta"):
            a, b = nn.Linear(side, rank, bias=False), nn.Linear(rank, side, bias=False)
        layers += [TrainableLinear(a, f"{i}.A", None), TrainableLinear(b, f"{i}.B", None)]
    parameters = [(layer.label, layer.module.weight.shape) for layer in layers]
    out = torch.zeros(20, 8192, dtype=torch.float64)
    consumer = Sketching(SketchPlan(Sketch(method), parameters), out, sketching.ASIDE)

    def tokens(batch, length, width):  # that take no memory
        return torch.zeros(1, 1, width, dtype=dtype).expand(batch, length, width)

    most = 0
    for batch, length, passes in ((20, 40, 1), (10, 350, 2)):
        segments = [
            torch.tensor([[i * length, (i + 1) * length, i] for i in range(batch)])
            for _ in range(passes)
        ]
        for of_pass in segments:
            for layer in reversed(layers):
                rows, columns = layer.module.weight.shape
                rule = layer.seen(Call((tokens(batch, length, columns),), {}, (batch, length)))
                consumer.add(rule(tokens(batch, length, rows), of_pass), of_pass)
            consumer.finish()
        size = passes * batch * length * 128 * (side + rank) * dtype.itemsize
        most += size / sketching.ASIDE + passes
    assert 0 < len(launched) <= min(64, (1 + tiles) * most)
