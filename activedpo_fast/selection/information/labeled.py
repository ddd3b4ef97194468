"""V of the labeled pairs, where a selection starts."""

from __future__ import annotations

from activedpo_fast.selection.information.matrix import InformationMatrix
from activedpo_fast.selection.pair_features import PairFeatures


def labeled_information(
    candidates: PairFeatures, labeled: PairFeatures | None, *, lam: float, kappa: float = 1.0
) -> InformationMatrix:
    """Return (lam/kappa) I + the sum of phi phi^T over `labeled`, where the candidates are.

    Raises:
        ActiveDPOError: features of another width than the candidates'; see `InformationMatrix`.
    """
    information = InformationMatrix(candidates.dim, lam=lam, kappa=kappa, device=candidates.device)
    if labeled is not None:
        for phi in labeled.chunks():
            information.add_many(phi)
    return information
