"""What a chat template leaves out of a conversation, or writes as it stands in Python.

A template that does not know tools gives the same tokens with them and without. `DPOTrainer` then
trains without them, and features are without them, too: a warning says so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import ProcessorMixin

from activedpo_fast.pool.messages import Message, without_images
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.template import TOOLS, template_kwargs
from activedpo_fast.pool.vision import ProcessingClass, in_parts

logger = logging.getLogger(__name__)

_AS_IN_PYTHON = "{'type': 'text'"  # a list of parts, printed


def warn_of_unrendered(
    pool: PreferencePool, processing_class: ProcessingClass, common: Mapping[str, Any]
) -> None:
    """Log a warning for tools, calls and parts that the template does not render.

    Of each kind, the first conversation that has it is looked at.
    """
    first: dict[str, tuple[str, list[Message], dict[str, Any]]] = {}
    for id, messages, arguments in _conversations(pool, common):
        for kind in _kinds(messages, arguments):
            first.setdefault(kind, (id, messages, arguments))
    for kind, (id, messages, arguments) in first.items():
        if _is_lost(kind, processing_class, messages, arguments):
            logger.warning(
                "the chat template does not render %s (first: item %r): DPOTrainer trains without "
                "them, and features are without them, too",
                kind,
                id,
            )


def _conversations(
    pool: PreferencePool, common: Mapping[str, Any]
) -> Iterator[tuple[str, list[Message], dict[str, Any]]]:
    for item in pool:
        arguments = template_kwargs(item.extra, common)
        for response in item.responses:
            yield item.id, [*without_images(item.prompt), *response], arguments


def _kinds(messages: list[Message], arguments: Mapping[str, Any]) -> Iterator[str]:
    if arguments.get(TOOLS):
        yield "tools"
    if any(message.get("tool_calls") for message in messages):
        yield "calls of tools"
    if any(isinstance(message.get("content"), list) for message in messages):
        yield "contents in parts"


def _is_lost(
    kind: str, processing_class: ProcessingClass, messages: list[Message], arguments: dict[str, Any]
) -> bool:
    def render(messages: list[Message], arguments: dict[str, Any]) -> str:
        if isinstance(processing_class, ProcessorMixin):
            messages = in_parts(messages, "")
        rendered = processing_class.apply_chat_template(messages, tokenize=False, **arguments)
        return str(rendered)

    try:
        rendered = render(messages, arguments)
        if kind == "contents in parts":
            return _AS_IN_PYTHON in rendered
        if kind == "tools":
            return rendered == render(messages, {**arguments, TOOLS: None})
        without = [
            {"content": "", **{key: value for key, value in one.items() if key != "tool_calls"}}
            for one in messages
        ]
        return rendered == render(without, arguments)
    except Exception:  # a template is code; tokenization says what is wrong
        return False
