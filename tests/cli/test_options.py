"""The options of the command line are the fields of the settings."""

from __future__ import annotations

from dataclasses import fields

import pytest
import typer

from activedpo_fast import ActiveDPOError, SelectorConfig
from activedpo_fast.cli.app import app
from activedpo_fast.cli.options import key_rows, selector_config

OF_THE_FIELDS = {field.name: field for field in fields(SelectorConfig)}
# Their help says what holds for the few strategies that a store serves.
OF_A_STORE = {("select", "strategy"), ("select", "normalize"), ("select", "preselect")}


@pytest.mark.parametrize(("command", "count"), [("features", 13), ("select", 3)])
def test_options_are_the_fields(command: str, count: int) -> None:
    own = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    shared = [
        parameter
        for parameter in own.params
        if parameter.name in OF_THE_FIELDS and (command, parameter.name) not in OF_A_STORE
    ]
    assert len(shared) == count
    for parameter in shared:
        field = OF_THE_FIELDS[parameter.name]
        assert parameter.help == field.metadata["help"]
        assert parameter.default == field.default
        assert parameter.opts == [f"--{parameter.name.replace('_', '-')}"]


def test_the_help_of_run_lists_the_keys_of_the_file() -> None:
    own = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    words = " ".join(own.epilog.split())
    for section in ("loop", "selection", "evaluate"):
        for row in key_rows(section):
            assert f"{row.name}: {row.help} [{row.default}]" in words


def test_what_is_refused_is_named_as_the_option() -> None:
    with pytest.raises(ActiveDPOError, match="^--proj-dim: 0 is below 1$"):
        selector_config(proj_dim=0)
    with pytest.raises(ActiveDPOError, match="^--chat-template-kwargs: not JSON"):
        selector_config(chat_template_kwargs="{")
