"""The task with a known reward: real texts, a log-linear policy, and nothing hidden.

Prompts are descriptions of software packages, responses their one-line synopses: each prompt has
its own synopsis and those of the 15 packages with the most similar descriptions. Features are the
products of the MiniLM embeddings of prompt and response, entry by entry, of whose within-prompt
differences the first principal components are kept. The policy is pi(y|x) proportional to
exp(theta . f(x, y) / beta) over the prompt's 16 responses, so that the implicit reward is
theta . f up to a term of the prompt, everything is exact, and a run takes less than a second.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activedpo_fast._files import atomic_path
from activedpo_fast.demo.language_model import read_prompts
from activedpo_fast.demo.similarity import SynopsisSimilarity
from benchmarks.claims.components import principal_components
from benchmarks.claims.review_world import review_gradients

RESPONSES = 16  # of each prompt
DIM = 64  # principal components
PROMPTS, HELDOUT = 2000, 1000
SPREAD = 2.0  # standard deviation of the reward's difference within a prompt; labels have sigma(it)


@dataclass(frozen=True)
class World:
    """Prompts with all their responses.

    Attributes:
        features: float64 [P, 16, d]; heldout_features: the same of other prompts.
        reward: float64 [P, 16], the known reward; heldout_reward.
    """

    features: Tensor
    reward: Tensor
    heldout_features: Tensor
    heldout_reward: Tensor


def make_world(reward: str, seed: int, folder: Path, duplicates: float = 0.0) -> World:
    """The world of a seed.

    Args:
        reward: "linear", a random direction of the features, which the policy can learn exactly;
            "synopsis", the cosine of the response to the prompt's own synopsis, which it cannot;
            "reviews", the ratings of the review task, with that task's features (`review_world`).
        folder: where embeddings and gradients are kept.
        duplicates: share of the prompts that repeat one of the others, with a little noise in the
            features.
    """
    generator = torch.Generator().manual_seed(seed)
    if reward == "reviews":
        features, rewards = _reviews(folder)
        order = torch.randperm(len(features), generator=generator)[: PROMPTS + HELDOUT]
        features, rewards = features[order], rewards[order]
    else:
        features, rewards = _synopses(reward, folder, generator)
    features = features / features.square().sum(-1).mean().sqrt()
    rewards = rewards - rewards.mean(dim=1, keepdim=True)
    rewards = rewards * SPREAD / (2 * rewards.var(dim=1).mean()).sqrt()
    train = features[:PROMPTS], rewards[:PROMPTS]
    if duplicates:
        train = _with_duplicates(*train, duplicates, generator)
    return World(*train, features[PROMPTS:], rewards[PROMPTS:])


def _synopses(reward: str, folder: Path, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features and rewards of packages, [P, 16, DIM] and [P, 16]."""
    prompts, synopses, candidates = _packages(folder)
    order = torch.randperm(len(prompts), generator=generator)[: PROMPTS + HELDOUT]
    chosen = candidates[order]  # [., 16]
    raw = prompts[order, None, :] * synopses[chosen]
    raw = raw - raw.mean(dim=1, keepdim=True)
    features = principal_components(raw, DIM)
    if reward == "linear":
        return features, features @ torch.randn(
            features.shape[-1], generator=generator, dtype=torch.float64
        )
    return features, (synopses[order, None, :] * synopses[chosen]).sum(-1)


@functools.cache
def _reviews(folder: Path) -> tuple[Tensor, Tensor]:
    return review_gradients(folder, RESPONSES)


def _with_duplicates(
    features: Tensor, rewards: Tensor, share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Of the prompts, the last `share` are replaced by near copies of 1 in 50 of the others."""
    own = round(len(features) * (1 - share))
    kept = torch.cat(
        [
            torch.arange(own),
            torch.randint(max(1, own // 50), (len(features) - own,), generator=generator),
        ]
    )
    noise = torch.randn(features.shape, generator=generator, dtype=torch.float64)
    noise[:own] = 0
    size = features.square().mean().sqrt()
    return features[kept] + 0.05 * size * noise, rewards[kept]


def _candidates(prompts: Tensor) -> Tensor:
    """Each package and those with the most similar descriptions, int64 [P, 16]."""
    similar = (prompts @ prompts.T).fill_diagonal_(2.0)
    return similar.topk(RESPONSES, dim=1).indices


@functools.cache
def _packages(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of descriptions and synopses, and each package's candidates."""
    prompts, synopses = _embeddings(folder)
    return prompts, synopses, _candidates(prompts)


def _embeddings(folder: Path) -> tuple[Tensor, Tensor]:
    """Unit MiniLM embeddings of the demo's pool: descriptions and synopses, float64 [P, 384]."""
    path = folder / "embeddings.npz"
    if not path.exists():
        embed = SynopsisSimilarity().embed
        prompts = read_prompts("pool")
        texts: tuple[list[str], list[str]] = (
            [str(p.prompt).removesuffix("\n\nTL;DR:") for p in prompts],
            [str(p.extra["synopsis"]) for p in prompts],
        )
        found: list[NDArray[np.float32]] = [embed(part).numpy() for part in texts]
        with atomic_path(path) as temporary:
            np.savez(temporary, prompts=found[0], synopses=found[1])
    with np.load(path) as arrays:
        return tuple(
            torch.from_numpy(arrays[name]).double()  # type: ignore[return-value]
            for name in ("prompts", "synopses")
        )
