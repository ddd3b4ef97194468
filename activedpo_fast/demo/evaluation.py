"""The reward of a model on held-out prompts, and its change from the start."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from activedpo_fast._files import read_json, write_atomic
from activedpo_fast.labels import Reward
from activedpo_fast.pool.items import Prompt
from activedpo_fast.pool.texts import Text
from activedpo_fast.training.generation import respond


class HeldoutReward:
    """Mean reward of responses to held-out prompts, with the same prompts and seed every time.

    Every call writes the rewards by prompt to `folder`: `heldout-000.json` and so on, the first
    file at the start.

    Args:
        samples: responses to each prompt, sampled at `generation`'s temperature; 0 for one greedy
            response.
        generation: `max_completion_length`, `temperature` and `generation_batch_size`.

    A call returns `reward`, the mean, and `reward_se`, its standard error; `gain`, the difference
    from the start, and `gain_se`, its standard error, paired over the prompts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        reward: Reward,
        folder: Path,
        *,
        samples: int,
        generation: dict[str, Any],
        show_progress: bool | None,
    ) -> None:
        self._tokenizer = tokenizer
        self.prompts = [
            Prompt(f"{p.id}/{n}", p.prompt, p.extra)
            for n in range(max(1, samples))
            for p in prompts
        ]
        self._reward = reward
        self._folder = folder
        self._repeats = max(1, samples)
        self._generation = {
            **generation,
            "temperature": generation["temperature"] if samples else 0.0,
        }
        self._show_progress = show_progress
        self.responses: list[str] = []

    def __call__(self, model: PeftModel) -> dict[str, float]:
        self.responses = respond(
            model,
            self._tokenizer,
            self.prompts,
            seed=1,
            show_progress=self._show_progress,
            **self._generation,
        )
        texts: list[Text] = [p.prompt for p in self.prompts]
        answers: list[Text] = list(self.responses)
        rewards = np.array(self._reward(texts, answers, [p.extra for p in self.prompts]))
        mine = rewards.reshape(self._repeats, -1).mean(axis=0)
        done = heldout_files(self._folder)
        path = self._folder / f"heldout-{len(done):03d}.json"
        write_atomic(path, json.dumps(mine.tolist()))
        gain, error = paired(mine, heldout_rewards(heldout_files(self._folder)[0]))
        return {
            "reward": float(mine.mean()),
            "reward_se": _error(mine),
            "gain": gain,
            "gain_se": error,
        }


def heldout_files(folder: Path) -> list[Path]:
    """List the files that the calls of a `HeldoutReward` wrote, in order."""
    return sorted(folder.glob("heldout-*.json"))


def heldout_rewards(path: Path) -> NDArray[np.float64]:
    """Read the mean reward of each prompt's responses."""
    return np.array(read_json(path), dtype=np.float64)


def paired(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean of a - b over prompts and its standard error."""
    return float((a - b).mean()), _error(a - b)


def _error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))
