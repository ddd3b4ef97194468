"""Strategies: ways to choose n candidate pairs, behind one interface."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.selection.greedy import add_all, check_n, greedy_logdet, rank_top
from activedpo_fast.selection.information import InformationMatrix, check_positive
from activedpo_fast.selection.normalize import Normalize, PairFeatures, check_normalize
from activedpo_fast.selection.ranking import Ranking
from activedpo_fast.selection.ranks import Ranks
from activedpo_fast.selection.rules import Eligible, random_order
from activedpo_fast.selection.shares import Shares
from activedpo_fast.selection.signals import Signals

__all__ = ["STRATEGIES", "ActiveDPO", "AdpoPlus", "Apo", "Aplp", "MarginLarge", "MarginSmall",
           "Random", "Ranking", "Strategy", "make_strategy"]

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


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
        self, signals: Signals, n: int, *, eligible: Eligible | None = None,
        group: dist.ProcessGroup | None = None, show_progress: bool | None = None,
    ) -> Ranking:
        _Part.of(signals, n, group)
        # Only the normalisation by response looks at rows by themselves.
        relative = self.normalize != "response"
        return greedy_logdet(
            signals.gradients(relative=relative), signals.pairs, n, lam=self.lam, kappa=self.kappa,
            normalize=self.normalize, history=signals.history_gradients(relative=relative),
            eligible=eligible, group=group, device=signals.device, show_progress=show_progress,
        )


@dataclass(frozen=True)
class AdpoPlus(Strategy):
    """Greedy log-det of the DPO loss's Hessian (Kveton et al., arXiv 2503.01076).

    From the paper: the Hessian of the DPO loss of a log-linear policy is the sum over the pairs of
    v v^T with v = sqrt(mu (1 - mu)) beta phi (Lemma 1), mu = sigmoid(d) the probability that the
    first response is preferred and d as in `MarginSmall`. With V = gamma I + sum of v v^T, the pair
    with the largest v^T V^-1 v is taken, n times over (Algorithms 1 and 2). mu comes from a
    plug-in estimate of the policy: in ADPO from the labels so far, in ADPO+ once and for all from
    labels that all candidates already have. phi is a difference of embeddings, the last layer's.

    Here mu is the current model's and does not change within a batch. So this is ADPO+ where the
    model was trained on labels of all candidates, and ADPO in batches of n where it was trained on
    those so far. Choices of this library: phi is the gradient of the implicit reward, as in
    `ActiveDPO`, which for a log-linear policy is the paper's beta phi; the labelled pairs, too, are
    weighted by the current model's mu; gamma is `lam / kappa`. The paper's experiments put an upper
    confidence bound in the place of mu (1 - mu) (its eq. 13), which is left out here.

    Options: `lam`, `kappa`, `normalize` ("response", "pair" or None) as in `ActiveDPO`, and `beta`,
    the temperature of DPO. The score is v^T V^-1 v at the pick.
    """

    name: ClassVar[str] = "adpo_plus"
    requires: ClassVar[frozenset[str]] = frozenset({"gradients", "logps", "ref_logps"})
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
        self, signals: Signals, n: int, *, eligible: Eligible | None = None,
        group: dist.ProcessGroup | None = None, show_progress: bool | None = None,
    ) -> Ranking:
        part = _Part.of(signals, n, group)
        relative = self.normalize != "response"
        # The gradients first: log-probabilities may come with them for free.
        rows = signals.gradients(relative=relative)
        history = signals.history_gradients(relative=relative)
        margin, _ = _margins(signals, self.beta, part)
        labelled = _history_margins(signals, self.beta)
        if len(labelled) != len(history[1]):
            raise ActiveDPOError(f"{len(history[1])} labelled pairs have gradients, but "
                                 f"{len(labelled)} have log-probabilities")
        return greedy_logdet(
            rows, signals.pairs, n, lam=self.lam, kappa=self.kappa, normalize=self.normalize,
            history=history, weights=_uncertainty(margin), history_weights=_uncertainty(labelled),
            eligible=eligible, group=group, device=signals.device, show_progress=show_progress,
        )


@dataclass(frozen=True)
class Random(Strategy):
    """Pairs drawn uniformly without replacement. Every score is 0.0: there is no criterion.

    Option: `seed`. The same seed and number of candidates give the same pairs, so a loop takes
    another seed each round. A smaller n gives the first of the same draws. Under rules, the pairs
    that they forbid are passed over; costs have no influence, and a `min_score` above 0 is refused.
    """

    name: ClassVar[str] = "random"
    requires: ClassVar[frozenset[str]] = frozenset()
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ActiveDPOError(f"seed must be an integer, not {self.seed!r}")

    def select(
        self, signals: Signals, n: int, *, eligible: Eligible | None = None,
        group: dist.ProcessGroup | None = None, show_progress: bool | None = None,
    ) -> Ranking:
        part = _Part.of(signals, n, group)
        eligible = eligible or Eligible.everything(len(signals.pairs))
        if eligible.min_score > 0:
            raise ActiveDPOError("min_score: the strategy 'random' has no scores to compare with "
                                 f"{eligible.min_score}")
        eligible.n_random = part.n
        order = random_order(part.total, self.seed)
        eligible.random_order = order[part.offset:part.offset + len(signals.pairs)]
        zeros = torch.zeros(len(signals.pairs), dtype=torch.float64)
        return rank_top(zeros, zeros, part.n, eligible, group)


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
        self, signals: Signals, n: int, *, eligible: Eligible | None = None,
        group: dist.ProcessGroup | None = None, show_progress: bool | None = None,
    ) -> Ranking:
        part = _Part.of(signals, n, group)
        hidden, history = signals.hidden(), signals.history_hidden()

        def score() -> tuple[Tensor, Tensor]:
            candidates = PairFeatures(hidden, signals.pairs, None)
            information = InformationMatrix(candidates.dim, lam=self.ridge,
                                            device=candidates.device)
            add_all(information, PairFeatures(*history, None))
            everything = torch.arange(len(candidates))
            parts = [information.score(z).cpu() for z in candidates.chunks(everything)]
            scores = torch.cat([candidates.size[:0], *parts])
            error = information.error_scale() * candidates.size
            return scores, 2 * scores.sqrt() * error + error.square()

        return rank_top(*part.check(score), n, eligible, group)


@dataclass(frozen=True)
class Aplp(Strategy):
    """Uncertain prompts, then confident pairs (Muldrew et al., arXiv 2402.08114).

    1. The predictive entropy of a prompt is estimated from its M distinct responses, in whichever
       items they are, H(x) = -(1/M) sum of log pi(y_m | x), in nats. The ceil(shortlist * n)
       prompts with the largest stay (of those with a candidate pair; all, if there are fewer).
    2. Of all their pairs, the n with the largest |d| are taken, where
       d = beta * ((log pi - log pi_ref)(y_a) - (log pi - log pi_ref)(y_b)).

    The source has two responses, so one pair, a prompt. With more, several pairs of one prompt may
    be taken. Options: `beta`, the temperature of DPO, and `shortlist`, at least 1, prompts kept for
    each pair asked for. The default of `shortlist` is a choice of this library. The score is |d|.

    Under rules, the shortlist is of prompts with a pair that may be picked, and the rules hold
    within it: where they use it up, fewer pairs come back. Random picks are from all prompts.
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
        self, signals: Signals, n: int, *, eligible: Eligible | None = None,
        group: dist.ProcessGroup | None = None, show_progress: bool | None = None,
    ) -> Ranking:
        part = _Part.of(signals, n, group)
        eligible = eligible or Eligible.everything(len(signals.pairs))
        margin, doubt = _margins(signals, self.beta, part)
        _warn_if_alike(margin, doubt)
        scores = margin.abs()
        drawn = rank_top(scores, doubt, eligible.n_random, eligible, group)
        eligible.n_random = 0
        left = part.n - len(drawn.indices)
        self._close_all_but_the_shortlist(signals, left, eligible, group)
        chosen = rank_top(scores, doubt, left, eligible, group)
        return Ranking(torch.cat([drawn.indices, chosen.indices]),
                       torch.cat([drawn.scores, chosen.scores]))

    def _close_all_but_the_shortlist(
        self, signals: Signals, n: int, eligible: Eligible, group: dist.ProcessGroup | None
    ) -> None:
        # A prompt may have items in several processes: all of them look at all prompts.
        shares = Shares(group)
        prompt_of_row = _prompt_of_row(signals, shares)
        prompt_of_pair = prompt_of_row[signals.pairs[:, 0]]
        repeated = torch.zeros_like(prompt_of_row) if signals.repeated is None else signals.repeated
        once = ~shares.gather(repeated).bool()
        logps = signals.logps()
        if signals.lengths is not None:  # the policy's entropy does not depend on the loss
            logps = logps * signals.lengths
        entropy = _entropy(shares.gather(logps)[once], shares.gather(prompt_of_row)[once])
        prompts = shares.gather(prompt_of_pair[eligible.left].unique()).unique()
        keep = min(len(prompts), math.ceil(self.shortlist * n))
        # `prompts` go up: ties keep the pool's order.
        kept = rank_top(entropy[prompts], _few_ulps(entropy[prompts]), keep).indices
        eligible.left &= torch.isin(prompt_of_pair, prompts[kept])


