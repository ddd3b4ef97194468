"""Strategies: ways to choose n candidate pairs, behind one interface."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.selection.greedy import Ranking, check_n, greedy_logdet, rank_top
from activedpo_fast.selection.information import InformationMatrix, check_positive
from activedpo_fast.selection.normalize import Normalize, PairFeatures, check_normalize
from activedpo_fast.selection.signals import Signals

__all__ = ["STRATEGIES", "ActiveDPO", "Apo", "Aplp", "Random", "Ranking", "Strategy",
           "make_strategy"]


class Strategy(ABC):
    """A way to choose pairs. Subclasses are dataclasses whose fields are their options.

    Attributes:
        name: what `make_strategy` knows it by.
        requires: the signals it asks for, of "gradients", "hidden", "logps", "ref_logps".
            "gradients" and "hidden" include their history.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]

    @abstractmethod
    def select(
        self, signals: Signals, n: int, *, show_progress: bool | None = None
    ) -> Ranking:
        """The n candidate pairs to label, best first; ties to the lowest index.

        Raises:
            ActiveDPOError: n is not an integer from 0 to the number of candidate pairs, or a signal
                is missing or not finite.
        """

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Names of the options that `make_strategy` takes for this strategy."""
        return tuple(field.name for field in fields(cls))  # type: ignore[arg-type]


@dataclass(frozen=True)
class ActiveDPO(Strategy):
    """Greedy log-det over gradients of the implicit reward (Lin et al., arXiv 2505.19241).

    Options: `lam`, `kappa` (lambda and kappa; the value of lambda is not known from the paper) and
    `normalize` ("response", "pair" or None). The score is phi^T V^-1 phi at the pick.
    """

    name: ClassVar[str] = "activedpo"
    requires: ClassVar[frozenset[str]] = frozenset({"gradients"})
    lam: float = 1.0
    kappa: float = 1.0
    normalize: Normalize = "response"

    def __post_init__(self) -> None:
        check_positive("lam", self.lam)
        check_positive("kappa", self.kappa)
        check_normalize(self.normalize)

    def select(
        self, signals: Signals, n: int, *, show_progress: bool | None = None
    ) -> Ranking:
        check_n(n, len(signals.pairs))
        # Only the normalisation by response looks at rows by themselves.
        relative = self.normalize != "response"
        return greedy_logdet(
            signals.gradients(relative=relative), signals.pairs, n, lam=self.lam, kappa=self.kappa,
            normalize=self.normalize, history=signals.history_gradients(relative=relative),
            show_progress=show_progress,
        )


@dataclass(frozen=True)
class Random(Strategy):
    """Pairs drawn uniformly without replacement. Every score is 0.0: there is no criterion.

    Option: `seed`. The same seed and number of candidates give the same pairs, so a loop takes
    another seed each round. A smaller n gives the first of the same draws.
    """

    name: ClassVar[str] = "random"
    requires: ClassVar[frozenset[str]] = frozenset()
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ActiveDPOError(f"seed must be an integer, not {self.seed!r}")

    def select(
        self, signals: Signals, n: int, *, show_progress: bool | None = None
    ) -> Ranking:
        n = check_n(n, len(signals.pairs))
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randperm(len(signals.pairs), generator=generator)[:n]
        return Ranking(drawn, torch.zeros(n, dtype=torch.float64))


@dataclass(frozen=True)
class Apo(Strategy):
    """The n largest z^T V^-1 z (Das et al., arXiv 2402.10500).

    z = h(x, y_a) - h(x, y_b), h the last layer's hidden state at the last response token;
    V = ridge * I + sum of z z^T over the labelled pairs. V does not change within the batch: it
    takes this batch in when it comes back as history. Option: `ridge`. The score is z^T V^-1 z.
    """

    name: ClassVar[str] = "apo"
    requires: ClassVar[frozenset[str]] = frozenset({"hidden"})
    ridge: float = 1e-5

    def __post_init__(self) -> None:
        check_positive("ridge", self.ridge)

    def select(
        self, signals: Signals, n: int, *, show_progress: bool | None = None
    ) -> Ranking:
        check_n(n, len(signals.pairs))
        candidates = PairFeatures(signals.hidden(), signals.pairs, None)
        labelled = PairFeatures(*signals.history_hidden(), None)
        information = InformationMatrix(candidates.dim, lam=self.ridge, device=candidates.device)
        for z in labelled.chunks(torch.arange(len(labelled), device=labelled.device)):
            information.add_many(z)
        everything = torch.arange(len(candidates), device=candidates.device)
        parts = [information.score(z) for z in candidates.chunks(everything)]
        scores = torch.cat([candidates.size[:0], *parts])
        error = information.error_scale() * candidates.size
        return rank_top(scores, 2 * scores.sqrt() * error + error.square(), n)


@dataclass(frozen=True)
class Aplp(Strategy):
    """Uncertain prompts, then confident pairs (Muldrew et al., arXiv 2402.08114).

    1. The predictive entropy of a prompt is estimated from its M responses,
       H(x) = -(1/M) sum of log pi(y_m | x), in nats. The ceil(shortlist * n) prompts with the
       largest stay (of those with a candidate pair; all, if there are fewer).
    2. Of all their pairs, the n with the largest |sigmoid(d) - 1/2| are taken, where
       d = beta * ((log pi - log pi_ref)(y_a) - (log pi - log pi_ref)(y_b)).

    The source has two responses, so one pair, a prompt. With more, several pairs of one prompt may
    be taken. Options: `beta`, the temperature of DPO, and `shortlist`, at least 1, prompts kept for
    each pair asked for. The default of `shortlist` is a choice of this library. The score is
    |sigmoid(d) - 1/2|; the order is that of |d|, which does not saturate.
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
        self, signals: Signals, n: int, *, show_progress: bool | None = None
    ) -> Ranking:
        n = check_n(n, len(signals.pairs))
        logps = _finite(signals.logps(), "logps")
        ref_logps = _finite(signals.ref_logps(), "ref_logps")
        first, second = signals.pairs.unbind(1)

        prompt_of_pair = signals.item_of_row[first]
        prompts = prompt_of_pair.unique()  # ascending, so that ties keep the pool's order
        entropy = _entropy(logps, signals.item_of_row)[prompts]
        keep = min(len(prompts), math.ceil(self.shortlist * n))
        kept = prompts[rank_top(entropy, _few_ulps(entropy), keep).indices]
        shortlisted = torch.isin(prompt_of_pair, kept).nonzero().flatten()

        margin = logps - ref_logps
        d = self.beta * (margin[first] - margin[second])[shortlisted].abs()
        size = (logps.abs() + ref_logps.abs())
        doubt = self.beta * _few_ulps(size[first] + size[second])[shortlisted]
        chosen = rank_top(d, doubt, n).indices
        # |sigmoid(d) - 1/2| = tanh(d/2)/2
        return Ranking(shortlisted[chosen], torch.tanh(d[chosen] / 2) / 2)


STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy for strategy in (ActiveDPO, Random, Apo, Aplp)
}


def make_strategy(name: str, **options: Any) -> Strategy:
    """The strategy called `name`, one of `STRATEGIES`, with its options.

    Raises:
        ActiveDPOError: a name or option that is not known, listing those that are; a bad value.
    """
    if name not in STRATEGIES:
        raise ActiveDPOError(f"unknown strategy {name!r}; known: {', '.join(STRATEGIES)}")
    known = STRATEGIES[name].options()
    for option in options:
        if option not in known:
            raise ActiveDPOError(f"strategy {name!r} has no option {option!r}; "
                                 f"known: {', '.join(known)}")
    return STRATEGIES[name](**options)


def _entropy(logps: Tensor, item_of_row: Tensor) -> Tensor:
    """-(mean of log pi over the item's responses), float64 [P]; items without rows give nan."""
    n_items = int(item_of_row.max()) + 1 if len(item_of_row) else 0
    total = logps.new_zeros(n_items).index_add_(0, item_of_row, logps)
    return -total / torch.bincount(item_of_row, minlength=n_items)


def _finite(values: Tensor, name: str) -> Tensor:
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ActiveDPOError(f"{name} of response row {bad[0]} is not finite")
    return values


def _few_ulps(values: Tensor) -> Tensor:
    return 8 * torch.finfo(torch.float64).eps * values.abs()
