"""Prompts and responses as the page shows them: as text, as safe HTML, with differences marked."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from markdown_it import MarkdownIt

from activedpo_fast.pool.texts import Text

_EXACT = 1500  # words; in longer texts frequent words do not start a match, which is far quicker

# HTML in a text is shown as text. So are links and images, by their addresses: a labeler judges
# what was written, and a page must not load or lead to what a model made up.
_MARKDOWN = (
    MarkdownIt("commonmark", {"html": False, "breaks": True})
    .enable(["table", "strikethrough"])
    .disable(["link", "image", "autolink", "reference"])
)


Piece = tuple[str, bool]


def as_html(text: str) -> str:
    """Return Markdown as HTML without scripts, links, images or attributes from the text."""
    html: str = _MARKDOWN.render(text)
    return html


def messages(text: Text) -> list[dict[str, str | None]]:
    """Return the messages of a text, each with `role` (None for plain text), `text` and `html`."""
    if isinstance(text, str):
        return [{"role": None, "text": text, "html": as_html(text)}]
    return [
        {"role": one["role"], "text": one["content"], "html": as_html(one["content"])}
        for one in text
    ]


def differences(left: Text, right: Text) -> tuple[list[Piece], list[Piece]]:
    """Return both texts in pieces (text, differs), compared word by word."""
    a, b = _words(left), _words(right)
    matcher = SequenceMatcher(
        None, [w.strip() for w in a], [w.strip() for w in b], autojunk=max(len(a), len(b)) > _EXACT
    )
    pieces: tuple[list[Piece], list[Piece]] = ([], [])
    for kind, a_start, a_end, b_start, b_end in matcher.get_opcodes():
        for found, words in ((pieces[0], a[a_start:a_end]), (pieces[1], b[b_start:b_end])):
            if words:
                found.append(("".join(words), kind != "equal"))
    return pieces


def _words(text: Text) -> list[str]:
    """Return the words of a text, each with the space after it; joined, they are the text."""
    whole = text if isinstance(text, str) else "\n\n".join(one["content"] for one in text)
    return re.findall(r"^\s+|\S+\s*", whole)
