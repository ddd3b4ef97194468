"""Runs that the tests of this folder read; they are not to be changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.runs import make_loop


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of a complete run of activedpo, and of one of random."""
    folder = tmp_path_factory.mktemp("runs")
    for strategy in ("activedpo", "random"):
        make_loop(folder / strategy, strategy=strategy).run()
    return folder / "activedpo", folder / "random"


@pytest.fixture
def copied(runs: tuple[Path, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A function that copies the run of activedpo to a folder that the test may change."""

    def copy(name: str = "run") -> Path:
        return Path(shutil.copytree(runs[0], tmp_path / name))

    return copy
