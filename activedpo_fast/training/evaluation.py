"""Metrics of the current policy on held-out data: each is an `evaluate` of `ActiveDPOLoop`.

They keep what they found for each prompt or pair in the folders of the start and of the rounds.
Every value is compared with that of the start on the same prompts, sampled with the same seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from activedpo_fast._checks import check_at_least
from activedpo_fast._files import FilePath
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels import Oracle, Reward
from activedpo_fast.pool.items import Prompt
from activedpo_fast.pool.reading import as_prompts
from activedpo_fast.pool.rewards import call_reward
from activedpo_fast.selection.picks_jsonl import Pick
from activedpo_fast.selection.result import Selection
from activedpo_fast.settings import check_responding
from activedpo_fast.training.distinct import as_text
from activedpo_fast.training.generation import respond, shortest_prompts
from activedpo_fast.training.generators import Generate, ask, check_generate
from activedpo_fast.training.heldout import (
    RESPONSES,
    REWARDS,
    Values,
    paired,
    standard_error,
    write_heldout,
)
from activedpo_fast.training.recorded import digest, object_settings, prompt_identity
from activedpo_fast.training.run_folder import folder_to_evaluate

if TYPE_CHECKING:
    import datasets

_SEED = 1  # of responses: the same in every round and every run


class HeldoutResponses:
    """Responses of a model to held-out prompts, with the same seed every time.

    Args:
        prompts: `Prompt`s, or a `datasets.Dataset` with a column `prompt`.
        samples: responses to each prompt.
        output_dir: of the run, whose newest adapter is the policy's.
        temperature: 0 for the most likely tokens.
        generate: samples in place of the model in memory, see `generators.Generate`. The other
            options are those of `generate_responses`.

    Attributes:
        prompts: each of them `samples` times, in that order: first all of them once.
        settings: JSON values that the responses depend on beside the model.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt] | datasets.Dataset,
        processing_class: PreTrainedTokenizerBase,
        *,
        output_dir: FilePath,
        samples: int = 1,
        max_completion_length: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        generation_batch_size: int = 16,
        chat_template_kwargs: dict[str, Any] | None = None,
        generate: Generate | None = None,
        show_progress: bool | None = None,
    ) -> None:
        check_at_least(
            1,
            samples=samples,
            max_completion_length=max_completion_length,
            generation_batch_size=generation_batch_size,
        )
        check_responding(temperature=temperature, top_p=top_p, samples=samples)
        check_generate(generate, given=False)
        self._given = as_prompts(prompts)
        self.prompts = [
            Prompt(f"{p.id}/{n}", p.prompt, p.extra) for n in range(samples) for p in self._given
        ]
        self.samples = samples
        self._processing_class = processing_class
        self._options: dict[str, Any] = {
            "max_completion_length": max_completion_length,
            "temperature": temperature,
            "top_p": top_p,
            "generation_batch_size": generation_batch_size,
            "chat_template_kwargs": chat_template_kwargs,
        }
        self._output_dir = Path(output_dir)
        self._generate = generate
        self._show_progress = show_progress
        self.settings: dict[str, Any] = {
            **self._options,
            "samples": samples,
            "generate": None if generate is None else object_settings(generate),
            "prompts": digest([prompt_identity(prompt) for prompt in self._given]),
        }

    def sample(self, model: PeftModel) -> list[str]:
        """Return a response to each of `prompts`, possibly empty."""
        if self._generate is not None:
            return self._generated(self._generate, model)
        return respond(
            model,
            self._processing_class,
            self.prompts,
            seed=_SEED,
            show_progress=self._show_progress,
            **self._options,
        )

    def _generated(self, generate: Generate, model: PeftModel) -> list[str]:
        found = ask(
            generate,
            model,
            self._processing_class,
            self._given,
            self.samples,
            adapter=folder_to_evaluate(self._output_dir) / "adapter",
            seed=_SEED,
            sampling=self._options,
            common_template_kwargs=self._options["chat_template_kwargs"],
        )
        for responses in found:
            if len(responses) < self.samples:
                raise ActiveDPOError(
                    f"generate: {len(responses)} responses to a held-out prompt, {self.samples} "
                    "were asked for"
                )
        return [responses[n] for n in range(self.samples) for responses in found]

    def by_prompt(self, values: Sequence[Any]) -> list[list[Any]]:
        """Return the values of the responses as a list for each prompt given."""
        count = len(self._given)
        return [list(values[n::count]) for n in range(count)]

    def try_out(self, model: PeftModel) -> tuple[list[Prompt], list[str]]:
        """Encode all prompts; return the two shortest and responses of two tokens to them."""
        length = self._options["max_completion_length"]
        shortest = shortest_prompts(
            model,
            self._processing_class,
            self._given,
            length,
            self._options["chat_template_kwargs"],
        )
        few = [self._given[n] for n in shortest]
        options = {**self._options, "max_completion_length": min(2, length)}
        return few, respond(model, self._processing_class, few, show_progress=False, **options)


