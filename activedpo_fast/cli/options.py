"""Options of the command line, and the keys of the run file, from the fields of the settings."""

from __future__ import annotations

import textwrap
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any, NamedTuple

import typer

from activedpo_fast._checks import describe
from activedpo_fast.cli.run_file import SETTINGS, section_keys
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.settings import SelectorConfig

_WIDTH = 80


class Row(NamedTuple):
    """A setting in a table."""

    name: str
    type: str
    default: str
    help: str


def option(settings: type, name: str, **more: Any) -> Any:
    """Return the option for a field: `--name`, with the field's help."""
    return typer.Option(f"--{name.replace('_', '-')}", help=_help(_field(settings, name)), **more)


def flag(settings: type, name: str) -> Any:
    """The same for a field that is true or false."""
    dashed = name.replace("_", "-")
    return typer.Option(f"--{dashed}/--no-{dashed}", help=_help(_field(settings, name)))


def selector_config(**values: Any) -> SelectorConfig:
    """Return the settings; what they refuse is named as the option that was given."""
    try:
        return SelectorConfig(**values)
    except ActiveDPOError as error:
        name, colon, reason = str(error).partition(":")
        if not colon or name not in values:
            raise
        raise ActiveDPOError(f"--{name.replace('_', '-')}:{reason}") from None


def key_rows(section: str) -> Iterator[Row]:
    """Yield the rows of the keys of a section of `SETTINGS` in the run file."""
    rows = {row.name: row for row in field_rows(SETTINGS[section])}
    return (rows[name] for name in section_keys(section))


def field_rows(settings: type) -> Iterator[Row]:
    """Yield the rows of all fields of `SelectorConfig` or `LoopConfig`."""
    hints = typing.get_type_hints(settings)
    for own in fields(settings):
        yield Row(own.name, describe(hints[own.name]), _default(own), _help(own))


def keys_help() -> str:
    """Return the keys of the run file's sections that have settings for `--help`."""
    lines = ["\b"]
    for section, of in (
        ("loop", " (fields of LoopConfig)"),
        ("selection", " (fields of SelectorConfig)"),
        ("evaluate", ""),
    ):
        lines.append(f"Keys of {section}{of}:")
        for row in key_rows(section):
            lines += textwrap.wrap(
                f"{row.name}: {row.help} [{row.default}]",
                _WIDTH,
                initial_indent="  ",
                subsequent_indent="      ",
                break_on_hyphens=False,
            )
    return "\n".join(lines)


def _field(settings: type, name: str) -> Field[Any]:
    return next(own for own in fields(settings) if own.name == name)


def _help(own: Field[Any]) -> str:
    return str(own.metadata["help"])


def _default(own: Field[Any]) -> str:
    if own.default is MISSING:
        return "to be given"
    if own.default is None:
        return "null"
    return str(own.default).lower() if isinstance(own.default, bool) else str(own.default)
