"""The section `evaluate` of the run file: metrics of the policy after each round."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from activedpo_fast._checks import check_at_least
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.settings import LoopConfig, check_responding, check_types

_RESPONDING = ("max_completion_length", "temperature", "top_p", "generation_batch_size")


@dataclass
class EvaluationConfig:
    """Fields of the section; docs/cli.md describes them.

    Raises:
        ActiveDPOError: a value of the wrong type or out of range, or keys that do not go together.
    """

    prompts: str | None = field(
        default=None,
        metadata={"help": "Held-out prompts, a file or folder like the run's prompts."},
    )
    oracle: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "What scores responses to them: kind reward_model, or judge for a win rate "
            "against the start. Default: the run's oracle, if it is one of these."
        },
    )
    preferences: str | None = field(
        default=None,
        metadata={
            "help": "Held-out pairs with prompt, chosen and rejected, for the accuracy and margin "
            "of the implicit reward."
        },
    )
    samples: int = field(default=1, metadata={"help": "Responses to each held-out prompt."})
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Longest response in tokens. Default: as in loop."}
    )
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "Temperature of sampling, 0 for the likeliest tokens. Default: as in loop."
        },
    )
    top_p: float | None = field(
        default=None,
        metadata={
            "help": "Sample from the likeliest tokens with this probability. Default: as in loop."
        },
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={"help": "How many responses are generated at once. Default: as in loop."},
    )

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(
            1,
            samples=self.samples,
            max_completion_length=self.max_completion_length,
            generation_batch_size=self.generation_batch_size,
        )
        check_responding(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            samples=self.samples,
        )
        if self.prompts is None and self.preferences is None:
            raise ActiveDPOError(
                "prompts: missing, the file of held-out prompts; or give preferences, a file of "
                "held-out pairs"
            )
        for option in fields(self):
            unlike = getattr(self, option.name) != option.default
            if self.prompts is None and option.name != "preferences" and unlike:
                raise ActiveDPOError(f"{option.name}: no response is sampled without prompts")

    def responding(self, loop: LoopConfig) -> dict[str, Any]:
        """Return the options of `HeldoutReward`; those that are not given are the loop's."""
        own = {name: getattr(self, name) for name in _RESPONDING}
        return {
            "samples": self.samples,
            **{n: getattr(loop, n) if value is None else value for n, value in own.items()},
        }
