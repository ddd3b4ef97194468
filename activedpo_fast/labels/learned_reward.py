"""A reward that is learned from the labels so far, on embeddings from outside the policy."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.texts import Text
from activedpo_fast.selection.result import Selection


class Embed(Protocol):
    """A function that returns one vector per response, [n, d]: a tensor, an array or lists."""

    def __call__(self, prompts: Sequence[Text], responses: Sequence[Text]) -> Any: ...


class LearnedReward:
    """A `Reward` for the strategy reward_gap: a ridge regression from embeddings to the labels.

    With x a pair's difference of embeddings, divided by the labeled pairs' mean |x|, and y = 1
    where the first response is preferred, else -1, it minimizes ridge |w|^2 plus the sum of
    (w^T x - y)^2 over the labeled pairs. A response's reward is w^T of its embedding. Before there
    are labels, rewards are random numbers of the texts, so that picks are random.

    A language model's own states may say little about the reward; a sentence encoder's often say
    more. docs/evidence.md compares them.

    Args:
        embed: the encoder, for example `lambda prompts, responses: encoder.encode([p + r for p, r
            in zip(prompts, responses)])` with a `SentenceTransformer`. Always the same for the same
            texts.
        ridge: positive, in units of one labeled pair.
        seed: of the random numbers before there are labels.

    Raises:
        ActiveDPOError: a ridge that is not positive; from calls, embeddings of a wrong shape or
            that are not finite.

    Examples:
        >>> from activedpo_fast import ActiveDPOSelector, make_strategy
        >>> from activedpo_fast.labels import LearnedReward
        >>> def embed(prompts, responses):
        ...     return [[len(response), response.count("e")] for response in responses]
        >>> reward = LearnedReward(embed)
        >>> selector = ActiveDPOSelector(
        ...     model, tokenizer, strategy=make_strategy("reward_gap", reward=reward))
        >>> reward.learn([picked], [labels])  # `ActiveDPOLoop` does it before each round
        >>> len(selector.select(pool, 2, labeled=picked))
        2
    """

    def __init__(self, embed: Embed, *, ridge: float = 1.0, seed: int = 0) -> None:
        if not callable(embed):
            raise ActiveDPOError(f"embed: expected a function, got {type(embed).__name__}")
        if not (isinstance(ridge, (int, float)) and math.isfinite(ridge) and ridge > 0):
            raise ActiveDPOError(f"ridge: {ridge!r} is not a finite number above 0")
        self._embed = embed
        self.ridge = ridge
        self.seed = seed
        self._weights: Tensor | None = None

    def learn(self, picked: Sequence[Selection], labels: Sequence[Sequence[int | None]]) -> None:
        """Fit to all labels of these selections; what was learned before is forgotten.

        Pairs without a preference (None) are left out.
        """
        pairs = [
            (pick, label)
            for selection, given in zip(picked, labels, strict=True)
            for pick, label in zip(selection, given, strict=True)
            if label is not None
        ]
        if not pairs:
            self._weights = None
            return
        prompts = [pick.prompt for pick, _ in pairs]
        first, second = (
            self._embedded(prompts, [pick.responses[n] for pick, _ in pairs]) for n in (0, 1)
        )
        y = torch.tensor([1.0 - 2.0 * label for _, label in pairs], dtype=torch.float64)
        x = first - second
        scale = x.norm(dim=1).mean().clamp_min(torch.finfo(torch.float64).tiny)
        x = x / scale
        if len(x) <= x.shape[1]:
            weights = x.T @ torch.linalg.solve(x @ x.T + self.ridge * _identity(len(x)), y)
        else:
            weights = torch.linalg.solve(x.T @ x + self.ridge * _identity(x.shape[1]), x.T @ y)
        self._weights = weights / scale

    def __call__(
        self,
        prompts: Sequence[Text],
        responses: Sequence[Text],
        extras: Sequence[Mapping[str, Any]],
    ) -> list[float]:
        if self._weights is None:
            return [self._random(p, r) for p, r in zip(prompts, responses, strict=True)]
        found: list[float] = (self._embedded(prompts, responses) @ self._weights).tolist()
        return found

    def _embedded(self, prompts: Sequence[Text], responses: Sequence[Text]) -> Tensor:
        found = torch.as_tensor(self._embed(prompts, responses)).detach().cpu().double()
        if found.ndim != 2 or len(found) != len(responses):
            raise ActiveDPOError(
                f"embed: expected [{len(responses)}, d] numbers, got {list(found.shape)}"
            )
        bad = (~found.isfinite()).any(dim=1).nonzero()
        if len(bad):
            raise ActiveDPOError(
                f"embed: the embedding of {responses[int(bad[0])]!r} is not finite"
            )
        return found

    def _random(self, prompt: Text, response: Text) -> float:
        text = json.dumps([self.seed, prompt, response], sort_keys=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2.0**48


def _identity(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)
