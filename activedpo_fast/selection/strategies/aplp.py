"""APLP: uncertain prompts, then confident pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from activedpo_fast.distributed.pool_parts import PoolProcesses
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.selection.eligible import Eligible
from activedpo_fast.selection.greedy.top import rank_top
from activedpo_fast.selection.information.matrix import check_positive
from activedpo_fast.selection.ranking import Ranking
from activedpo_fast.selection.signals import Signals
from activedpo_fast.selection.strategies.base import Part, Strategy
from activedpo_fast.selection.strategies.reward_margins import few_ulps, margins, warn_if_alike


@dataclass(frozen=True)
class Aplp(Strategy):
    """Uncertain prompts, then confident pairs (Muldrew et al., arXiv 2402.08114).

    1. The predictive entropy of a prompt is estimated from its M distinct responses, whichever
       items they are in: H(x) = -(1/M) sum of log pi(y_m | x), in nats. The ceil(shortlist * n)
       prompts with the largest entropy are kept (of those with a candidate pair; all, if fewer).
    2. Of all their pairs, the n with the largest |d| are taken, where
       d = beta * ((log pi - log pi_ref)(y_a) - (log pi - log pi_ref)(y_b)).

    The source has two responses, so one pair, per prompt. With more, several pairs of one prompt
    may be taken. Options: `beta`, the temperature of DPO, and `shortlist`, at least 1, the number
    of prompts kept per pair asked for. The default of `shortlist` is a choice of this library. The
    score is |d|.

    With rules, the shortlist contains only prompts with a pair that may be picked, and the rules
    apply within it: if it is exhausted, fewer pairs come back. Random picks are from all prompts.
    """

    name: ClassVar[str] = "aplp"
    requires: ClassVar[frozenset[str]] = frozenset({"logps", "ref_logps"})
    beta: float = 0.1
    shortlist: float = 4.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_positive("shortlist", self.shortlist)
        if self.shortlist < 1:
            raise ActiveDPOError(f"shortlist must be 1 or more, not {self.shortlist}")

    def select(
        self,
        signals: Signals,
        n: int,
        *,
        eligible: Eligible | None = None,
        group: dist.ProcessGroup | None = None,
        show_progress: bool | None = None,
    ) -> Ranking:
        part = Part.of(signals, n, group)
        eligible = eligible or Eligible.everything(len(signals.pairs))
        margin, error_bound = margins(signals, self.beta, part)
        warn_if_alike(margin, error_bound)
        scores = margin.abs()
        drawn = rank_top(scores, error_bound, eligible.n_random, eligible, group)
        eligible.n_random = 0
        missing = part.n - len(drawn.indices)
        self._close_all_but_the_shortlist(signals, missing, eligible, group)
        chosen = rank_top(scores, error_bound, missing, eligible, group)
        return Ranking(
            torch.cat([drawn.indices, chosen.indices]), torch.cat([drawn.scores, chosen.scores])
        )

    def _close_all_but_the_shortlist(
        self, signals: Signals, n: int, eligible: Eligible, group: dist.ProcessGroup | None
    ) -> None:
        # A prompt may have items in several processes, so every process considers all prompts.
        processes = PoolProcesses(group)
        prompt_of_row = _prompt_of_row(signals, processes)
        prompt_of_pair = prompt_of_row[signals.pairs[:, 0]]
        repeated = torch.zeros_like(prompt_of_row) if signals.repeated is None else signals.repeated
        once = ~processes.gather(repeated).bool()
        logps = signals.logps()
        if signals.lengths is not None:  # the policy's entropy does not depend on the loss
            logps = logps * signals.lengths
        entropy = _entropy(processes.gather(logps)[once], processes.gather(prompt_of_row)[once])
        prompts = processes.gather(prompt_of_pair[eligible.remaining].unique()).unique()
        keep = min(len(prompts), math.ceil(self.shortlist * n))
        # `prompts` is ascending, so ties keep the pool's order.
        kept = rank_top(entropy[prompts], few_ulps(entropy[prompts]), keep).indices
        eligible.remaining &= torch.isin(prompt_of_pair, prompts[kept])


def _prompt_of_row(signals: Signals, processes: PoolProcesses) -> Tensor:
    """Return the number of each response's prompt in the whole pool, int64 [R]."""
    if signals.prompt_of_row is not None:
        return signals.prompt_of_row
    own = signals.item_of_row
    counts = processes.gather(torch.tensor([int(own.max()) + 1 if len(own) else 0]))
    return own + counts[: processes.rank].sum()


def _entropy(logps: Tensor, prompt_of_row: Tensor) -> Tensor:
    """Return -(mean of log pi over a prompt's responses), float64 [P]; NaN if it has no rows."""
    n_prompts = int(prompt_of_row.max()) + 1 if len(prompt_of_row) else 0
    total = logps.new_zeros(n_prompts).index_add_(0, prompt_of_row, logps)
    return -total / torch.bincount(prompt_of_row, minlength=n_prompts)
