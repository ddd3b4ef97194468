"""What the hooks capture is sketched: at once, or put aside and sketched together."""

from __future__ import annotations

import pytest
import torch

from activedpo_fast import FeatureExtractor, PreferencePool, Sketch
from activedpo_fast.gradients import sketching
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
    before, flushes = sketching._Sketching, []

    class Counting(before):
        def __init__(self, plan, out, _):
            super().__init__(plan, out, most)

        def finish(self):
            flushes.append(sum(len(captured.gradients) for captured in self._aside.values()))
            super().finish()

    monkeypatch.setattr(sketching, "_Sketching", Counting)
    found = extractor.gradients(tokens, show_progress=False).gradients
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (max(flushes) == 1) == (most == 1)


def test_nothing_is_sketched_after_an_error():
    class Plan:
        def add(self, *arguments):
            raise AssertionError("sketched")

    out = torch.zeros(1, 8, dtype=torch.float64)
    with pytest.raises(KeyError), sketching.sketch_into(Plan(), out):  # type: ignore[arg-type]
        raise KeyError
