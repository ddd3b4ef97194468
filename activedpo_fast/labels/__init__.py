"""Sources of preferences: a function, a reward, a reward model, or people through files."""

from __future__ import annotations

from activedpo_fast.labels.files import FileOracle, LabelsPending
from activedpo_fast.labels.oracle import CallableOracle, Oracle
from activedpo_fast.labels.reward import Reward, RewardOracle
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
