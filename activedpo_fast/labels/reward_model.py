"""A sequence classifier with one output as the reward, and an oracle that labels by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from activedpo_fast._files import FilePath
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.reward import RewardOracle
from activedpo_fast.models.named import as_reward_model
from activedpo_fast.models.undisturbed import undisturbed
from activedpo_fast.pool.messages import Message, images_of
from activedpo_fast.pool.template import check_template_kwargs
from activedpo_fast.pool.texts import Text
from activedpo_fast.pool.tokenizers import tokenizer_as_found
from activedpo_fast.progress import progress_bar


class RewardModel:
    """A `transformers` model for sequence classification as a `Reward`: its output is the number.

    With a chat template, prompt and response are rendered as a conversation (a plain prompt as the
    user's message). Without one they are encoded as the tokenizer encodes a pair of texts, as
    DeBERTa reward models expect; a tokenizer without special tokens concatenates them.

    Args:
        model: with one output (`num_labels=1`); it stays on its device and runs in eval mode. A
            string or path is the folder or hub name of one, loaded on a GPU if there is one.
        tokenizer: may be left out for a model given by name.
        batch_size: responses scored at once.
        max_length: maximum input length in tokens; the tokenizer truncates longer inputs. None for
            no limit.
        chat_template_kwargs: passed to the reward model's own chat template, which does not get
            those of the policy.

    Raises:
        ActiveDPOError: a model with several outputs; no padding token, or different ones in the
            model's config and the tokenizer; chat messages without a chat template; images.

    Examples:
        >>> from activedpo_fast import ActiveDPOSelector, make_strategy
        >>> from activedpo_fast.labels import RewardModel
        >>> reward = RewardModel(reward_model, reward_tokenizer)
        >>> strategy = make_strategy("reward_gap", reward=reward)
        >>> len(ActiveDPOSelector(model, tokenizer, strategy=strategy).select(pool, 3))
        3
    """

    def __init__(
        self,
        model: PreTrainedModel | FilePath,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        show_progress: bool | None = None,
    ) -> None:
        model, tokenizer = as_reward_model(model, tokenizer)
        if model.config.num_labels != 1:
            raise ActiveDPOError(
                f"a reward model has one output, {type(model).__name__} has "
                f"{model.config.num_labels}"
            )
        if tokenizer.pad_token_id is None:
            raise ActiveDPOError("the reward model's tokenizer has no pad_token")
        if model.config.get_text_config().pad_token_id != tokenizer.pad_token_id:
            # Decoder models use this id to find the last token, whose output is the reward.
            raise ActiveDPOError(
                f"the reward model's config has pad_token_id "
                f"{model.config.get_text_config().pad_token_id}, its tokenizer has "
                f"{tokenizer.pad_token_id}"
            )
        if batch_size < 1:
            raise ActiveDPOError(f"batch_size: {batch_size} is below 1")
        check_template_kwargs(chat_template_kwargs)
        if chat_template_kwargs and not tokenizer.chat_template:
            raise ActiveDPOError(
                "chat_template_kwargs: the reward model's tokenizer has no chat "
                "template to pass them to"
            )
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._limit: dict[str, Any] = {
            "truncation": max_length is not None,
            "max_length": max_length,
        }
        self._template_kwargs = dict(chat_template_kwargs or {})
        self._show_progress = show_progress

    def __call__(
        self,
        prompts: Sequence[Text],
        responses: Sequence[Text],
        extras: Sequence[Mapping[str, Any]],
    ) -> list[float]:
        with tokenizer_as_found(self._tokenizer):
            encoded = [self._encode(p, r) for p, r in zip(prompts, responses, strict=True)]
        order = sorted(range(len(encoded)), key=lambda n: -len(encoded[n]["input_ids"]))
        rewards = [0.0] * len(encoded)
        with (
            undisturbed(self._model),
            torch.no_grad(),
            progress_bar(
                self._show_progress, total=len(encoded), desc="reward", unit="response"
            ) as bar,
        ):
            for start in range(0, len(order), self._batch_size):
                batch = order[start : start + self._batch_size]
                inputs = self._tokenizer.pad([encoded[n] for n in batch], return_tensors="pt")
                logits = self._model(**inputs.to(self._model.device)).logits
                for n, value in zip(batch, logits[:, 0].double().tolist(), strict=True):
                    rewards[n] = value
                bar.update(len(batch))
        return rewards

    def _encode(self, prompt: Text, response: Text) -> Any:
        if images_of(prompt):
            raise ActiveDPOError(
                "a prompt has images, and the reward model reads texts alone: give a function that "
                "reads images as the reward (see Reward), or let people label"
            )
        if self._tokenizer.chat_template:
            messages = [*_messages(prompt, "user"), *_messages(response, "assistant")]
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, **self._template_kwargs
            )
            return self._tokenizer(text, add_special_tokens=False, **self._limit)
        if not (isinstance(prompt, str) and isinstance(response, str)):
            raise ActiveDPOError(
                "the reward model's tokenizer has no chat template, which chat messages need"
            )
        return self._tokenizer(prompt, response, **self._limit)


class RewardModelOracle(RewardOracle):
    """`RewardOracle` whose reward is a `RewardModel`.

    Args:
        temperature, seed: as in `RewardOracle`.
        model, tokenizer, batch_size, max_length, chat_template_kwargs: as in `RewardModel`.

    Raises:
        ActiveDPOError: as `RewardModel` and `RewardOracle` do.

    Examples:
        >>> from activedpo_fast.labels import RewardModelOracle
        >>> oracle = RewardModelOracle(reward_model, reward_tokenizer, temperature=0.5)
        >>> labels = oracle.label(picked)
        >>> len(picked.to_dataset(labels))
        4
    """

    def __init__(
        self,
        model: PreTrainedModel | FilePath,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 16,
        max_length: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        show_progress: bool | None = None,
    ) -> None:
        reward = RewardModel(
            model,
            tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            chat_template_kwargs=chat_template_kwargs,
            show_progress=show_progress,
        )
        super().__init__(reward, temperature=temperature, seed=seed)


def _messages(text: Text, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text
