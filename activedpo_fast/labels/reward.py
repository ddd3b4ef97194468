"""Labels sampled from a reward with the Bradley-Terry model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.pool import PreferencePool, as_pool
from activedpo_fast.pool.rewards import Reward, call_reward
from activedpo_fast.selection.picks_jsonl import Pick
from activedpo_fast.selection.result import Selection

if TYPE_CHECKING:
    import datasets


class RewardOracle:
    """Labels with P(a is preferred to b) = σ((r_a − r_b) / temperature).

    Source: Bradley and Terry, 1952. A draw depends only on the seed, the pick's id and the texts of
    its two responses, not on their order, on other picks or on earlier calls.

    Args:
        reward: `reward(prompts, responses, extras)`, called once with all responses of a
            selection: sequences of equal length, two entries per pick. `extras` holds the other
            columns of the pool's items, empty if `label` is given no pool.
        temperature: in units of the reward. 0 always prefers the higher reward and labels a tie
            None.
        seed: for the draws.

    Attributes:
        reward: as given.

    Raises:
        ActiveDPOError: a negative temperature; from `label`, a wrong number of rewards or one that
            is not finite.

    Examples:
        >>> from activedpo_fast.labels import RewardOracle
        >>> def brevity(prompts, responses, extras):
        ...     return [-len(response) / 10 for response in responses]
        >>> labels = RewardOracle(brevity, temperature=0).label(picked)
        >>> all(len(row["chosen"]) < len(row["rejected"]) for row in picked.to_dataset(labels))
        True
    """

    def __init__(self, reward: Reward, *, temperature: float = 1.0, seed: int = 0) -> None:
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ActiveDPOError(f"temperature: {temperature} is not a finite number from 0")
        self.reward = reward
        self.temperature = temperature
        self.seed = seed

    def label(
        self, selection: Selection, pool: PreferencePool | datasets.Dataset | None = None
    ) -> list[int | None]:
        if not selection:
            return []
        pool = None if pool is None else as_pool(pool)
        prompts = [pick.prompt for pick in selection for _ in pick.responses]
        responses = [response for pick in selection for response in pick.responses]
        extras: list[Mapping[str, Any]] = [
            {} if pool is None else pool[pool.position(pick.id)].extra
            for pick in selection
            for _ in pick.responses
        ]
        ids = [pick.id for pick in selection for _ in pick.responses]
        rewards = call_reward(self.reward, ids, prompts, responses, extras)
        labels = []
        for n, pick in enumerate(selection):
            first, second = rewards[2 * n : 2 * n + 2]
            labels.append(self._draw(pick, first - second))
        return labels

    def _draw(self, pick: Pick, advantage: float) -> int | None:
        if self.temperature == 0:
            return None if advantage == 0 else int(advantage < 0)
        # Draw for the two texts in a fixed order, regardless of their order in the pick.
        texts = [json.dumps(response, sort_keys=True) for response in pick.responses]
        swapped = texts[0] > texts[1]
        key = json.dumps([self.seed, pick.id, *sorted(texts)])
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        uniform = (int.from_bytes(digest, "big") >> 11) / 2**53  # in [0, 1)
        difference = -advantage if swapped else advantage
        prefer_first = uniform < 0.5 * (1.0 + math.tanh(difference / (2.0 * self.temperature)))
        return int(prefer_first) if swapped else int(not prefer_first)
