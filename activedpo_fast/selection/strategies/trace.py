"""V-optimal design: the pairs most informative about the policy's own likely responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.distributed as dist
from torch import Tensor

from activedpo_fast.selection.eligible import Eligible
from activedpo_fast.selection.greedy.trace import greedy_trace
from activedpo_fast.selection.information.matrix import check_positive
from activedpo_fast.selection.ranking import Ranking
from activedpo_fast.selection.signals import Signals
from activedpo_fast.selection.strategies.base import Part, Strategy
from activedpo_fast.selection.strategies.reward_margins import history_margins, margins, uncertainty


@dataclass(frozen=True)
class Trace(Strategy):
    """Greedy choice of the pairs that lower tr(I V^-1) most (V-optimality).

    V is that of `ActiveDPO` without normalization, and I the covariance of the gradients g over the
    policy's own responses to each prompt, of which the candidates are a sample: see `greedy_trace`.
    `ActiveDPO` reduces the volume of the uncertainty, in all directions equally; this strategy
    reduces the uncertainty about the rewards of the policy's own responses. "Which Pairs to
    Compare" (arXiv 2606.19607) derives the criterion for DPO.

    Options: `lam` and `kappa` as in `ActiveDPO`; `targets`, the maximum number of rows in I. The
    score is the decrease of tr(I V^-1) at the pick.
    """

    name: ClassVar[str] = "trace"
    requires: ClassVar[frozenset[str]] = frozenset({"gradients"})
    lam: float = 1.0
    kappa: float = 1.0
    targets: int = 1024

    def __post_init__(self) -> None:
        check_positive("lam", self.lam)
        check_positive("kappa", self.kappa)
        check_positive("targets", self.targets)

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
        # Gradients first: log-probs may come with them for free.
        rows = signals.gradients(relative=True)
        history = signals.history_gradients(relative=True)
        weights, history_weights = self._weights(signals, part)
        return greedy_trace(
            rows,
            signals.pairs,
            n,
            signals.item_of_row,
            lam=self.lam,
            kappa=self.kappa,
            weights=weights,
            history=history,
            history_weights=history_weights,
            targets=self.targets,
            eligible=eligible,
            group=group,
            show_progress=show_progress,
        )

    def _weights(self, signals: Signals, part: Part) -> tuple[Tensor | None, Tensor | None]:
        """Return feature weights of the candidates, float64 [N], and of the labeled pairs, [t]."""
        return None, None


@dataclass(frozen=True)
class TracePlus(Trace):
    """`Trace` with the features of `AdpoPlus`: phi times sqrt(mu (1 - mu)).

    mu is the current model's probability that the first response is preferred. A label that the
    model can predict adds little information.

    Options: those of `Trace`, and `beta`, the temperature of DPO.
    """

    name: ClassVar[str] = "trace_plus"
    requires: ClassVar[frozenset[str]] = frozenset({"gradients", "logps", "ref_logps"})
    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)

    def _weights(self, signals: Signals, part: Part) -> tuple[Tensor | None, Tensor | None]:
        margin, _ = margins(signals, self.beta, part)
        return uncertainty(margin), uncertainty(history_margins(signals, self.beta))
