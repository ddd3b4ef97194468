"""ActiveDPO: greedy log-det over gradients of the implicit reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.distributed as dist

from activedpo_fast.selection.eligible import Eligible
from activedpo_fast.selection.greedy.logdet import greedy_logdet
from activedpo_fast.selection.information.matrix import check_ridge
from activedpo_fast.selection.pair_features import Normalize, check_normalize
from activedpo_fast.selection.ranking import Ranking
from activedpo_fast.selection.signals import Signals
from activedpo_fast.selection.strategies.base import Part, Strategy


@dataclass(frozen=True)
class ActiveDPO(Strategy):
    """Greedy log-det over gradients of the implicit reward (Lin et al., arXiv 2505.19241).

    Options: `lam`, `kappa` (lambda and kappa; the paper does not give the value of lambda) and
    `normalize` ("response", "pair" or None). The score is phi^T V^-1 phi at the pick.
    """

    name: ClassVar[str] = "activedpo"
    requires: ClassVar[frozenset[str]] = frozenset({"gradients"})
    preselectable: ClassVar[bool] = True
    lam: float = 1.0
    kappa: float = 1.0
    normalize: Normalize = "response"

    def __post_init__(self) -> None:
        check_ridge(self.lam, self.kappa)
        check_normalize(self.normalize)

    def select(
        self,
        signals: Signals,
        n: int,
        *,
        eligible: Eligible | None = None,
        group: dist.ProcessGroup | None = None,
        show_progress: bool | None = None,
    ) -> Ranking:
        Part.of(signals, n, group)
        # Only the normalization by response needs individual rows, not just differences.
        relative = self.normalize != "response"
        return greedy_logdet(
            signals.gradients(relative=relative),
            signals.pairs,
            n,
            lam=self.lam,
            kappa=self.kappa,
            normalize=self.normalize,
            history=signals.history_gradients(relative=relative),
            eligible=eligible,
            group=group,
            device=signals.device,
            show_progress=show_progress,
        )