@dataclass(frozen=True)
class _Margin(Strategy):
    """Pairs by the size of d = beta * the difference of log pi - log pi_ref."""

    requires: ClassVar[frozenset[str]] = frozenset({"logps", "ref_logps"})
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)


@dataclass(frozen=True)
class MarginLarge(_Margin):
    """The n pairs with the largest |d|, of whose preference the implicit reward is surest.

    d = beta * ((log pi - log pi_ref)(y_a) - (log pi - log pi_ref)(y_b)): the second step of `Aplp`
    alone. Option: `beta`, the temperature of DPO. The score is |d|.
    """

    name: ClassVar[str] = "margin_large"

    def select(
        self, signals: Signals, n: int, *, eligible: Eligible | None = None,
        group: dist.ProcessGroup | None = None, show_progress: bool | None = None,
    ) -> Ranking:
        margin, doubt = _margins(signals, self.beta, _Part.of(signals, n, group))
        _warn_if_alike(margin, doubt)
        return rank_top(margin.abs(), doubt, n, eligible, group)


@dataclass(frozen=True)
class MarginSmall(_Margin):
    """The n pairs with the smallest |d|, of whose preference the implicit reward is least sure.

    d = beta * ((log pi - log pi_ref)(y_a) - (log pi - log pi_ref)(y_b)), so that sigmoid(d) is the
    model's probability that y_a is preferred. Option: `beta`, the temperature of DPO. The score is
    sigmoid(-|d|), the probability of the less likely preference, at most 1/2; of pairs with |d|
    above 700, for which that is 0 in float64, the lowest index comes first.
    """

    name: ClassVar[str] = "margin_small"

    def select(
        self, signals: Signals, n: int, *, eligible: Eligible | None = None,
        group: dist.ProcessGroup | None = None, show_progress: bool | None = None,
    ) -> Ranking:
        margin, doubt = _margins(signals, self.beta, _Part.of(signals, n, group))
        _warn_if_alike(margin, doubt)
        # A positive score, and not -|d|, so that dividing it by a cost lowers it.
        scores = torch.sigmoid(-margin.abs())
        doubt = scores * (1 - scores) * doubt + _few_ulps(scores)
        return rank_top(scores, doubt, n, eligible, group)


STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy for strategy in (
        ActiveDPO, Random, Apo, Aplp, MarginSmall, MarginLarge, AdpoPlus)
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


class _Part(NamedTuple):
    """This process's part of the candidates: all of them, where it is alone.

    n: how many are to be picked of all. offset: the number of its first candidate. total: how many
    all have.
    """

    n: int
    offset: int
    total: int
    ranks: Ranks | None

    @classmethod
    def of(cls, signals: Signals, n: int, group: dist.ProcessGroup | None) -> _Part:
        """Counts the candidates, and refuses a bad n before signals are taken at great expense."""
        count = len(signals.pairs)
        if group is None:
            return cls(check_n(n, count), 0, count, None)
        ranks = Ranks(group, count)
        return cls(check_n(n, ranks.total), ranks.offset, ranks.total, ranks)

    def check(self, compute: Callable[[], Result]) -> Result:
        """What `compute` returns; where it raises in one process, all of them raise."""
        return compute() if self.ranks is None else self.ranks.check(compute)


def _margins(signals: Signals, beta: float, part: _Part) -> tuple[Tensor, Tensor]:
    """d of every candidate pair and a bound on its rounding error, both float64 [N]."""
    logps, ref_logps = signals.logps(), signals.ref_logps()

    def compute() -> tuple[Tensor, Tensor]:
        _finite(logps, "logps")
        _finite(ref_logps, "ref_logps")
        first, second = signals.pairs.unbind(1)
        reward = beta * (logps - ref_logps)
        size = beta * (logps.abs() + ref_logps.abs())
        return reward[first] - reward[second], _few_ulps(size[first] + size[second])

    return part.check(compute)


