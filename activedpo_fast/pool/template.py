"""Arguments of the chat template: one setting for generating, selecting and training.

TRL reads them per row, from the column `chat_template_kwargs`. Here one setting applies to all
rows, and a row's own column overrides it, key by key. TRL passes the column `tools` to the template
as the argument of this name; so it is one of the row's own arguments here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from activedpo_fast.errors import ActiveDPOError

COLUMN = "chat_template_kwargs"
TOOLS = "tools"
NOT_WITH_TOOLS = "tools beside images, which DPOTrainer leaves out: remove the tools or the images"

# Arguments of `apply_chat_template` itself, which determine the form of its output.
_RESERVED = frozenset(
    {
        "conversation",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "return_dict",
        "return_tensors",
        "return_assistant_tokens_mask",
        "padding",
        "truncation",
        "max_length",
    }
)


def check_template_kwargs(value: Any, place: str = COLUMN) -> None:
    """Raise ActiveDPOError, naming `place`, unless `value` is an object of JSON values, or None."""
    if value is None:
        return
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ActiveDPOError(
            f"{place}: expected an object with the template's arguments by name, got {value!r}"
        )
    reserved = _RESERVED & value.keys()
    if reserved:
        raise ActiveDPOError(f"{place}: {min(reserved)!r} is set by the library")
    for key, argument in value.items():
        try:
            json.dumps(argument).encode()
        except (TypeError, ValueError, RecursionError):
            raise ActiveDPOError(
                f"{place}: {key!r} is no JSON value, which it has to be to go "
                "into the training data"
            ) from None


def check_tools(value: Any, place: str) -> None:
    """Raise ActiveDPOError, naming `place`, unless `value` is a list of JSON schemas, or its JSON
    text, which TRL reads too."""
    try:
        tools = json.loads(value) if isinstance(value, str) else value
        json.dumps(tools, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        tools = None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ActiveDPOError(
            f"{place}: expected a list of JSON schemas, one for each tool, or its JSON text"
        )


def own_template_kwargs(extra: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments in a row's own columns, or None.

    As in TRL, an argument `tools` in `chat_template_kwargs` comes before the column `tools`.
    """
    own, tools = extra.get(COLUMN), extra.get(TOOLS)
    found: dict[str, Any] = {}
    if isinstance(tools, (str, list)):
        found[TOOLS] = json.loads(tools) if isinstance(tools, str) else tools
    if isinstance(own, Mapping):
        found.update(own)
    return found or None


def template_kwargs(extra: Mapping[str, Any], common: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the arguments for a row with chat messages: its own, over those of `common`."""
    return {**(common or {}), **(own_template_kwargs(extra) or {})}


def one_setting(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments that all places in `given` agree on; None counts as not given.

    Raises:
        ActiveDPOError: two places differ, or one has invalid arguments.
    """
    found = [(place, value) for place, value in given.items() if value is not None]
    for place, value in found:
        check_template_kwargs(value, place)
        if value != found[0][1]:
            raise ActiveDPOError(
                f"{place} and {found[0][0]} differ ({value!r}, {found[0][1]!r}): "
                "generating, selecting and training have one setting; give it "
                "once, as chat_template_kwargs"
            )
    return dict(found[0][1]) or None if found else None
