"""Sources of preferences: a function, a reward, models, recorded preferences, or people.

The models are imported when they are asked for: `activedpo label` does without transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from activedpo_fast.labels.files import FileOracle, LabelsPending
from activedpo_fast.labels.oracle import CallableOracle, Oracle
from activedpo_fast.labels.recorded import RecordedOracle
from activedpo_fast.labels.reward import RewardOracle
from activedpo_fast.pool.rewards import Reward

if TYPE_CHECKING:
    from activedpo_fast.labels.judge.oracle import JudgeOracle
    from activedpo_fast.labels.label_studio import LabelStudioOracle
    from activedpo_fast.labels.learned_reward import LearnedReward
    from activedpo_fast.labels.reward_model import RewardModel, RewardModelOracle

__all__ = [
    "CallableOracle",
    "FileOracle",
    "JudgeOracle",
    "LabelStudioOracle",
    "LabelsPending",
    "LearnedReward",
    "Oracle",
    "RecordedOracle",
    "Reward",
    "RewardModel",
    "RewardModelOracle",
    "RewardOracle",
]


_LATE = {
    "JudgeOracle": "activedpo_fast.labels.judge.oracle",
    "LabelStudioOracle": "activedpo_fast.labels.label_studio",
    "LearnedReward": "activedpo_fast.labels.learned_reward",
    "RewardModel": "activedpo_fast.labels.reward_model",
    "RewardModelOracle": "activedpo_fast.labels.reward_model",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATE[name]), name)
