"""The columns that have a meaning in TRL's data formats, and how each is handled here.

`DATA_COLUMNS` is the table of docs/trl.md; `check_columns` enforces it on pools and prompts. Every
column that is not in the table is carried along unchanged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from activedpo_fast._files import first_line
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.template import check_template_kwargs, check_tools

Verdict = Literal["used", "carried", "refused"]


@dataclass(frozen=True)
class DataColumn:
    """A column, or a key of a chat message, and how it is handled.

    Attributes:
        name: the column's name; in `MESSAGE_KEYS`, the key's.
        verdict: "used": has the effect that it has in TRL. "carried": `DPOTrainer` does not read
            it, so it is kept with the row and has no effect. "refused": an error that names it.
        in_trl: what TRL 1.16 does with it.
        here: what is done here, or what to do instead of giving it.
        chat: refused or used only with chat messages; with plain text it is carried, as
            `DPOTrainer` does not read it there.
        in_prompts: the verdict for prompts that have no responses yet, if different.
    """

    name: str
    verdict: Verdict
    in_trl: str
    here: str
    chat: bool = False
    in_prompts: Verdict | None = None


_RESPONSE = "a prompt has no responses yet: remove it, or pass the rows as a pool"
_IMAGE = "responses to images are not sampled here: sample them first, and pass a pool"
_PART = (
    'an item has its images in its prompt, as parts {"type": "image", "image": path}; '
    "PreferencePool.from_rows puts them there"
)
_IMAGES = frozenset({"image", "images"})

DATA_COLUMNS = (
    DataColumn("id", "used", "not read", "identifies the row"),
    DataColumn("prompt", "used", "the prompt", "the prompt"),
    DataColumn(
        "chosen",
        "used",
        "the better response",
        "a response; which one was preferred is not used",
        in_prompts="refused",
    ),
    DataColumn(
        "rejected",
        "used",
        "the worse response",
        "a response; which one was preferred is not used",
        in_prompts="refused",
    ),
    DataColumn("responses", "used", "not read", "two or more responses", in_prompts="refused"),
    DataColumn("response_a", "used", "not read", "a response", in_prompts="refused"),
    DataColumn("response_b", "used", "not read", "a response", in_prompts="refused"),
    DataColumn(
        "chat_template_kwargs",
        "used",
        "arguments of the chat template for this row",
        "the same, before those given for all rows; written by `Selection.to_dataset`",
        chat=True,
    ),
    DataColumn(
        "tools",
        "used",
        "passed to the chat template",
        "the same; written by `Selection.to_dataset`",
        chat=True,
    ),
    DataColumn(
        "image",
        "used",
        "the image of a vision-language model",
        "the same: it becomes a part of the prompt; written by `Selection.to_dataset`",
        in_prompts="refused",
    ),
    DataColumn(
        "images",
        "used",
        "the images of a vision-language model",
        "the same: they become parts of the prompt; written by `Selection.to_dataset`",
        in_prompts="refused",
    ),
    DataColumn(
        "ref_chosen_logps",
        "refused",
        "log-probs of the reference that the trainer has computed; not read from the data",
        "the reference is a model, not a column: remove it",
    ),
    DataColumn(
        "ref_rejected_logps",
        "refused",
        "log-probs of the reference that the trainer has computed; not read from the data",
        "the reference is a model, not a column: remove it",
    ),
    DataColumn("prompt_ids", "carried", "overwritten with the trainer's own tokens", "no effect"),
    DataColumn("chosen_ids", "carried", "overwritten with the trainer's own tokens", "no effect"),
    DataColumn("rejected_ids", "carried", "overwritten with the trainer's own tokens", "no effect"),
    DataColumn("messages", "carried", "a conversation, for SFTTrainer", "no effect"),
    DataColumn("completion", "carried", "a response, for SFTTrainer and KTOTrainer", "no effect"),
    DataColumn(
        "label",
        "carried",
        "whether `completion` is desirable, for KTOTrainer",
        "no effect; labels of pairs are read from label files",
    ),
    DataColumn("margin", "carried", "margin between the rewards, for RewardTrainer", "no effect"),
)

# Keys of a chat message. A key that is not listed is used if it is a string, otherwise refused.
MESSAGE_KEYS = (
    DataColumn("role", "used", "passed to the chat template", "the same"),
    DataColumn("content", "used", "passed to the chat template", "the same"),
    DataColumn(
        "content (a list of parts)",
        "used",
        "text and images in order",
        'the same: {"type": "text", "text": ...}, and in prompts {"type": "image"}',
    ),
    DataColumn("tool_calls", "used", "passed to the chat template", "the same: a list of calls"),
    DataColumn(
        "other keys, strings (name, reasoning_content, ...)",
        "used",
        "passed to the chat template",
        "the same",
    ),
    DataColumn(
        "other keys, not strings",
        "refused",
        "passed to the chat template",
        "make it a string, or remove it",
    ),
)

_BY_NAME = {column.name: column for column in DATA_COLUMNS}
RESPONSE_COLUMNS = frozenset(c.name for c in DATA_COLUMNS if c.in_prompts == "refused") - _IMAGES


def is_absent(value: Any) -> bool:
    """Return whether a cell counts as empty."""
    # pandas writes a missing string as NaN
    return value is None or (isinstance(value, float) and math.isnan(value))


def check_columns(
    extra: Mapping[str, Any], place: str, *, chat: bool, prompts: bool = False
) -> None:
    """Raise ActiveDPOError, naming `place`, for a column that would silently have no effect.

    Args:
        extra: the columns of a row that are not its id, prompt or responses.
        chat: whether the texts of the row are chat messages.
        prompts: whether the row is a prompt without responses.
    """
    for name, value in extra.items():
        column = _BY_NAME.get(name)
        if column is None:
            continue
        if prompts and name in RESPONSE_COLUMNS:
            raise ActiveDPOError(f"{place}: the column {name!r}: {_RESPONSE}")
        if is_absent(value) or (column.chat and not chat):
            continue
        if name in _IMAGES:
            raise ActiveDPOError(f"{place}: the column {name!r}: {_IMAGE if prompts else _PART}")
        if column.verdict == "refused":
            raise ActiveDPOError(f"{place}: the column {name!r} is not supported; {column.here}")
        if name == "chat_template_kwargs":
            check_template_kwargs(value, f"{place}: the column {name!r}")
        if name == "tools":
            check_tools(value, f"{place}: the column {name!r}")


def check_json_columns(extra: Mapping[str, Any], place: str) -> None:
    """Raise ActiveDPOError, naming `place` and the column, for a value that JSONL cannot hold."""
    for name, value in extra.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            reason = first_line(error)
            raise ActiveDPOError(
                f"{place}: the column {name!r} is no JSON value ({reason}): make "
                "it text or a number, or remove it"
            ) from None
