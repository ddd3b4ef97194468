"""Processes that are killed at any step: the same command goes on, and ends with the same bytes."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.killing import content, features, project, reward_model, run, run_file, select


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    project(folder)
    reward_model(folder / "reward")
    return folder


def _commands(files: Path, output: Path) -> list[list[str]]:
    return [features(files, output), select(output)]


_CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}


class Unbroken(NamedTuple):
    files: Path
    commands: Callable[[Path, Path], list[list[str]]]
    content: dict[str, bytes]
    steps: int
    passes: int


def _unbroken(files: Path, folder: Path, commands: Any) -> Unbroken:
    code, counts, said = run(commands(files, folder))
    assert code == 0, said
    return Unbroken(files, commands, content(folder), counts["steps"], counts["passes"])


@pytest.fixture(scope="module")
def unbroken(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    return _unbroken(files, tmp_path_factory.mktemp("unbroken"), _commands)


@pytest.fixture(scope="module")
def unbroken_run(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    assert pytest.importorskip("trl").DPOTrainer  # imported once, and not by each process

    def commands(files: Path, output: Path) -> list[list[str]]:
        return [run_file(files, output)]

    return _unbroken(files, tmp_path_factory.mktemp("unbroken_run"), commands)


def _break_off(
    output: Path, unbroken: Unbroken, kills: list[int], number: int, redone: int = 1
) -> None:
    """Kill the commands at each of these steps, then let them end, and compare.

    `redone` is the number of passes that a kill may cost.
    """
    output.mkdir(exist_ok=True)
    commands = unbroken.commands(unbroken.files, output)
    passes = 0
    for when in kills:
        code, counts, said = run(commands, when=when, number=number)
        assert code in (0, _CODES[number]), said  # 0: it had less than that left to do
        if code == 0 or number == signal.SIGKILL:
            assert said == "" or "continuing" in said
        else:
            assert said.splitlines()[-1] in ("activedpo: terminated", "activedpo: interrupted")
            left = content(output).keys() - unbroken.content.keys()
            assert not [name for name in left if not name.endswith(".partial")], left
        assert "Traceback" not in said
        passes += counts["passes"]
    code, counts, said = run(commands)
    assert code == 0, said
    found = content(output)
    assert sorted(found) == sorted(unbroken.content)  # no leftovers
    assert [name for name in found if found[name] != unbroken.content[name]] == []
    assert passes + counts["passes"] <= unbroken.passes + redone * len(kills)


def _steps(seed: int, count: int, last: int) -> list[int]:
    return random.Random(seed).choices(range(1, last + 1), k=count)


def test_killed_once(tmp_path: Path, unbroken: Unbroken) -> None:
    _break_off(tmp_path, unbroken, _steps(0, 1, unbroken.steps), signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_terminated(tmp_path: Path, unbroken: Unbroken, number: int) -> None:
    _break_off(tmp_path, unbroken, [unbroken.steps // 2], number)


@pytest.mark.parametrize("largest", [300, pytest.param(1500, marks=pytest.mark.slow)])
def test_a_full_disk(tmp_path: Path, unbroken: Unbroken, largest: int) -> None:
    commands = unbroken.commands(unbroken.files, tmp_path)
    code, _, said = run(commands, largest=largest)
    assert code == 2 and len(said.splitlines()) == 1, said
    assert str(tmp_path) in said and "cannot be written: file too large" in said
    _break_off(tmp_path, unbroken, [], signal.SIGKILL)  # the same commands go on


def test_a_run_killed_once(tmp_path: Path, unbroken_run: Unbroken) -> None:
    # A stage of a run is done again: its gradient rows are not kept.
    kill = [unbroken_run.steps * 2 // 3]
    _break_off(tmp_path, unbroken_run, kill, signal.SIGKILL, unbroken_run.passes)


# In all: of stores once, or five times over, and of runs once; and signals at any step.


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_store_interrupted_anywhere(
    tmp_path: Path, unbroken: Unbroken, seed: int, number: int
) -> None:
    _break_off(tmp_path, unbroken, _steps(300 + seed, 1, unbroken.steps), number)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_interrupted_anywhere(
    tmp_path: Path, unbroken_run: Unbroken, seed: int, number: int
) -> None:
    kills = _steps(400 + seed, 1, unbroken_run.steps)
    _break_off(tmp_path, unbroken_run, kills, number, unbroken_run.passes)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_store_killed_anywhere(tmp_path: Path, unbroken: Unbroken, seed: int) -> None:
    kills = _steps(seed, 1, unbroken.steps)
    _break_off(tmp_path, unbroken, kills, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_store_killed_five_times(tmp_path: Path, unbroken: Unbroken, seed: int) -> None:
    kills = _steps(100 + seed, 5, unbroken.steps // 2)
    _break_off(tmp_path, unbroken, kills, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(15))
def test_a_run_killed_anywhere(tmp_path: Path, unbroken_run: Unbroken, seed: int) -> None:
    kills = _steps(200 + seed, 1, unbroken_run.steps)
    _break_off(tmp_path, unbroken_run, kills, signal.SIGKILL, unbroken_run.passes)
