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

from activedpo_fast.selection.information import InformationMatrix
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
}
EVERYTHING = "all labels"


@dataclass(frozen=True)
class Setting:
    """One experiment; the defaults are those of the main comparison."""

    reward: str = "linear"
    rounds: int = 10
    batch_size: int = 10
    prompts_per_round: int = 100
    n_responses: int = 3
    temperature: float = 1.0  # of the labels, in units in which differences have spread 2
    duplicates: float = 0.0
    train_on: str = "all"
    options: dict[str, Any] = field(default_factory=dict)  # of the strategy, beside METHODS' own


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
    history: list[tuple[int, int, int]] = []  # prompt, first response, second response
    known: set[tuple[int, int, int]] = set()
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
        pairs = select(world, theta, method, setting, prompts, rows, history, known,
                       seed + 1000 * t)
        newest = []
        for prompt, a, b in pairs:
            better = draw(world, prompt, a, b, setting.temperature, seed)
            difference = world.features[prompt, a] - world.features[prompt, b]
            newest.append(difference if better else -difference)
            right += better == bool(world.reward[prompt, a] > world.reward[prompt, b])
        history += pairs
        known.update(pairs)
        chosen += newest
        theta = fit(torch.stack(chosen if setting.train_on == "all" else newest))
    return Trace(reward, divergence(world, theta), accuracy(world, theta), right / len(history),
                 *bound(world, theta, torch.stack(chosen)))


def select(
    world: World, theta: Tensor, method: str, setting: Setting, prompts: Tensor, rows: Tensor,
    history: Sequence[tuple[int, int, int]], known: set[tuple[int, int, int]], seed: int,
) -> list[tuple[int, int, int]]:
    """The picks of a round, as (prompt, response, response); `rows` are the responses [n, M]."""
    m = rows.shape[1]
    upper = torch.triu_indices(m, m, offset=1).T
    numbers = torch.arange(rows.numel()).view(rows.shape)
    pairs = numbers[:, upper].flatten(0, 1)
    prompt_of, response_of = prompts.repeat_interleave(m), rows.flatten()
    names = [_named(int(prompt_of[a]), int(response_of[a]), int(response_of[b]))
             for a, b in pairs.tolist()]
    fresh = torch.tensor([n for n, name in enumerate(names) if name not in known])
    if method == EVERYTHING:
        return [names[n] for n in fresh.tolist()]
    strategy, options = METHODS[method]
    options = {**options, **setting.options}
    if strategy == "random":
        options["seed"] = seed
    past = torch.tensor(history, dtype=torch.int64).view(-1, 3)
    past_rows = past[:, [0, 1, 0, 2]].view(-1, 2)  # (prompt, response), two a pair
    past_pairs = torch.arange(2 * len(past)).view(-1, 2)
    own, before = (prompt_of, response_of), past_rows.unbind(1)
    gradients, past_gradients = (gradient(world, theta, *at) for at in (own, before))
    logps, past_logps = (log_probability(world, theta, *at) for at in (own, before))
    hidden, past_hidden = (world.features[at] for at in (own, before))
    uniform, past_uniform = (torch.full_like(x, -math.log(RESPONSES)) for x in (logps, past_logps))
    signals = TensorSignals(
        pairs[fresh], torch.arange(len(prompts)).repeat_interleave(m), gradients=gradients,
        hidden=hidden, logps=BETA * logps, ref_logps=BETA * uniform,
        history_gradients=(past_gradients, past_pairs), history_hidden=(past_hidden, past_pairs),
        history_logps=(BETA * past_logps, past_pairs),
        history_ref_logps=(BETA * past_uniform, past_pairs))
    chosen = TRIALS[strategy](**options) if strategy in TRIALS else make_strategy(
        strategy, **options)
    ranking = chosen.select(signals, setting.batch_size, show_progress=False)
    return [names[fresh[n]] for n in ranking.indices.tolist()]


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
    agree = ((implicit[:, first] > implicit[:, second])
             == (world.heldout_reward[:, first] > world.heldout_reward[:, second]))
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
    return ([float(error[part].mean()) for part in tenths],
            [float(width[part].mean()) for part in tenths])


def _named(prompt: int, a: int, b: int) -> tuple[int, int, int]:
    return (prompt, min(a, b), max(a, b))


def _generator(seed: int, what: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{what}".encode()))
