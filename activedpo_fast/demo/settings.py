"""What the demo runs: sizes chosen so that it ends within minutes on two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of one demo. Rewards are cosines, so `temperature` is in units of cosine."""

    rounds: int
    batch_size: int
    prompts_per_round: int
    n_responses: int
    heldout: int
    lora: dict[str, Any]
    dpo: dict[str, Any]
    generation: dict[str, Any]
    selection: dict[str, Any] = field(default_factory=dict)
    temperature: float = 0.05


_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SETTINGS: dict[str, DemoSettings] = {
    "small": DemoSettings(
        rounds=5,
        batch_size=30,
        prompts_per_round=100,
        n_responses=3,
        heldout=200,
        lora={"r": 8, "lora_alpha": 16, "target_modules": _LINEARS},
        dpo={
            "beta": 0.1,
            "learning_rate": 5e-4,
            "num_train_epochs": 3,
            "per_device_train_batch_size": 16,
            "max_length": 320,
        },
        generation={"max_new_tokens": 24, "temperature": 0.8, "batch_size": 50},
        selection={"proj_dim": 4096},
    ),
    "smollm2": DemoSettings(
        rounds=2,
        batch_size=8,
        prompts_per_round=12,
        n_responses=2,
        heldout=12,
        lora={"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        dpo={
            "beta": 0.1,
            "learning_rate": 1e-4,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "max_length": 512,
        },
        generation={"max_new_tokens": 32, "temperature": 0.8, "batch_size": 12},
        selection={"proj_dim": 4096, "max_tokens_per_batch": 2048},
    ),
}
