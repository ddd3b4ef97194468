"""A prompt, alone or with its responses, and the checks on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.columns import check_columns
from activedpo_fast.pool.messages import images_of
from activedpo_fast.pool.texts import Text, check_string, check_text, check_texts, kind_of, show

# A row's own columns; all others are extra.
PAIR_COLUMNS = (("chosen", "rejected"), ("response_a", "response_b"))
OWN_COLUMNS = frozenset({"id", "prompt", "responses", *PAIR_COLUMNS[0], *PAIR_COLUMNS[1]})


@dataclass(frozen=True)
class PoolItem:
    """A prompt with its responses.

    `prompt` and each of `responses` are plain strings, or all of them lists of chat messages
    `{"role": ..., "content": ...}`. A content is a string, or a list of parts
    `{"type": "text", "text": ...}`; a prompt may have parts `{"type": "image", "image": ...}`, too,
    with a path or a data URI. A message may have `tool_calls`. `extra` holds the other columns of
    the row, unchanged; they should be JSON values if the pool is to be written with
    `PreferencePool.to_jsonl`.

    Examples:
        >>> from activedpo_fast import PoolItem, PreferencePool
        >>> color = PoolItem("color", "Name a color.", (" Red.", " Pale blue.", " Dog."))
        >>> hello = PoolItem("hello", "Say hello.", (" Hello!", " Go away."), {"topic": "manners"})
        >>> PreferencePool([color, hello])
        PreferencePool(2 prompts, 5 responses)
    """

    id: str
    prompt: Text
    responses: tuple[Text, ...]
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """A prompt that has no responses yet, the input of `generate_responses`.

    Examples:
        >>> from activedpo_fast import Prompt, generate_responses
        >>> color = Prompt("color", "Name a color.")
        >>> hello = Prompt("hello", "Say hello.", {"topic": "manners"})
        >>> pool = generate_responses(model, tokenizer, [color, hello], max_completion_length=16)
        >>> pool[1].extra
        {'topic': 'manners'}
    """

    id: str
    prompt: Text
    extra: dict[str, Any] = field(default_factory=dict)


def check_item(item: PoolItem, place: str) -> None:
    if not isinstance(item, PoolItem):
        raise ActiveDPOError(f"{place}: expected a PoolItem, got {show(item)}")
    check_id(item.id, place)
    if not isinstance(item.responses, tuple):
        raise ActiveDPOError(f"{place}: the responses must be a tuple, got {show(item.responses)}")
    check_texts(item.prompt, item.responses, place)
    if not isinstance(item.extra, dict):
        raise ActiveDPOError(f"{place}: the extra columns must be a dict, got {show(item.extra)}")
    for name in item.extra:
        if not isinstance(name, str) or name in OWN_COLUMNS:
            raise ActiveDPOError(f"{place}: {name!r} cannot be the name of an extra column")
    check_columns(item.extra, place, chat=not isinstance(item.prompt, str))


def check_prompts(prompts: Sequence[Any], places: Sequence[str] | None = None) -> None:
    """Raise ActiveDPOError unless they have distinct ids and well-formed prompts of one kind.

    Prompts with the same text may have different ids: they count as one prompt. `places` says where
    they come from, for the message.
    """
    if not prompts:
        raise ActiveDPOError("there are no prompts")
    places = [f"prompt {n}" for n in range(1, len(prompts) + 1)] if places is None else places
    first_with: dict[str, int] = {}
    for n, (prompt, place) in enumerate(zip(prompts, places, strict=True)):
        if not all(hasattr(prompt, name) for name in ("id", "prompt", "extra")):
            raise ActiveDPOError(
                f"{place}: expected a Prompt, or a PreferencePool as a whole, got {show(prompt)}"
            )
        check_id(prompt.id, place)
        check_text(prompt.prompt, "the prompt", place, images=True)
        if images_of(prompt.prompt):
            raise ActiveDPOError(
                f"{place}: has images, and rounds are of texts alone: sample responses yourself, "
                "select by ActiveDPOSelector and train by DPOTrainer"
            )
        check_columns(prompt.extra, place, chat=not isinstance(prompt.prompt, str), prompts=True)
        check_same_kind(prompt.prompt, place, prompts[0].prompt, places[0])
        earlier = first_with.setdefault(prompt.id, n)
        if earlier != n:
            raise ActiveDPOError(
                f"{place}: the same prompt as {places[earlier]}: remove one of them"
                if prompt.prompt == prompts[earlier].prompt
                else f"{place}: id {prompt.id!r} is already that of {places[earlier]}, another "
                "prompt: prompts need ids of their own"
            )


def check_id(id: Any, place: str) -> None:
    if not isinstance(id, str):
        raise ActiveDPOError(f"{place}: 'id' must be a string or an integer, got {show(id)}")
    check_string(id, "'id'", place)
    if not id.strip():
        raise ActiveDPOError(f"{place}: 'id' is empty")


def check_same_kind(prompt: Text, place: str, first: Text, first_place: str) -> None:
    if isinstance(prompt, str) != isinstance(first, str):
        raise ActiveDPOError(
            f"{place}: {kind_of(prompt)}, but {first_place} has "
            f"{kind_of(first)}; use one of them for all"
        )