class HeldoutReward:
    """Mean reward of the policy's responses to held-out prompts, and its gain over the start.

    Responses and the mean reward of each prompt are kept in `heldout.json` of the start's folder
    and of each round's.

    A call returns `reward`, the mean, and `gain`, the mean difference from the start, paired by
    prompt; `reward_se` and `gain_se` are their standard errors over the prompts.

    Args:
        prompts: held-out prompts, as those of `ActiveDPOLoop`.
        reward: gives one number for each response; `RewardModelOracle(...).reward` is that of a
            reward model.
        output_dir: that of the loop whose `evaluate` this is.
        processing_class: the policy's tokenizer.
        options: `samples`, the number of responses to each prompt (1); `max_completion_length`,
            `temperature` (0 for the most likely tokens), `top_p`, `generation_batch_size`,
            `chat_template_kwargs` and `show_progress`, as in `generate_responses`; `generate`, as
            in `ActiveDPOLoop`, to sample elsewhere.

    Raises:
        ActiveDPOError: malformed prompts or options; from a call, a wrong number of rewards or one
            that is not finite, or a prompt that `generate_responses` would refuse.

    Examples:
        >>> from activedpo_fast import ActiveDPOLoop, Prompt
        >>> from activedpo_fast.labels import RewardModelOracle
        >>> from activedpo_fast.training.evaluation import HeldoutReward
        >>> oracle = RewardModelOracle(reward_model, reward_tokenizer)
        >>> heldout = [Prompt("h1", "Why is grass green?"), Prompt("h2", "How do I make tea?")]
        >>> evaluate = HeldoutReward(
        ...     heldout, oracle.reward, output_dir="run", processing_class=tokenizer,
        ...     max_completion_length=8)
        >>> loop = ActiveDPOLoop(
        ...     model, tokenizer, prompts, oracle, output_dir="run", dpo_args=dpo_args,
        ...     rounds=1, batch_size=2, max_completion_length=8, evaluate=evaluate)
        >>> start, first = loop.run()
        >>> start.metrics["gain"], sorted(first.metrics)
        (0.0, ['gain', 'gain_se', 'reward', 'reward_se'])
    """

    def __init__(
        self,
        prompts: Sequence[Prompt] | datasets.Dataset,
        reward: Reward,
        *,
        output_dir: FilePath,
        processing_class: PreTrainedTokenizerBase,
        **options: Any,
    ) -> None:
        self._heldout = HeldoutResponses(
            prompts, processing_class, output_dir=output_dir, **options
        )
        self._reward = reward
        self._output_dir = Path(output_dir)
        self.prompts = self._heldout.prompts
        self.responses: list[str] = []  # of the last call
        self.settings = {"reward": self._heldout.settings}

    def __call__(self, model: PeftModel) -> dict[str, float]:
        self.responses = self._heldout.sample(model)
        rewards = np.array(self._rewards(self.prompts, self.responses))
        mine = rewards.reshape(self._heldout.samples, -1).mean(axis=0)
        found = {"responses": self._heldout.by_prompt(self.responses), "rewards": mine.tolist()}
        start = np.array(write_heldout(self._output_dir, REWARDS, found)["rewards"])
        gain, error = paired(mine, start)
        return {
            "reward": float(mine.mean()),
            "reward_se": standard_error(mine),
            "gain": gain,
            "gain_se": error,
        }

    def rehearse(self, model: PeftModel) -> None:
        """Encode all prompts, and have two short responses rewarded."""
        self._rewards(*self._heldout.try_out(model))

    def _rewards(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return call_reward(
            self._reward,
            [p.id for p in prompts],
            [p.prompt for p in prompts],
            [as_text(r, p.prompt) for p, r in zip(prompts, responses, strict=True)],
            [p.extra for p in prompts],
        )


class HeldoutWinRate:
    """How often an oracle prefers the policy's response to a held-out prompt to the start's.

    A pair without a preference counts as half a win, and so do two responses that are the same,
    about which the oracle is not asked. Responses are kept in `heldout-responses.json` of the
    start's folder and of each round's.

    A call returns `win_rate`, the mean over the prompts, and `win_rate_se`, its standard error. The
    record of the start has 0.5.

    Args:
        prompts, output_dir, processing_class, options: as in `HeldoutReward`.
        oracle: such as a `JudgeOracle`; its method `label` is called without a pool.

    Raises:
        ActiveDPOError: as `HeldoutReward`; what the oracle raises.

    Examples:
        >>> from activedpo_fast import Prompt
        >>> from activedpo_fast.labels import JudgeOracle
        >>> from activedpo_fast.training.evaluation import HeldoutWinRate
        >>> judge = JudgeOracle("judge", base_url=judge_url, journal="judge.jsonl")
        >>> evaluate = HeldoutWinRate(
        ...     [Prompt("h1", "Why is grass green?")], judge, output_dir="run",
        ...     processing_class=tokenizer, max_completion_length=8)
        >>> evaluate(model)  # at the start
        {'win_rate': 0.5, 'win_rate_se': 0.0}
    """

    def __init__(
        self,
        prompts: Sequence[Prompt] | datasets.Dataset,
        oracle: Oracle,
        *,
        output_dir: FilePath,
        processing_class: PreTrainedTokenizerBase,
        **options: Any,
    ) -> None:
        self._heldout = HeldoutResponses(
            prompts, processing_class, output_dir=output_dir, **options
        )
        self._oracle = oracle
        self._output_dir = Path(output_dir)
        self.settings = {"win_rate": {**self._heldout.settings, "oracle": object_settings(oracle)}}

    def __call__(self, model: PeftModel) -> dict[str, float]:
        responses = self._heldout.by_prompt(self._heldout.sample(model))
        start = write_heldout(self._output_dir, RESPONSES, {"responses": responses})["responses"]
        wins = self._wins(start, responses)
        return {"win_rate": float(wins.mean()), "win_rate_se": standard_error(wins)}

    def rehearse(self, model: PeftModel) -> None:
        """Encode all prompts, and rehearse the oracle if it can."""
        self._heldout.try_out(model)
        if callable(rehearse := getattr(self._oracle, "rehearse", None)):
            rehearse()

    def _wins(self, start: list[list[str]], now: list[list[str]]) -> Values:
        """Return the share of wins for each prompt."""
        prompts, samples = self._heldout.prompts, self._heldout.samples
        before, after = ([row[s] for s in range(samples) for row in rows] for rows in (start, now))
        asked = [n for n in range(len(prompts)) if before[n] != after[n]]
        wins: Values = np.full(len(prompts), 0.5)
        if asked:
            picks = [
                Pick(
                    prompts[n].id,
                    (0, 1),
                    0.0,
                    rank,
                    prompts[n].prompt,
                    (as_text(before[n], prompts[n].prompt), as_text(after[n], prompts[n].prompt)),
                )
                for rank, n in enumerate(asked)
            ]
            labels = self._oracle.label(Selection(tuple(picks), "heldout"))
            wins[asked] = [0.5 if label is None else label for label in labels]
        by_prompt: Values = wins.reshape(samples, -1).mean(axis=0)
        return by_prompt


class Evaluations:
    """Several evaluations as one; their metrics have different names."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = list(parts)
        self.settings = {name: value for part in parts for name, value in part.settings.items()}

    def __call__(self, model: PeftModel) -> dict[str, float]:
        return {name: value for part in self._parts for name, value in part(model).items()}

    def rehearse(self, model: PeftModel) -> None:
        for part in self._parts:
            if callable(rehearse := getattr(part, "rehearse", None)):
                rehearse(model)
