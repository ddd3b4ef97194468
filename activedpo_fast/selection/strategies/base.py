"""What a strategy is, and the candidates of the process that it runs in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields
from typing import ClassVar, NamedTuple, TypeVar

import torch.distributed as dist

from activedpo_fast.distributed.processes import Processes
from activedpo_fast.selection.greedy.logdet import check_n
from activedpo_fast.selection.ranking import Ranking
from activedpo_fast.selection.rules import Eligible
from activedpo_fast.selection.signals import Signals

Result = TypeVar("Result")


class Strategy(ABC):
    """A way to choose pairs. Subclasses are dataclasses whose fields are their options.

    Attributes:
        name: what `make_strategy` knows it by.
        requires: the signals it asks for, of "gradients", "hidden", "logps", "ref_logps", some of
            them with their history.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]

    @abstractmethod
    def select(
        self, signals: Signals, n: int, *, eligible: Eligible | None = None,
        group: dist.ProcessGroup | None = None, show_progress: bool | None = None,
    ) -> Ranking:
        """The n candidate pairs to label, best first; ties to the lowest index.

        Args:
            eligible: which candidates may be picked (see `PickRules.bind`); all, by default. It is
                used up. There may be fewer picks than n then. Random ones come first.
            group: processes that select together, each with the signals (and `eligible`) of its
                part of the candidates: whole items, numbered through rank after rank. All get
                the ranking that one process with all of them would.

        Raises:
            ActiveDPOError: n is not an integer from 0 to the number of candidate pairs, or a signal
                is missing or not finite; another process of the group failed or was lost.
        """

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Names of the options that `make_strategy` takes for this strategy."""
        return tuple(field.name for field in fields(cls))  # type: ignore[arg-type]


class Part(NamedTuple):
    """This process's part of the candidates: all of them, where it is alone.

    n: how many are to be picked of all. offset: the number of its first candidate. total: how many
    all have.
    """

    n: int
    offset: int
    total: int
    processes: Processes | None

    @classmethod
    def of(cls, signals: Signals, n: int, group: dist.ProcessGroup | None) -> Part:
        """Counts the candidates, and refuses a bad n before signals are taken at great expense."""
        count = len(signals.pairs)
        if group is None:
            return cls(check_n(n, count), 0, count, None)
        processes = Processes(group, count)
        return cls(check_n(n, processes.total), processes.offset, processes.total, processes)

    def check(self, compute: Callable[[], Result]) -> Result:
        """What `compute` returns; where it raises in one process, all of them raise."""
        return compute() if self.processes is None else self.processes.check(compute)
