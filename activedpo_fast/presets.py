"""Presets: settings taken from a paper, with notes on what the paper leaves open."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from activedpo_fast.errors import ActiveDPOError


@dataclass(frozen=True)
class Preset:
    """Named settings for the parts of a run.

    Attributes:
        selection: options of `ActiveDPOSelector`.
        lora: arguments of `peft.LoraConfig`.
        dpo: arguments of `trl.DPOConfig`.
        loop: arguments of `ActiveDPOLoop`.
    """

    selection: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    dpo: dict[str, Any] = field(default_factory=dict)
    loop: dict[str, Any] = field(default_factory=dict)


PRESETS: dict[str, Preset] = {
    "paper": Preset(
        # Lin et al., ActiveDPO, arXiv 2505.19241. Not stated in what we could read: beta, lam, the
        # kind of sketch, rounds, train_on, reference, start_from; for these our defaults apply.
        # "response" is the most plausible reading of the text, not a quotation from it.
        selection={"strategy": "activedpo", "proj_dim": 8192, "normalize": "response"},
        # Target modules: inferred from LESS (arXiv 2402.04333), whose setup the paper follows.
        lora={
            "r": 128,
            "lora_alpha": 512,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        },
        dpo={"num_train_epochs": 4, "learning_rate": 1e-4},
        loop={"batch_size": 50, "prompts_per_round": 1000, "num_generations": 3},
    )
}


def preset(name: str) -> Preset:
    """Return the preset called `name`. If unknown, an `ActiveDPOError` lists the known ones."""
    try:
        return PRESETS[name]
    except KeyError:
        known = ", ".join(sorted(PRESETS))
        raise ActiveDPOError(f"unknown preset {name!r}; known: {known}") from None
