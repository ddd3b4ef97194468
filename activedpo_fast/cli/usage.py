"""One line for a command line that cannot be read, in the words of the command's help."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Any, Literal, Union


def usage_line(error: Any) -> str:
    """Return the message of a usage error of typer.

    Its own words differ between versions, and may be those of the library that it checks with. What
    a parameter accepts is therefore read from the command's signature.
    """
    context: Any = getattr(error, "ctx", None)
    parameter: Any = getattr(error, "param", None)
    see = f" (see {context.command_path} --help)" if context is not None else ""
    wrong = parameter is not None and type(error).__name__ == "BadParameter"
    if wrong and context is not None and context.command.callback is not None:
        function = inspect.unwrap(context.command.callback)
        hints = typing.get_type_hints(function, include_extras=True)
        expected = _expected(hints.get(parameter.name))
        if expected is not None:
            return f"{_name(parameter)}{_given(error)}: expected {expected}{see}"
    return f"{error.format_message().strip().rstrip('.')}{see}"


def _expected(annotation: Any) -> str | None:
    """Return what values a parameter accepts; None if any text will do."""
    if typing.get_origin(annotation) is not typing.Annotated:
        return None
    base, info = typing.get_args(annotation)[:2]
    if typing.get_origin(base) in (Union, types.UnionType):
        base = next(kind for kind in typing.get_args(base) if kind is not type(None))
    if typing.get_origin(base) is Literal:
        *others, last = typing.get_args(base)
        return f"{', '.join(others)} or {last}" if others else str(last)
    kind = {int: "an integer", float: "a number"}.get(base)
    if kind is None:
        return None
    least, most = getattr(info, "min", None), getattr(info, "max", None)
    return (
        kind
        + (f" from {least}" if least is not None else "")
        + (f" to {most}" if most is not None else "")
    )


def _name(parameter: Any) -> str:
    names = [name for name in parameter.opts if name.startswith("-")]
    return str(max(names, key=len) if names else parameter.metavar or parameter.name)


def _given(error: Any) -> str:
    """Return the value that was refused, after a space; empty if the error does not have it."""
    listed = getattr(error.__cause__, "errors", None)
    return f" {listed()[0]['input']}" if callable(listed) else ""
