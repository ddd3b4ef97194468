"""Short runs of a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from activedpo_fast.labels import CallableOracle
from activedpo_fast.models.adapters import adapter_state
from activedpo_fast.pool.items import Prompt
from activedpo_fast.training.loop import ActiveDPOLoop
from activedpo_fast.training.trl import dpo_config
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer

SCRIPT = "<script>alert(1)</script> The $x_1$ & \u202e"
_PROMPTS = [Prompt(f"p{n}", f"{SCRIPT} {n}") for n in range(8)]


def _metric(model: Any) -> dict[str, float]:
    norm = sum(float(tensor.norm()) for tensor in adapter_state(model).values())
    return {"norm": norm, "norm_se": 0.25}


def make_loop(folder: Path, *, strategy: str = "activedpo", **options: Any) -> ActiveDPOLoop:
    """A run of two rounds of three labels, one of them without a preference."""
    given: dict[str, Any] = {
        "oracle": CallableOracle(lambda prompt, a, b: None if prompt[-1] == "0" else int(a < b)),
        "rounds": 2,
        "dpo_options": {},
        **options,
    }
    dpo = {"learning_rate": 1e-2, "max_steps": 2, "per_device_train_batch_size": 3}
    return ActiveDPOLoop(
        lora(tiny_causal_lm("llama"), "llama"),
        tiny_tokenizer(),
        _PROMPTS,
        given["oracle"],
        output_dir=folder,
        dpo_args=dpo_config(output_dir=str(folder / "trainer"), **{**dpo, **given["dpo_options"]}),
        strategy=strategy,
        selector_options={"proj_dim": 64, "verify": False},
        batch_size=3,
        rounds=given["rounds"],
        prompts_per_round=4,
        num_generations=2,
        max_completion_length=6,
        evaluate=_metric,
        show_progress=False,
    )
