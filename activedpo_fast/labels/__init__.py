"""Sources of preferences: a function, a reward, a reward model, or people.

The reward model is imported when it is asked for: `activedpo label` does without transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from activedpo_fast.labels.files import FileOracle, LabelsPending
from activedpo_fast.labels.oracle import CallableOracle, Oracle
from activedpo_fast.labels.reward import Reward, RewardOracle

if TYPE_CHECKING:
    from activedpo_fast.labels.reward_model import RewardModelOracle

__all__ = [
    "CallableOracle",
    "FileOracle",
    "LabelsPending",
    "Oracle",
    "Reward",
    "RewardModelOracle",
    "RewardOracle",
]


def __getattr__(name: str) -> Any:
    if name != "RewardModelOracle":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from activedpo_fast.labels.reward_model import RewardModelOracle

    return RewardModelOracle
