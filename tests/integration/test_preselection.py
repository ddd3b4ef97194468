"""What two stages reach with the demo's model, and in the rehearsal of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MambaConfig, MambaForCausalLM

from activedpo_fast import ActiveDPOError, ActiveDPOLoop, ActiveDPOSelector, PreferencePool
from activedpo_fast.demo.language_model import load_base, read_prompts, with_fresh_lora
from activedpo_fast.demo.settings import SETTINGS
from activedpo_fast.labels import CallableOracle
from activedpo_fast.selection import greedy_logdet
from activedpo_fast.training.generation import generate_responses
from activedpo_fast.training.trl import dpo_config
from tests.support.models import tiny_tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("normalize", ["response", "pair"])
def test_two_stages_reach_the_log_det_of_exact_picks(normalize: str, demo) -> None:
    selectors, pool, rows = demo
    pairs = pool.pairs()
    exact = pairs[greedy_logdet(rows, pairs, 5, normalize=normalize).indices]
    two = torch.stack(
        [
            pool.response_offsets[pool.position(pick.id)] + torch.tensor(pick.pair)
            for pick in selectors(normalize=normalize, preselect=6).select(pool, 5)
        ]
    )

    def log_det(picked: torch.Tensor) -> float:
        own = rows / rows.norm(dim=1, keepdim=True) if normalize == "response" else rows
        phi = own[picked[:, 0]] - own[picked[:, 1]]
        if normalize == "pair":
            phi = phi / phi.norm(dim=1, keepdim=True)
        eye = torch.eye(len(phi), dtype=torch.float64)
        return float(torch.linalg.slogdet(eye + phi @ phi.T).logabsdet)

    assert len(two) == 5
    assert log_det(two) >= 0.99 * log_det(exact)


@pytest.fixture(scope="module")
def demo():
    """Selectors of the demo's model, a pool of its responses, and their exact rows, float64."""
    settings = SETTINGS["small"]
    base, tokenizer = load_base("small")
    model = with_fresh_lora(base, settings, 0)
    prompts = read_prompts("pool", max_words=settings.max_words)[:24]
    pool = generate_responses(
        model,
        tokenizer,
        prompts,
        num_generations=settings.num_generations,
        seed=0,
        show_progress=False,
        **settings.generation,
    )

    def selectors(**options) -> ActiveDPOSelector:
        return ActiveDPOSelector(
            model, tokenizer, sketch="none", max_tokens_per_batch=2048, **options
        )

    exact = selectors()
    return selectors, pool, exact.extractor.gradients(exact.tokenize(pool)).gradients.double()


def test_a_rehearsal_finds_that_a_first_stage_cannot_work(tmp_path: Path) -> None:
    """A state-space model cannot continue a prompt, which only the first stage asks for."""
    config = MambaConfig(
        vocab_size=384, hidden_size=16, num_hidden_layers=1, state_size=4, intermediate_size=32
    )
    torch.manual_seed(0)
    model = get_peft_model(
        MambaForCausalLM(config), LoraConfig(r=2, target_modules=["x_proj"], task_type="CAUSAL_LM")
    )
    pool = PreferencePool.from_rows(
        {"prompt": f"Question {i}?", "responses": [f" yes {i}", f" no, not {i}"]} for i in range(4)
    )
    loop = ActiveDPOLoop(
        model.eval(),
        tiny_tokenizer(),
        pool,
        CallableOracle(lambda prompt, a, b: 0),
        output_dir=tmp_path / "run",
        dpo_args=dpo_config(output_dir=str(tmp_path / "trainer"), max_steps=1),
        selector_options={"proj_dim": 64, "preselect": 10},
        responses="given",
        batch_size=2,
        rounds=1,
        show_progress=False,
    )
    with pytest.raises(ActiveDPOError, match="selection: gradient='response_tokens' needs a model"):
        loop.run()