def _warn_if_alike(margins: Tensor, error_bound: Tensor) -> None:
    """One line of the log where the policy is its reference, as before any training."""
    if len(margins) and bool((margins.abs() <= error_bound).all()):
        logger.warning("every reward difference is 0, as before any training: pairs are not told "
                       "apart by it, and the first of the pool are taken")


def _history_margins(signals: Signals, beta: float) -> Tensor:
    """d of every labelled pair, float64 [t]."""
    parts = []
    for name, history in (("history_logps", signals.history_logps()),
                          ("history_ref_logps", signals.history_ref_logps())):
        numbers, pairs = history
        first, second = pairs.unbind(1)
        parts.append(_finite(numbers, name)[first] - numbers[second])
    logps, ref_logps = parts
    if len(logps) != len(ref_logps):
        raise ActiveDPOError(f"history_logps has {len(logps)} labelled pairs, history_ref_logps "
                             f"has {len(ref_logps)}")
    return beta * (logps - ref_logps)


def _uncertainty(d: Tensor) -> Tensor:
    """sqrt(mu (1 - mu)) for mu = sigmoid(d): positive, and accurate however large |d| is."""
    half = torch.exp(-d.abs() / 2)  # mu (1 - mu) = e^-|d| / (1 + e^-|d|)^2
    return (half / (1 + half.square())).clamp_min(torch.finfo(torch.float64).tiny)


def _prompt_of_row(signals: Signals, shares: Shares) -> Tensor:
    """The number of each response's prompt in the whole pool, int64 [R]."""
    if signals.prompt_of_row is not None:
        return signals.prompt_of_row
    own = signals.item_of_row
    counts = shares.gather(torch.tensor([int(own.max()) + 1 if len(own) else 0]))
    return own + counts[:shares.rank].sum()


def _entropy(logps: Tensor, prompt_of_row: Tensor) -> Tensor:
    """-(mean of log pi over the prompt's responses), float64 [P]; prompts without rows give nan."""
    n_prompts = int(prompt_of_row.max()) + 1 if len(prompt_of_row) else 0
    total = logps.new_zeros(n_prompts).index_add_(0, prompt_of_row, logps)
    return -total / torch.bincount(prompt_of_row, minlength=n_prompts)


def _finite(values: Tensor, name: str) -> Tensor:
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ActiveDPOError(f"{name} of response row {bad[0]} is not finite")
    return values


def _few_ulps(values: Tensor) -> Tensor:
    return 8 * torch.finfo(torch.float64).eps * values.abs()
