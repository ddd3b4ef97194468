"""Which pairs to label next: the criterion, the strategies and their answer."""

from activedpo_fast.selection.greedy import greedy_logdet
from activedpo_fast.selection.information import InformationMatrix
from activedpo_fast.selection.ranking import Ranking
from activedpo_fast.selection.result import (
    Pick,
    Selection,
    by_preference,
    read_labels,
    read_pending,
)
from activedpo_fast.selection.rules import Eligible, PickRules
from activedpo_fast.selection.signals import Signals, TensorSignals
from activedpo_fast.selection.strategies import STRATEGIES, Strategy, make_strategy

__all__ = ["STRATEGIES", "Eligible", "InformationMatrix", "Pick", "PickRules", "Ranking",
           "Selection", "Signals", "Strategy", "TensorSignals", "by_preference", "greedy_logdet",
           "make_strategy", "read_labels", "read_pending"]
