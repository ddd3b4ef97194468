"""Checks of settings by their type hints, and the words of their messages."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Collection
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, Union

from activedpo_fast.errors import ActiveDPOError


def check_at_least(least: int, **options: int | None) -> None:
    """Raise `ActiveDPOError` for the first option below `least` or no integer, except None."""
    for name, value in options.items():
        if value is None:
            continue
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ActiveDPOError(f"{name}: expected an integer, got {value!r}")
        if value < least:
            raise ActiveDPOError(f"{name}: {value} is below {least}")


def is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def nearest(name: str, known: Collection[str], otherwise: str | None = None) -> str:
    """Return the end of a message about an unknown name: the one that is meant if one is close.

    Args:
        otherwise: what to say if none is; by default, all that are known.
    """
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return otherwise or f"known: {', '.join(sorted(known))}"


def fits(value: Any, hint: Any) -> bool:
    """Return whether `value` can be of the type `hint`; types that YAML does not have pass."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    plain = origin or hint
    if plain is type(None):
        return value is None
    if plain is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if plain is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if plain in (bool, str, dict, list, Path):
        return isinstance(value, plain)
    return True


def describe(hint: Any) -> str:
    """Return what a value of the type `hint` is called in messages and tables."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(repr(argument) for argument in arguments)
    names = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        Path: "a path",
        dict: "a section of keys",
        list: "a list",
        type(None): "null",
    }
    return names.get(origin or hint, str(hint))
