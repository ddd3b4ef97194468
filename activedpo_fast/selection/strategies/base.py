"""The strategy interface, and this process's part of the candidates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields
from typing import ClassVar, NamedTuple, TypeVar

import torch.distributed as dist

from activedpo_fast.distributed.processes import Processes
from activedpo_fast.selection.eligible import Eligible
from activedpo_fast.selection.greedy.contest import check_n
from activedpo_fast.selection.ranking import Ranking
from activedpo_fast.selection.signals import Signals

Result = TypeVar("Result")


class Strategy(ABC):
    """A way to choose pairs. Subclasses are dataclasses whose fields are their options.

    Attributes:
        name: its name in `make_strategy`.
        requires: the signals it uses, from "gradients", "hidden", "logps", "ref_logps", some of
            them with their history.
        preselectable: whether it can pick in two stages (see `selection.preselection`): it uses
            gradients, and those of the candidate and labeled pairs alone.

    Examples:
        >>> from activedpo_fast import ActiveDPOSelector, Strategy
        >>> from activedpo_fast.selection.greedy.top import rank_top
        >>> class Unlikely(Strategy):
        ...     name, requires = "unlikely", frozenset({"logps"})
        ...     def select(self, signals, n, *, eligible=None, group=None, show_progress=None):
        ...         scores = -signals.logps()[signals.pairs].sum(dim=1)
        ...         return rank_top(scores, scores.new_zeros(len(scores)), n, eligible, group)
        >>> ActiveDPOSelector(model, tokenizer, strategy=Unlikely()).select(pool, 2).strategy
        'unlikely'
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]
    preselectable: ClassVar[bool] = False

    @abstractmethod
    def select(
        self,
        signals: Signals,
        n: int,
        *,
        eligible: Eligible | None = None,
        group: dist.ProcessGroup | None = None,
        show_progress: bool | None = None,
    ) -> Ranking:
        """Return the n candidate pairs to label, best first; ties go to the lowest index.

        Args:
            eligible: which candidates may be picked (see `PickRules.bind`); all, by default. It is
                used up. With it, there may be fewer than n picks. Random picks come first.
            group: processes that select together, each with the signals (and `eligible`) of its
                part of the candidates: whole items, numbered consecutively, process after process.
                All get the ranking that one process with all the candidates would get.

        Raises:
            ActiveDPOError: n is not an integer from 0 to the number of candidate pairs, or a signal
                is missing or not finite; another process of the group failed or was lost.
        """

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Return the names of the options that `make_strategy` accepts for this strategy."""
        return tuple(field.name for field in fields(cls))  # type: ignore[arg-type]


class Part(NamedTuple):
    """This process's part of the candidates: all of them if there is only one process.

    n: how many to pick in total. offset: the number of this process's first candidate. total: the
    number of candidates of all processes.
    """

    n: int
    offset: int
    total: int
    processes: Processes | None

    @classmethod
    def of(cls, signals: Signals, n: int, group: dist.ProcessGroup | None) -> Part:
        """Count the candidates, and reject a bad n before expensive signals are computed."""
        count = len(signals.pairs)
        if group is None:
            return cls(check_n(n, count), 0, count, None)
        processes = Processes(group, count)
        return cls(check_n(n, processes.total), processes.offset, processes.total, processes)

    def everywhere(self, compute: Callable[[], Result]) -> Result:
        """Return `compute()`; if it raises in one process, all of them raise."""
        return compute() if self.processes is None else self.processes.check(compute)
