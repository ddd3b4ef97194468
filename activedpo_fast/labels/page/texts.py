"""Prompts and responses as the page shows them: as text, as safe HTML, with differences marked."""

from __future__ import annotations

import html
import re
from difflib import SequenceMatcher
from typing import Any

from markdown_it import MarkdownIt

from activedpo_fast.pool.images import image_as_text, open_image
from activedpo_fast.pool.messages import Message, call_lines, content_text, images_of, message_text
from activedpo_fast.pool.texts import Text

_EXACT = 1500  # words; in longer texts frequent words do not start a match, which is far quicker
_MOST_PIXELS = 1600  # of the longer side of an image

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
    rendered: str = _MARKDOWN.render(text)
    return rendered


def messages(text: Text, place: str = "") -> list[dict[str, Any]]:
    """Return the messages of a text, each with `role` (None for plain text), `text` and `html`.

    A message with images also has `images`: data URIs of PNG files, made here of what can be read
    as an image, so that a page shows no file that is none. The page puts them before the text.

    Raises:
        ActiveDPOError: naming `place`, an image that cannot be read.
    """
    if isinstance(text, str):
        return [{"role": None, "text": text, "html": as_html(text)}]
    return [_shown(message, place) for message in text]


def _shown(message: Message, place: str) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "role": message["role"],
        "text": "\n".join(filter(None, (content_text(message), *call_lines(message)))),
        "html": as_html(content_text(message)) + "".join(map(_as_code, call_lines(message))),
    }
    images = [_as_png(image, place) for image in images_of([message])]
    return {**shown, "images": images} if images else shown


def _as_code(text: str) -> str:
    return f"<pre><code>{html.escape(text)}</code></pre>\n"


def _as_png(image: str, place: str) -> str:
    opened = open_image(image, place).convert("RGBA")
    opened.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    return image_as_text(opened, place)


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
    whole = text if isinstance(text, str) else "\n\n".join(message_text(one) for one in text)
    return re.findall(r"^\s+|\S+\s*", whole)
