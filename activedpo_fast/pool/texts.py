"""Checks and hashes of prompts and responses, which are plain text or chat messages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from activedpo_fast._limits import check_limit
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.columns import advice_for_key

Message = dict[str, str]
Text = str | list[Message]


def check_texts(prompt: Any, responses: Sequence[Any], place: str) -> None:
    """Raise ActiveDPOError, naming `place`, unless given a prompt with distinct responses."""
    check_text(prompt, "the prompt", place)
    if len(responses) < 2:
        raise ActiveDPOError(
            f"{place}: {len(responses)} response(s), two or more are needed to form a pair"
        )
    check_limit("responses", len(responses), place, "responses to one prompt")
    first: dict[Any, int] = {}
    for n, response in enumerate(responses, start=1):
        check_text(response, f"response {n}", place)
        if isinstance(response, str) != isinstance(prompt, str):
            raise ActiveDPOError(
                f"{place}: the prompt is {kind_of(prompt)} but response {n} is "
                f"{kind_of(response)}; use one of them for both"
            )
        earlier = first.setdefault(
            response if isinstance(response, str) else canonical_json(response), n
        )
        if earlier != n:
            raise ActiveDPOError(f"{place}: responses {earlier} and {n} are identical")


def check_text(text: Any, what: str, place: str) -> None:
    if isinstance(text, str):
        check_string(text, what, place)
        empty = not text.strip()
    elif isinstance(text, list):
        for message in text:
            _check_message(message, what, place)
        empty = not any(message["content"].strip() for message in text)
    else:
        raise ActiveDPOError(
            f"{place}: {what} must be text or a list of chat messages, got {show(text)}"
        )
    if empty:
        raise ActiveDPOError(f"{place}: {what} is empty")


def _check_message(message: Any, what: str, place: str) -> None:
    if not isinstance(message, dict):
        raise ActiveDPOError(
            f"{place}: {what} has a chat message that is not an object with "
            f"'role' and 'content': {show(message)}"
        )
    for key, value in message.items():
        if not isinstance(value, str):
            raise ActiveDPOError(
                f"{place}: {what} has a chat message whose {key!r} is not a "
                f"string: {show(value)}; {advice_for_key(key, value)}"
            )
        check_string(value, what, place)
    for key in ("role", "content"):
        if key not in message:
            raise ActiveDPOError(f"{place}: {what} has a chat message without {key!r}")
    if not message["role"]:
        raise ActiveDPOError(f"{place}: {what} has a chat message whose 'role' is empty")


def check_string(text: str, what: str, place: str) -> None:
    check_limit("text_chars", len(text), f"{place}, {what}", "characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ActiveDPOError(
            f"{place}: {what} has half of a surrogate pair, which is no character"
        ) from None


def content_id(prompt: Text, responses: Sequence[Text]) -> str:
    """Return the id of a row that has none: 64 bits of a hash. Saved labels rely on this hash."""
    return hashlib.sha256(canonical_json([prompt, list(responses)])).hexdigest()[:16]


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def kind_of(text: Text) -> str:
    return "plain text" if isinstance(text, str) else "chat messages"


def show(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"
