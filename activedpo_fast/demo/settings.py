"""The demo's settings: sizes chosen so that it ends within minutes on two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of one demo.

    Attributes:
        max_words: longer descriptions are left out.
        heldout: number of prompts of the metric.
        samples: number of responses to each of them; 0 for one greedy response.
        temperature: temperature of the Bradley–Terry labels, in units of the reward.
        strategies: the strategies, each with its options for the selector.
    """

    max_words: int | None
    rounds: int
    batch_size: int
    prompts_per_round: int
    num_generations: int
    heldout: int
    lora: dict[str, Any]
    dpo: dict[str, Any]
    generation: dict[str, Any]
    selection: dict[str, Any] = field(default_factory=dict)
    temperature: float = 0.05
    samples: int = 0
    strategies: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {"activedpo": {}, "random": {}}
    )

    @property
    def evaluation(self) -> dict[str, Any]:
        """Options of `HeldoutReward`."""
        greedy = {} if self.samples else {"temperature": 0.0}
        return {"samples": max(1, self.samples), **self.generation, **greedy}


_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SETTINGS: dict[str, DemoSettings] = {
    "reviews": DemoSettings(
        max_words=None,
        rounds=3,
        batch_size=128,
        prompts_per_round=150,
        num_generations=3,
        heldout=300,
        samples=2,
        temperature=0.3,  # of ratings from -4 to 4
        lora={"r": 8, "lora_alpha": 16, "target_modules": _LINEARS},
        dpo={
            "beta": 0.1,
            "learning_rate": 2e-3,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 16,
            "max_length": 64,
        },
        generation={"max_completion_length": 20, "temperature": 1.0, "generation_batch_size": 300},
        selection={"proj_dim": 4096, "max_tokens_per_batch": 2048},
        strategies={"random": {}, "activedpo": {}},
    ),
    "small": DemoSettings(
        max_words=45,
        rounds=4,
        batch_size=32,
        prompts_per_round=100,
        num_generations=3,
        heldout=300,
        lora={"r": 8, "lora_alpha": 16, "target_modules": _LINEARS},
        dpo={
            "beta": 0.1,
            "learning_rate": 2e-4,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 8,
            "max_length": 256,
        },
        generation={"max_completion_length": 24, "temperature": 0.8, "generation_batch_size": 60},
        selection={"proj_dim": 4096, "max_tokens_per_batch": 2048},
    ),
    "smollm2": DemoSettings(
        max_words=30,
        rounds=2,
        batch_size=8,
        prompts_per_round=12,
        num_generations=2,
        heldout=12,
        lora={"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        dpo={
            "beta": 0.1,
            "learning_rate": 1e-4,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "max_length": 512,
        },
        generation={"max_completion_length": 32, "temperature": 0.8, "generation_batch_size": 12},
        selection={"proj_dim": 4096, "max_tokens_per_batch": 2048},
    ),
}
