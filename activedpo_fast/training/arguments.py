"""The arguments of a loop, checked and brought together before a model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.template import one_setting
from activedpo_fast.selection.result import Selection
from activedpo_fast.selection.strategies import STRATEGIES, Strategy
from activedpo_fast.settings import LoopConfig, SelectorConfig, read_settings
from activedpo_fast.training.trl import selector_settings

if TYPE_CHECKING:
    from trl import DPOConfig

logger = logging.getLogger(__name__)


def check_oracle(oracle: Any) -> None:
    if not callable(getattr(oracle, "label", None)):
        raise ActiveDPOError(
            f"oracle: expected an object with a method label, got {type(oracle).__name__}; "
            "for a function, CallableOracle(function)"
        )


def selection_settings(
    args: LoopConfig, dpo_args: DPOConfig
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the selector's options, and the template's arguments, which are for all stages."""
    given: Any = args.selector_options or {}
    for name, instead in (
        ("ref_model", "what the loop trains against; set reference"),
        ("strategy", "a setting of the loop; set strategy"),
    ):
        if name in given:
            raise ActiveDPOError(f"selector_options: {name!r} is {instead} instead")
    options = {**selector_settings(dpo_args), **given}
    template = one_setting(
        {
            "chat_template_kwargs": args.chat_template_kwargs,
            "selector_options.chat_template_kwargs": options.pop("chat_template_kwargs", None),
        }
    )
    read_settings(SelectorConfig, None, options, None)
    return options, template


def learn_reward(
    strategy: str | Strategy, history: Sequence[tuple[Selection, Sequence[int | None]]]
) -> None:
    """Have the reward that a strategy picks by learn from the labels so far, if it can."""
    if callable(learn := getattr(getattr(strategy, "reward", None), "learn", None)):
        learn([picked for picked, _ in history], [labels for _, labels in history])


def warn_of_the_date(processing_class: PreTrainedTokenizerBase) -> None:
    if "strftime_now" in str(processing_class.chat_template):
        logger.warning(
            "the chat template uses the current date: rounds on different days have "
            "different prompts"
        )


def warn_of_the_policy_as_reference(args: LoopConfig, strategy: str | Strategy) -> None:
    named = STRATEGIES[strategy] if isinstance(strategy, str) else strategy
    same = (args.reference, args.start_from) == ("round", "current")
    if same and "ref_logps" in named.requires:
        logger.warning(
            "strategy %r compares the policy with the reference, but with reference "
            "'round' and start_from 'current' they are the same at selection: "
            "every reward difference is 0",
            strategy if isinstance(strategy, str) else strategy.name,
        )
