"""Rounds of active DPO with a log-linear policy and a known reward, exactly and quickly.

What a round does is what `ActiveDPOLoop` does: responses are sampled from the current policy, pairs
are picked by the library's own strategies, labels are drawn by Bradley-Terry, and the policy is the
minimum of the DPO loss on all labels so far, found by Newton's method.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from activedpo_fast.gradients.sketch import Sketch, SketchPlan
from activedpo_fast.selection.information.matrix import InformationMatrix
from activedpo_fast.selection.signals import TensorSignals
from activedpo_fast.selection.strategies import make_strategy
from benchmarks.claims.trial_strategies import TRIALS
from benchmarks.claims.world import RESPONSES, World

BETA = 0.5
RIDGE = 0.05  # of the loss: weight decay, which keeps the minimum finite
NEWTON_STEPS = 12

# name: (strategy, options)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random", {}),
    "activedpo, response": ("activedpo", {"normalize": "response"}),
    "activedpo, pair": ("activedpo", {"normalize": "pair"}),
    "activedpo, none": ("activedpo", {"normalize": None}),
    "adpo_plus": ("adpo_plus", {"beta": 1.0}),
    "apo": ("apo", {}),
    "aplp": ("aplp", {"beta": 1.0}),
    "margin_small": ("margin_small", {"beta": 1.0}),
    "margin_large": ("margin_large", {"beta": 1.0}),
    "trace": ("trace", {}),
    "trace_plus": ("trace_plus", {"beta": 1.0}),
    "diagonal V": ("diagonal", {}),
    "V fixed in a batch": ("at_once", {}),
}
EVERYTHING = "all labels"


@dataclass(frozen=True)
class Setting:
    """One experiment; the defaults are those of the main comparison.

    temperature: of the labels, in units in which differences have spread 2. options: of the
    strategy, beside METHODS' own. history: what V has of the labeled pairs: their gradients at the
    "current" parameters, those at which they were labeled ("frozen"), or nothing ("none").
    proj_dim: numbers to which gradients are sketched; 0 for none. random_share: of each batch,
    picked at random after the strategy's own picks.
    """

    reward: str = "linear"
    rounds: int = 10
    batch_size: int = 10
    prompts_per_round: int = 100
    n_responses: int = 3
    temperature: float = 1.0
    duplicates: float = 0.0
    train_on: str = "all"
    options: dict[str, Any] = field(default_factory=dict)
    history: str = "current"
    proj_dim: int = 0
    random_share: float = 0.0


class Trace(NamedTuple):
    """A run: what the policy earns, and how far the bound holds at its end.

    reward: after each round, the start first: share of what the policy with the true reward as its
        own earns, over the uniform policy, on held-out prompts.
    kl: KL(pi, uniform) in nats, at the end.
    accuracy: share of held-out pairs whose better response has the larger implicit reward, at the
        end.
    agreement: share of the labels that are of the better response.
    error, width: mean over held-out pairs of each tenth by width, of |estimated - true difference|
        and of the width |phi|_{V^-1}.
    """

    reward: list[float]
    kl: float
    accuracy: float
    agreement: float
    error: list[float]
    width: list[float]


def run(world: World, method: str, setting: Setting, seed: int) -> Trace:
    """All rounds of one method; labels and responses are those of the seed, whatever the method."""
    d = world.features.shape[-1]
    theta = torch.zeros(d, dtype=torch.float64)
    chosen: list[Tensor] = []  # [d], features of the preferred less those of the other response
    newest: list[Tensor] = []
    history = History([], [])
    order = torch.randperm(len(world.features), generator=_generator(seed, "prompts"))
    reward = []
    right = 0
    for t in range(setting.rounds + 1):
        reward.append(earned(world, theta))
        if t == setting.rounds:
            break
        first = t * setting.prompts_per_round
        prompts = order[torch.arange(first, first + setting.prompts_per_round) % len(order)]
        rows = sample(world, theta, prompts, setting.n_responses, _generator(seed, f"round {t}"))
        pairs = select(world, theta, method, setting, prompts, rows, history, seed + 1000 * t)
        newest = []
        for prompt, a, b in pairs:
            better = draw(world, prompt, a, b, setting.temperature, seed)
            difference = world.features[prompt, a] - world.features[prompt, b]
            newest.append(difference if better else -difference)
            right += better == bool(world.reward[prompt, a] > world.reward[prompt, b])
        history.add(world, theta, pairs)
        chosen += newest
        theta = fit(torch.stack(chosen if setting.train_on == "all" else newest))
    return Trace(
        reward,
        divergence(world, theta),
        accuracy(world, theta),
        right / len(history.pairs),
        *bound(world, theta, torch.stack(chosen)),
    )


class History(NamedTuple):
    """The labeled pairs as (prompt, response, response), and the two gradients of each, float64
    [2, d], at the parameters at which it was picked."""

    pairs: list[tuple[int, int, int]]
    gradients: list[Tensor]

    def add(self, world: World, theta: Tensor, pairs: list[tuple[int, int, int]]) -> None:
        """Add those picked at theta."""
        self.pairs.extend(pairs)
        self.gradients.extend(gradient(world, theta, *_responses(pairs)).view(len(pairs), 2, -1))


def select(
    world: World,
    theta: Tensor,
    method: str,
    setting: Setting,
    prompts: Tensor,
    rows: Tensor,
    history: History,
    seed: int,
) -> list[tuple[int, int, int]]:
    """The picks of a round, as (prompt, response, response); `rows` are the responses [n, M]."""
    m = rows.shape[1]
    upper = torch.triu_indices(m, m, offset=1).T
    numbers = torch.arange(rows.numel()).view(rows.shape)
    pairs = numbers[:, upper].flatten(0, 1)
    own = prompts.repeat_interleave(m), rows.flatten()
    known = set(history.pairs)
    named = [_named(int(own[0][a]), int(own[1][a]), int(own[1][b])) for a, b in pairs.tolist()]
    fresh = [n for n, name in enumerate(named) if name not in known]
    names = [named[n] for n in fresh]
    if method == EVERYTHING:
        return names
    signals = signals_of(world, theta, setting, pairs[torch.tensor(fresh)], own, history, m)
    strategy, options = METHODS[method]
    options = {**options, **setting.options}
    if strategy == "random":
        options["seed"] = seed
    chosen = (
        TRIALS[strategy](**options) if strategy in TRIALS else make_strategy(strategy, **options)
    )
    at_random = round(setting.random_share * setting.batch_size)
    picks = chosen.select(
        signals, setting.batch_size - at_random, show_progress=False
    ).indices.tolist()
    if at_random:
        order = torch.randperm(len(names), generator=_generator(seed, "share")).tolist()
        picks += [n for n in order if n not in picks][:at_random]
    return [names[n] for n in picks]


def signals_of(
    world: World,
    theta: Tensor,
    setting: Setting,
    pairs: Tensor,
    own: tuple[Tensor, Tensor],
    history: History,
    m: int,
) -> TensorSignals:
    """All that a strategy may look at; `own` are the candidates' prompts and responses, [n]."""
    labeled = [] if setting.history == "none" else history.pairs
    past = _responses(labeled)
    past_pairs = torch.arange(2 * len(labeled)).view(-1, 2)
    gradients, past_gradients = (gradient(world, theta, *at) for at in (own, past))
    if setting.history == "frozen" and labeled:
        past_gradients = torch.cat(history.gradients)
    if setting.proj_dim:
        gradients, past_gradients = (
            sketched(rows, setting.proj_dim) for rows in (gradients, past_gradients)
        )
    logps, past_logps = (log_probability(world, theta, *at) for at in (own, past))
    uniform, past_uniform = (torch.full_like(x, -math.log(RESPONSES)) for x in (logps, past_logps))
    return TensorSignals(
        pairs,
        torch.arange(len(own[0]) // m).repeat_interleave(m),
        gradients=gradients,
        hidden=world.features[own],
        logps=BETA * logps,
        ref_logps=BETA * uniform,
        history_gradients=(past_gradients, past_pairs),
        history_hidden=(world.features[past], past_pairs),
        history_logps=(BETA * past_logps, past_pairs),
        history_ref_logps=(BETA * past_uniform, past_pairs),
    )


def sketched(rows: Tensor, dim: int) -> Tensor:
    """The library's Rademacher sketch of gradients [n, d], as of one parameter: [n, dim]."""
    out = torch.zeros(len(rows), dim, dtype=torch.float64)
    if len(rows):
        plan = SketchPlan(Sketch("rademacher", dim), [("theta", rows.shape[1:])])
        numbers = torch.arange(len(rows))
        ones = torch.ones(len(rows), 1, dtype=torch.float64)
        plan.add(out, [("theta", rows, ones)], torch.stack([numbers, numbers + 1, numbers], dim=1))
    return out


def policy(world: World, theta: Tensor, prompts: Tensor) -> Tensor:
    """log pi(y|x) of all responses to some prompts, [n, 16]."""
    return torch.log_softmax(world.features[prompts] @ theta / BETA, dim=1)


def log_probability(world: World, theta: Tensor, prompts: Tensor, responses: Tensor) -> Tensor:
    """log pi(y|x) of single responses, [n]."""
    return policy(world, theta, prompts).gather(1, responses[:, None]).squeeze(1)


def gradient(world: World, theta: Tensor, prompts: Tensor, responses: Tensor) -> Tensor:
    """beta * grad log pi(y|x) = f(x, y) - E f(x, .), [n, d]."""
    mean = policy(world, theta, prompts).exp().unsqueeze(1) @ world.features[prompts]
    return world.features[prompts, responses] - mean.squeeze(1)


def sample(
    world: World, theta: Tensor, prompts: Tensor, m: int, generator: torch.Generator
) -> Tensor:
    """m different responses to each prompt, as if drawn one after the other, int64 [n, m].

    The largest of log pi + Gumbel noise: policies that are alike then get the same responses.
    """
    uniform = torch.rand(len(prompts), RESPONSES, generator=generator, dtype=torch.float64)
    return (policy(world, theta, prompts) - (-uniform.log()).log()).topk(m, dim=1).indices


def draw(world: World, prompt: int, a: int, b: int, temperature: float, seed: int) -> bool:
    """Whether a is preferred to b; the same draw for the same pair and seed."""
    advantage = float(world.reward[prompt, a] - world.reward[prompt, b]) / temperature
    uniform = (zlib.crc32(f"{seed}/{prompt}/{a}/{b}".encode()) + 0.5) / 2**32
    return uniform < 1 / (1 + math.exp(-advantage))


def fit(differences: Tensor) -> Tensor:
    """The minimum over theta of -sum log sigmoid(theta . d) + RIDGE/2 |theta|^2; d float64 [t, k].

    For a log-linear policy, with theta / beta in its exponent, that is the DPO loss.
    """
    d = differences.numpy()
    theta = np.zeros(d.shape[1])
    for _ in range(NEWTON_STEPS):
        wrong = 1 / (1 + np.exp(d @ theta))
        slope = RIDGE * theta - d.T @ wrong
        curvature = (d.T * (wrong * (1 - wrong))) @ d + RIDGE * np.eye(len(theta))
        step = np.linalg.solve(curvature, slope)
        theta -= step
        if np.abs(step).max() < 1e-10:
            break
    return torch.from_numpy(theta)


def earned(world: World, theta: Tensor) -> float:
    """`reward` of a `Trace`."""
    own = torch.softmax(world.heldout_features @ theta / BETA, dim=1)
    best = torch.softmax(world.heldout_reward / BETA, dim=1)
    reward = world.heldout_reward - world.heldout_reward.mean()
    return float((own * reward).sum() / (best * reward).sum())


def divergence(world: World, theta: Tensor) -> float:
    """`kl` of a `Trace`."""
    logps = torch.log_softmax(world.heldout_features @ theta / BETA, dim=1)
    return float((logps.exp() * (logps + math.log(RESPONSES))).sum(1).mean())


def accuracy(world: World, theta: Tensor) -> float:
    """`accuracy` of a `Trace`."""
    implicit = world.heldout_features @ theta
    first, second = torch.triu_indices(RESPONSES, RESPONSES, offset=1)
    agree = (implicit[:, first] > implicit[:, second]) == (
        world.heldout_reward[:, first] > world.heldout_reward[:, second]
    )
    return float(agree.double().mean())


def bound(world: World, theta: Tensor, chosen: Tensor) -> tuple[list[float], list[float]]:
    """Error and width of held-out pairs, each the mean of a tenth by width; see `Trace`."""
    information = InformationMatrix(chosen.shape[1], lam=1.0)
    information.add_many(chosen)
    phi = world.heldout_features[:, 0] - world.heldout_features[:, 1]
    truth = world.heldout_reward[:, 0] - world.heldout_reward[:, 1]
    width = information.score(phi).sqrt()
    error = (phi @ theta - truth).abs()
    tenths = width.argsort().tensor_split(10)
    return (
        [float(error[part].mean()) for part in tenths],
        [float(width[part].mean()) for part in tenths],
    )


def _responses(pairs: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    """Prompt and response of both responses of pairs, int64 [2t] each."""
    table = torch.tensor(pairs, dtype=torch.int64).view(-1, 3)
    prompts, responses = table[:, [0, 1, 0, 2]].view(-1, 2).unbind(1)
    return prompts, responses


def _named(prompt: int, a: int, b: int) -> tuple[int, int, int]:
    return (prompt, min(a, b), max(a, b))


def _generator(seed: int, what: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{what}".encode()))
