"""What a command line accepts: said in one line, in the words of the help, on every command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from activedpo_fast.cli.app import app, main
from activedpo_fast.cli.commands.select import StoreStrategy
from activedpo_fast.selection.strategies import STRATEGIES
from tests.labels.exchange.answering import fill_in


def _commands(command: Any = None, name: str = "") -> Iterator[tuple[str, Any]]:
    command = command or typer.main.get_command(app)
    if not hasattr(command, "commands"):
        yield name.strip(), command
        return
    for own, inner in command.commands.items():
        yield from _commands(inner, f"{name} {own}")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("select s --output o --random-fraction 3", "3: expected a number from 0 to 1"),
        ("select s --output o --random-fraction x", "x: expected a number from 0 to 1"),
        ("select s --output o --min-score low", "low: expected a number"),
        ("select s --output o --pairs 0", "0: expected an integer from 1"),
        ("select s --output o --seed 1.5", "1.5: expected an integer"),
        ("select s --output o --normalize l2", "l2: expected default, response, pair or none"),
        ("label p --port -1", "-1: expected an integer from 0 to 65535"),
        ("label p --combine best", "best: expected majority or dawid-skene"),
        ("demo --rounds none", "none: expected an integer from 1"),
        ("exchange export p --output o --tool lab", "lab: expected label-studio, argilla, "),
        ("features p --model m --output o --threads 0", "0: expected an integer from 1"),
    ],
)
def test_a_wrong_value_is_one_line_with_what_is_accepted(
    argv: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv.split()) == 2
    error = capsys.readouterr().err
    option = argv.split()[-2]
    assert error.startswith(f"activedpo: error: {option} {said}"), error
    assert error.count("\n") == 1 and error.endswith(" --help)\n")


def test_a_misspelled_option_names_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["select", "s", "--output", "o", "--normalise", "pair"]) == 2
    error = capsys.readouterr().err
    assert "--normalise" in error and "--normalize" in error and error.count("\n") == 1


def test_select_says_which_strategies_a_store_serves(capsys: pytest.CaptureFixture[str]) -> None:
    served = get_args(StoreStrategy)
    needs_rows = {
        name
        for name, strategy in STRATEGIES.items()
        if strategy.requires <= {"gradients", "rewards"}
    }
    assert set(served) == needs_rows
    assert main(["select", "--help"]) == 0
    help_text = " ".join(capsys.readouterr().out.split())
    assert (
        "activedpo|trace|random|reward_gap" in help_text
        and "a reference model: they are in" in help_text
    )
    for name in STRATEGIES.keys() - needs_rows:
        assert main(["select", "s", "--output", "o", "--strategy", name]) == 2
        error = capsys.readouterr().err
        needed = "last hidden states" if name == "apo" else "log-probs of the reference model"
        assert f"--strategy {name}: it needs {needed}, which a store does not have" in error
        assert "expected activedpo, trace, random or reward_gap" in error and error.count("\n") == 1
    assert main(["select", "s", "--output", "o", "--strategy", "best"]) == 2
    assert capsys.readouterr().err == (
        "activedpo: error: --strategy best: expected activedpo, trace, random or reward_gap\n"
    )


def test_every_command_takes_quiet() -> None:
    commands = dict(_commands())
    assert len(commands) == 14
    for name, command in commands.items():
        quiet = [one for one in command.params if one.name == "quiet"]
        assert quiet and quiet[0].opts == ["--quiet", "-q"], name
        assert quiet[0].help.startswith("Print nothing except errors"), name


def test_quiet_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = {"id": "a", "pair": [0, 1], "score": 1.0, "rank": 0, "prompt": "p"}
    picks, table = tmp_path / "picked.jsonl", tmp_path / "t.jsonl"
    picks.write_text(json.dumps({**line, "responses": ["x", "y"]}) + "\n")
    assert main(["exchange", "export", str(picks), "--tool=jsonl", f"--output={table}", "-q"]) == 0
    fill_in("jsonl", table, ["left"])
    command = ["exchange", "import", str(picks), str(table), "--tool=jsonl", "--quiet"]
    assert main([*command, f"--output={tmp_path / 'labels.jsonl'}"]) == 0
    assert main(["env", "-q"]) == 0
    assert capfd.readouterr() == ("", "")
    assert json.loads((tmp_path / "labels.jsonl").read_text())["label"] in (0, 1)


def test_help_needs_no_slow_library() -> None:
    code = (
        "import sys; from activedpo_fast.cli.app import main; "
        "main(['select', '--help']); main(['label', '--help']); "
        "sys.exit(bool({'torch', 'transformers', 'datasets', 'peft', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
