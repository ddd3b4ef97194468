"""Where preferences come from: a function, a reward, a reward model, or people through files."""

from __future__ import annotations

from activedpo_fast.labeling.files import FileOracle, LabelsPending
from activedpo_fast.labeling.oracle import CallableOracle, Oracle
from activedpo_fast.labeling.reward import Reward, RewardOracle
from activedpo_fast.labeling.reward_model import RewardModelOracle

__all__ = [
    "CallableOracle",
    "FileOracle",
    "LabelsPending",
    "Oracle",
    "Reward",
    "RewardModelOracle",
    "RewardOracle",
]
