"""Text of files and names, as it may be shown on a terminal."""

from __future__ import annotations

import os
import shlex
import unicodedata

_LONGEST = 2_000  # characters of a message
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})  # controls, directions, half characters


def printable(text: str, keep: str = "") -> str:
    """Return `text` with escapes such as `\\x1b` for characters that a terminal would obey.

    They could color or hide what follows, or pass for lines of ours.

    Args:
        keep: control characters that stay, such as line ends.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character
        if character in keep or unicodedata.category(character) not in _HIDDEN
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def shell_word(path: str | os.PathLike[str]) -> str:
    """Return a path as a word for a shell, which no command takes for an option."""
    text = os.fspath(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def one_line(message: str) -> str:
    """Return a message as one printable line, shortened in its middle where it is very long."""
    half = _LONGEST // 2
    if len(message) > _LONGEST:
        message = f"{message[:half]} ... {message[-half:]}"
    return printable(message)
