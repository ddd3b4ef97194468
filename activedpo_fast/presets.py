"""Presets: settings taken from a paper, with notes on what the paper leaves open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.settings import LoopConfig, SelectorConfig, as_mapping, from_options


@dataclass(frozen=True)
class Preset:
    """Named settings for the parts of a run.

    Attributes:
        selection: options of `ActiveDPOSelector`, its strategy among them.
        lora: arguments of `peft.LoraConfig`.
        dpo: arguments of `trl.DPOConfig`.
        loop: options of `ActiveDPOLoop`.
    """

    selection: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    dpo: dict[str, Any] = field(default_factory=dict)
    loop: dict[str, Any] = field(default_factory=dict)

    def selector_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of a selector: those given, over the preset's.

        The preset's normalization is for its own strategy: another one keeps its default.
        """
        merged = {**self.selection, **options}
        if merged.get("strategy") != self.selection.get("strategy"):
            return {k: v for k, v in merged.items() if k != "normalize" or k in options}
        return merged

    def selector_config(self, **options: Any) -> SelectorConfig:
        """Return settings of the selector, with options on top of the preset's."""
        return from_options(SelectorConfig, self.selector_options(options))

    def loop_config(self, **options: Any) -> LoopConfig:
        """Return settings of the loop, with options on top of the preset's.

        The strategy may be among `selector_options`; given there and as an option it is refused.
        """
        given = as_mapping("selector_options", options.pop("selector_options", None)) or {}
        if "strategy" in options:
            if "strategy" in given:
                raise ActiveDPOError(
                    "strategy: given twice, in selector_options too; leave it out there"
                )
            given["strategy"] = options["strategy"]
        selection = self.selector_options(given)
        strategy = selection.pop("strategy")
        merged = {**self.loop, "strategy": strategy, "selector_options": selection, **options}
        return from_options(LoopConfig, merged)


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
    if not isinstance(name, str) or name not in PRESETS:
        raise ActiveDPOError(f"unknown preset {name!r}; known: {', '.join(sorted(PRESETS))}")
    return PRESETS[name]
