"""Checks and hashes of prompts and responses, which are plain text or chat messages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from activedpo_fast._limits import check_limit
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.messages import Message, call_lines, content_text, images_of

Text = str | list[Message]

# What to do about a key of a chat message whose value is of another type.
_ADVICE = {
    "role": "make it a string",
    "content": "make it a string, or a list of parts",
    "tool_calls": "make it a list of calls",
}
_OTHER_KEY = "make it a string, or remove it"
_PART = (
    'a part is {"type": "text", "text": ...}, or {"type": "image"} with its image in the column '
    "'images'"
)
_CALL = '{"type": "function", "function": {"name": ..., "arguments": {...}}}'


def check_texts(prompt: Any, responses: Sequence[Any], place: str) -> None:
    """Raise ActiveDPOError, naming `place`, unless given a prompt with distinct responses."""
    check_text(prompt, "the prompt", place, images=True)
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


def check_text(text: Any, what: str, place: str, *, images: bool = False) -> None:
    """Raise ActiveDPOError unless it is a text, or chat messages, and not empty.

    images: whether the messages may have images, as the prompt of an item may.
    """
    if isinstance(text, str):
        check_string(text, what, place)
        empty = not text.strip()
    elif isinstance(text, list):
        for message in text:
            _check_message(message, what, place, images)
        empty = not (
            images_of(text)
            or any(content_text(message).strip() or call_lines(message) for message in text)
        )
    else:
        raise ActiveDPOError(
            f"{place}: {what} must be text or a list of chat messages, got {show(text)}"
        )
    if empty:
        raise ActiveDPOError(f"{place}: {what} is empty")


def is_text(value: Any) -> bool:
    """Return whether a value is a string, or a list of well-formed chat messages."""
    if isinstance(value, str):
        return True
    if not isinstance(value, list) or not value:
        return False
    try:
        for message in value:
            _check_message(message, "", "", images=True)
    except ActiveDPOError:
        return False
    return True


def _check_message(message: Any, what: str, place: str, images: bool) -> None:
    if not isinstance(message, dict):
        raise ActiveDPOError(
            f"{place}: {what} has a chat message that is not an object with "
            f"'role' and 'content': {show(message)}"
        )
    for key, value in message.items():
        if key == "content" and isinstance(value, list):
            may_show = images and message.get("role") != "tool"
            for part in value:
                _check_part(part, what, place, may_show)
        elif key == "tool_calls" and isinstance(value, list):
            for call in value:
                _check_call(call, what, place)
        elif isinstance(value, str) and key != "tool_calls":
            check_string(value, what, place)
        elif key != "content" or value is not None:
            kind = "list" if key == "tool_calls" else "string"
            raise ActiveDPOError(
                f"{place}: {what} has a chat message whose {key!r} is not a {kind}: {show(value)}; "
                f"{_ADVICE.get(key, _OTHER_KEY)}"
            )
    if "role" not in message:
        raise ActiveDPOError(f"{place}: {what} has a chat message without 'role'")
    if message.get("content") is None and not message.get("tool_calls"):
        raise ActiveDPOError(f"{place}: {what} has a chat message without 'content'")
    if not message["role"]:
        raise ActiveDPOError(f"{place}: {what} has a chat message whose 'role' is empty")


def _check_part(part: Any, what: str, place: str, images: bool) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "image") or part.keys() - {"type", kind}:
        raise ActiveDPOError(
            f"{place}: {what} has a chat message whose 'content' has the part {show(part)}; {_PART}"
        )
    if kind == "image" and not images:
        raise ActiveDPOError(
            f"{place}: {what} has an image, which only the prompt of a pool's item may have, in a "
            "message of the user, the assistant or the system"
        )
    if not isinstance(part.get(kind), str):
        raise ActiveDPOError(
            f"{place}: {what} has an image without a file: give it in the column 'images'"
            if kind == "image"
            else f"{place}: {what} has a part of type 'text' whose 'text' is no string"
        )
    if kind == "text":
        check_string(part["text"], what, place)


def _check_call(call: Any, what: str, place: str) -> None:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ActiveDPOError(
            f"{place}: {what} has a chat message whose 'tool_calls' has {show(call)}; a call is "
            f"{_CALL}"
        )
    try:
        written = json.dumps(call, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ActiveDPOError(
            f"{place}: {what} has a chat message whose 'tool_calls' is no JSON value"
        ) from None
    check_string(written, what, place)


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
