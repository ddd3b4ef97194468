"""Gradient rows of a pool on the demo's model, beside a plain forward pass and the obvious loop."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from activedpo_fast import FeatureExtractor, PreferencePool, Sketch
from activedpo_fast.demo import demo_prompts, load_demo_model
from activedpo_fast.tokenization import TokenizedPool, tokenize_pool


@pytest.fixture(scope="module")
def parts():
    model, tokenizer = load_demo_model()
    targets = "all-linear"
    model = get_peft_model(model, LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))
    pool = PreferencePool.from_rows(
        {
            "id": prompt.id,
            "prompt": prompt.prompt,
            "responses": [f" {prompt.extra['synopsis']}", f" a package called {prompt.id}"],
        }
        for prompt in demo_prompts("pool")[:32]
    )
    return model.eval(), tokenize_pool(pool, tokenizer)


def test_gradient_rows(benchmark, parts) -> None:
    model, tokens = parts
    extractor = FeatureExtractor(model, Sketch("sjlt", 8192), verify=False)
    benchmark.pedantic(extractor.gradients, (tokens,), rounds=5, warmup_rounds=1)


def test_forward_pass(benchmark, parts) -> None:
    model, tokens = parts
    extractor = FeatureExtractor(model, Sketch("sjlt", 8192), verify=False)
    benchmark.pedantic(extractor.logps, (tokens,), rounds=5, warmup_rounds=1)


def test_loop_of_backward_passes(benchmark, parts) -> None:
    """One response at a time through autograd, and no sketch: what people write first."""
    model, tokens = parts
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loop(tokens: TokenizedPool) -> None:
        for sequence in tokens.sequences:
            ids = torch.tensor([sequence.input_ids])
            log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            chosen = log_probs.gather(1, ids[0, 1:, None])
            logp = chosen[sequence.completion_start - 1 :].sum()
            torch.autograd.grad(logp, parameters)

    benchmark.pedantic(loop, (tokens,), rounds=5, warmup_rounds=1)
