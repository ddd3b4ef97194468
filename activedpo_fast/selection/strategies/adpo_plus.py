"""ADPO+: greedy log-det of the Hessian of the DPO loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.distributed as dist

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.selection.eligible import Eligible
from activedpo_fast.selection.greedy.logdet import greedy_logdet
from activedpo_fast.selection.information.matrix import check_positive
from activedpo_fast.selection.pair_features import Normalize, check_normalize
from activedpo_fast.selection.ranking import Ranking
from activedpo_fast.selection.signals import Signals
from activedpo_fast.selection.strategies.base import Part, Strategy
from activedpo_fast.selection.strategies.reward_margins import history_margins, margins, uncertainty


@dataclass(frozen=True)
class AdpoPlus(Strategy):
    """Greedy log-det of the DPO loss's Hessian (Kveton et al., arXiv 2503.01076).

    From the paper: the Hessian of the DPO loss of a log-linear policy is the sum over the pairs of
    v v^T with v = sqrt(mu (1 - mu)) beta phi (Lemma 1), mu = sigmoid(d) the probability that the
    first response is preferred and d as in `MarginSmall`. With V = gamma I + sum of v v^T, the pair
    with the largest v^T V^-1 v is taken, n times (Algorithms 1 and 2). mu comes from a plug-in
    estimate of the policy: in ADPO from the labels so far, in ADPO+ computed once from labels that
    all candidates already have. phi is a difference of last-layer embeddings.

    Here mu is the current model's and does not change within a batch. So this is ADPO+ if the
    model was trained on labels of all candidates, and ADPO in batches of n if it was trained on the
    labels so far. Choices of this library: phi is the gradient of the implicit reward, as in
    `ActiveDPO`, which for a log-linear policy is the paper's beta phi; labeled pairs are also
    weighted by the current model's mu; gamma is `lam / kappa`. The paper's experiments replace
    mu (1 - mu) by an upper confidence bound (its eq. 13), which is left out here.

    Options: `lam`, `kappa`, `normalize` ("response", "pair" or None) as in `ActiveDPO`, and `beta`,
    the temperature of DPO. The score is v^T V^-1 v at the pick.
    """

    name: ClassVar[str] = "adpo_plus"
    requires: ClassVar[frozenset[str]] = frozenset({"gradients", "logps", "ref_logps"})
    preselectable: ClassVar[bool] = True
    lam: float = 1.0
    kappa: float = 1.0
    normalize: Normalize = None
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_positive("lam", self.lam)
        check_positive("kappa", self.kappa)
        check_normalize(self.normalize)
        check_positive("beta", self.beta)

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
        relative = self.normalize != "response"
        # Gradients first: log-probs may come with them for free.
        rows = signals.gradients(relative=relative)
        history = signals.history_gradients(relative=relative)
        margin, _ = margins(signals, self.beta, part)
        labeled = history_margins(signals, self.beta)
        if len(labeled) != len(history[1]):
            raise ActiveDPOError(
                f"{len(history[1])} labeled pairs have gradients, but {len(labeled)} have "
                "log-probabilities"
            )
        return greedy_logdet(
            rows,
            signals.pairs,
            n,
            lam=self.lam,
            kappa=self.kappa,
            normalize=self.normalize,
            history=history,
            weights=uncertainty(margin),
            history_weights=uncertainty(labeled),
            eligible=eligible,
            group=group,
            device=signals.device,
            show_progress=show_progress,
        )
