"""Processes that are killed at any step: the same command goes on, and ends with the same bytes."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.killing import content, project, run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    project(folder)
    return folder


def _commands(files: Path, output: Path) -> list[list[str]]:
    return [
        [
            "features",
            str(files / "pool.jsonl"),
            f"--model={files / 'model'}",
            f"--adapter={files / 'adapter'}",
            f"--output={output / 'store'}",
            "--proj-dim=16",
            "--device=cpu",
            "--max-tokens-per-batch=16",
            "--no-verify",
            "--quiet",
        ],
        [
            "select",
            str(output / "store"),
            "--batch-size=3",
            f"--output={output / 'picked.jsonl'}",
            "--quiet",
        ],
    ]


@pytest.fixture(scope="module")
def unbroken(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    folder = tmp_path_factory.mktemp("unbroken")
    code, counts, said = run(_commands(files, folder))
    assert code == 0, said
    return Unbroken(files, content(folder), counts["steps"], counts["passes"])


class Unbroken(NamedTuple):
    files: Path
    content: dict[str, bytes]
    steps: int
    passes: int


def _break_off(output: Path, unbroken: Unbroken, kills: list[int], number: int) -> None:
    """Kill the commands at each of these steps, then let them end, and compare."""
    commands = _commands(unbroken.files, output)
    passes = 0
    for when in kills:
        code, counts, said = run(commands, when=when, number=number)
        assert code in (0, -signal.SIGKILL, 143), said  # 0: it had less than that left to do
        assert "Traceback" not in said
        passes += counts["passes"]
    code, counts, said = run(commands)
    assert code == 0, said
    assert content(output) == unbroken.content  # no leftovers, either
    # What a killed process had computed is not computed again, except for one batch.
    assert passes + counts["passes"] <= unbroken.passes + len(kills)


def _steps(seed: int, count: int, last: int) -> list[int]:
    return random.Random(seed).choices(range(1, last + 1), k=count)


@pytest.mark.parametrize("seed", range(3))
def test_killed_once(tmp_path: Path, unbroken: Unbroken, seed: int) -> None:
    _break_off(tmp_path, unbroken, _steps(seed, 1, unbroken.steps), signal.SIGKILL)


def test_terminated(tmp_path: Path, unbroken: Unbroken) -> None:
    _break_off(tmp_path, unbroken, [unbroken.steps // 2], signal.SIGTERM)


@pytest.mark.slow
def test_killed_at_any_step(tmp_path: Path, unbroken: Unbroken) -> None:
    """50 kills: half of them alone, half of them several of one store."""
    last = unbroken.steps
    for seed in range(25):
        (tmp_path / f"one-{seed}").mkdir()
        _break_off(tmp_path / f"one-{seed}", unbroken, _steps(seed, 1, last), signal.SIGKILL)
    for seed in range(5):
        (tmp_path / f"many-{seed}").mkdir()
        kills = _steps(100 + seed, 5, last // 2)
        _break_off(tmp_path / f"many-{seed}", unbroken, kills, signal.SIGKILL)
