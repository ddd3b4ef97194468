"""`activedpo features` by several processes: the store of one process, whatever happens to them."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.killing import content, features, project, run, run_together, select

Result = tuple[int, dict[str, int], str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    project(folder, prompts=7)
    return folder


@pytest.fixture(scope="module")
def alone(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """The files of one process's store and picks, and its backward passes."""
    folder = tmp_path_factory.mktemp("alone")
    code, counts, said = run([features(files, folder), select(folder)])
    assert code == 0, said
    return content(folder), counts["passes"]


def _command(files: Path, output: Path, *options: str) -> list[str]:
    """The command of `features`, which says what it has done."""
    return [*features(files, output)[:-1], *options]


def _said(results: Sequence[Result]) -> list[str]:
    assert all("Traceback" not in said for _, _, said in results), results
    return [said for _, _, said in results]


def _codes(results: Sequence[Result]) -> list[int]:
    return [code for code, _, _ in results]


@pytest.mark.parametrize("size", [2, 3])
def test_the_store_and_the_picks_are_those_of_one_process(
    files: Path, tmp_path: Path, alone: tuple[dict[str, bytes], int], size: int
) -> None:
    results = run_together([_command(files, tmp_path)] * size)
    assert _codes(results) == [0] * size, results
    first, *others = _said(results)
    assert "14 gradient rows of 7 prompts in " in first and first.count("\n") == 1
    assert others == [""] * (size - 1)
    passes = [counts["passes"] for _, counts, _ in results]
    assert sum(passes) == alone[1] and max(passes) - min(passes) <= 1
    assert run([select(tmp_path)])[0] == 0
    assert content(tmp_path) == alone[0]
    again = run_together([_command(files, tmp_path)] * size)
    assert _codes(again) == [0] * size and "nothing to do" in _said(again)[0]
    assert sum(counts["passes"] for _, counts, _ in again) == 0
