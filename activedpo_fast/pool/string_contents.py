"""Chat templates that leave out contents that are strings.

Those of some vision-language models go through the parts of a content, and render nothing of a
string. All responses would then be the same tokens.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.pool import PreferencePool


def check_reads_strings(pool: PreferencePool, processing_class: PreTrainedTokenizerBase) -> None:
    """Raise ActiveDPOError if a chat of `pool` has strings, and the template leaves them out."""
    if not any(
        isinstance(message.get("content"), str)
        for item in pool
        for message in item.prompt
        if not isinstance(message, str)
    ):
        return
    try:
        one, other = (
            processing_class.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False
            )
            for content in ("one", "other")
        )
    except Exception:  # it may want other messages; tokenization says what is wrong
        return
    if one == other:
        raise ActiveDPOError(
            "processing_class: the chat template leaves out contents that are strings, as those "
            "of some vision-language models do: set tokenizer.chat_template to one that reads them"
        )
