"""Select the pairs to label next: the criterion, the strategies and the resulting selection."""

from activedpo_fast.selection.eligible import Eligible
from activedpo_fast.selection.greedy.logdet import greedy_logdet
from activedpo_fast.selection.information.matrix import InformationMatrix
from activedpo_fast.selection.picks_jsonl import Pick
from activedpo_fast.selection.ranking import Ranking
from activedpo_fast.selection.result import Selection
from activedpo_fast.selection.rules import PickRules
from activedpo_fast.selection.signals import Signals, TensorSignals
from activedpo_fast.selection.strategies import STRATEGIES, Strategy, make_strategy

__all__ = [
    "STRATEGIES",
    "Eligible",
    "InformationMatrix",
    "Pick",
    "PickRules",
    "Ranking",
    "Selection",
    "Signals",
    "Strategy",
    "TensorSignals",
    "greedy_logdet",
    "make_strategy",
]
