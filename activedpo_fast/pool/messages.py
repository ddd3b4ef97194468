"""Chat messages: their parts, their calls of tools, and how people see them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = dict[str, Any]


def message_text(message: Mapping[str, Any]) -> str:
    """Return a message's content as people read it, with its images by name and its calls.

    A content that is a string is returned as it is if there are no calls.
    """
    content = message.get("content")
    pieces = [] if content is None else [content] if isinstance(content, str) else _parts(content)
    return "\n".join([*pieces, *call_lines(message)])


def content_text(message: Mapping[str, Any]) -> str:
    """Return the texts of a message's content alone, without images and calls."""
    content = message.get("content")
    if not isinstance(content, list):
        return content or ""
    return "\n".join(part["text"] for part in content if "text" in part)


def call_lines(message: Mapping[str, Any]) -> list[str]:
    """Return one line for each call of a tool: `[call] name(arguments)`."""
    lines = []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        arguments = function.get("arguments", "")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        lines.append(f"[call] {function['name']}({arguments})")
    return lines


def images_of(text: str | Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the images in a prompt, in order: paths or data URIs."""
    return [] if isinstance(text, str) else [part["image"] for part in _image_parts(text)]


def without_images(text: str | list[Message]) -> str | list[Message]:
    """Return a prompt whose image parts are the bare `{"type": "image"}` of TRL's format.

    The user's messages are then all in parts: TRL would put the images before the first of them
    that is a string, even if they have their places elsewhere.
    """
    if isinstance(text, str) or not images_of(text):
        return text
    return [_with_bare_images(message) for message in text]


def text_part(text: str) -> Message:
    return {"type": "text", "text": text}


def without_nulls(message: Mapping[str, Any]) -> Message:
    """Return a message without the keys that a table filled up with null, in parts and calls too.

    transformers drops those of a message before the chat template sees them. What a call's
    arguments hold stays: there a null may be meant.
    """
    kept = {key: value for key, value in message.items() if value is not None}
    content, calls = kept.get("content"), kept.get("tool_calls")
    if isinstance(content, list):
        kept["content"] = [_filled(part) for part in content]
    if isinstance(calls, list):
        kept["tool_calls"] = [_filled(call) for call in calls]
        for call in kept["tool_calls"]:
            if isinstance(call, dict) and "function" in call:
                call["function"] = _filled(call["function"])
    return kept


def _filled(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: entry for key, entry in value.items() if entry is not None}


def _parts(content: Sequence[Mapping[str, Any]]) -> list[str]:
    return [_image_name(part) if part["type"] == "image" else part["text"] for part in content]


def _image_name(part: Mapping[str, Any]) -> str:
    image = str(part.get("image", ""))
    return "[image]" if not image or image.startswith("data:") else f"[image: {image}]"


def _with_bare_images(message: Message) -> Message:
    content = message.get("content")
    if isinstance(content, str) and message["role"] == "user":
        return {**message, "content": [text_part(content)]}
    if not isinstance(content, list):
        return message
    return {**message, "content": [_bare(part) for part in content]}


def _bare(part: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "image"} if part["type"] == "image" else dict(part)


def _image_parts(text: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for message in text:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part["type"] == "image":
                yield part
