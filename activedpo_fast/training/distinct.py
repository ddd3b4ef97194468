"""Distinct responses to prompts, whatever samples them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.columns import check_json_columns
from activedpo_fast.pool.items import PoolItem
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.texts import Text
from activedpo_fast.training.sampler import PromptLike

logger = logging.getLogger(__name__)

Sample = Callable[[list[int], int], Iterable[tuple[int, str]]]
"""Takes positions of prompts, one for each response that is missing, and the attempt, from 1.
Gives (position, response), up to one for each."""


def distinct_responses(
    prompts: Sequence[PromptLike], sample: Sample, *, num_generations: int, max_attempts: int
) -> PreferencePool:
    """Return a pool of the prompts with `num_generations` distinct responses each.

    Responses that are empty, or differ only in surrounding white space from another one to the same
    prompt, are sampled again. Prompts that have too few after `max_attempts` are left out, which is
    logged.

    Raises:
        ActiveDPOError: no prompt has enough; a column that no pool can hold.
    """
    for n, prompt in enumerate(prompts, start=1):
        check_json_columns(prompt.extra, f"prompt {n}")  # the new pool has to be writable
    found = _distinct_texts(len(prompts), sample, num_generations, max_attempts)
    items = [
        PoolItem(
            prompt.id,
            prompt.prompt,
            tuple(as_text(text, prompt.prompt) for text in texts),
            dict(prompt.extra),
        )
        for prompt, texts in zip(prompts, found, strict=True)
        if len(texts) == num_generations
    ]
    if len(items) < len(prompts):
        logger.warning(
            "%d of %d prompts are left out: fewer than %d distinct responses after %d attempts",
            len(prompts) - len(items),
            len(prompts),
            num_generations,
            max_attempts,
        )
    if not items:
        raise ActiveDPOError(
            f"no prompt got {num_generations} distinct responses in {max_attempts} "
            "attempts: is the temperature too low, or max_completion_length?"
        )
    return PreferencePool(items)


def _distinct_texts(prompts: int, sample: Sample, count: int, max_attempts: int) -> list[list[str]]:
    """Return up to `count` texts of every prompt, in the order of sampling."""
    # Keyed by the text without surrounding white space.
    found: list[dict[str, str]] = [{} for _ in range(prompts)]
    for attempt in range(1, max_attempts + 1):
        missing = [
            position for position, texts in enumerate(found) for _ in range(count - len(texts))
        ]
        if not missing:
            break
        for position, text in sample(missing, attempt):
            if text.strip():
                found[position].setdefault(text.strip(), text)
    return [list(texts.values()) for texts in found]


def as_text(response: str, prompt: Text) -> Text:
    """Return a response to a prompt: as it is, or as the message of the assistant."""
    if isinstance(prompt, str):
        return response
    return [{"role": "assistant", "content": response}]
