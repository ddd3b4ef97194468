"""APO: the pairs whose hidden-state difference has the largest uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from activedpo_fast.selection.eligible import Eligible
from activedpo_fast.selection.greedy.top import rank_top
from activedpo_fast.selection.information.labeled import labeled_information
from activedpo_fast.selection.information.matrix import check_positive
from activedpo_fast.selection.pair_features import PairFeatures
from activedpo_fast.selection.ranking import Ranking
from activedpo_fast.selection.signals import Signals
from activedpo_fast.selection.strategies.base import Part, Strategy


@dataclass(frozen=True)
class Apo(Strategy):
    """The n largest z^T V^-1 z (Das et al., arXiv 2402.10500).

    z = h(x, y_a) - h(x, y_b), h the last layer's hidden state at the last response token;
    V = ridge * I + sum of z z^T over the labeled pairs. V does not change within the batch; the
    batch enters V once it comes back as history. Option: `ridge`. The score is z^T V^-1 z.
    """

    name: ClassVar[str] = "apo"
    requires: ClassVar[frozenset[str]] = frozenset({"hidden"})
    ridge: float = 1e-5

    def __post_init__(self) -> None:
        check_positive("ridge", self.ridge)

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
        hidden, history = signals.hidden(), signals.history_hidden()

        def score() -> tuple[Tensor, Tensor]:
            candidates = PairFeatures(hidden, signals.pairs, None)
            labeled = PairFeatures(*history, None)
            information = labeled_information(candidates, labeled, lam=self.ridge)
            parts = [information.score(z).cpu() for z in candidates.chunks()]
            scores = torch.cat([candidates.size[:0], *parts])
            error = information.error_scale() * candidates.size
            return scores, 2 * scores.sqrt() * error + error.square()

        return rank_top(*part.everywhere(score), n, eligible, group)
