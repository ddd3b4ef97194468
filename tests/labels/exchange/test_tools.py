"""The tools' own code reads what is exported, and writes what is imported.

The tools are not among this project's requirements, and do not go with them into one environment.
Install them elsewhere and name that Python:

    pip install label-studio-sdk argilla==2.8.0 potato-annotation distilabel
    ACTIVEDPO_TOOLS_PYTHON=.../bin/python pytest -m slow tests/labels/exchange
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from activedpo_fast.labels.exchange import export_picks, import_answers

pytestmark = pytest.mark.slow

PYTHON = os.environ.get("ACTIVEDPO_TOOLS_PYTHON", sys.executable)
SCRIPTS = Path(__file__).parent / "tools"
BATCH = Path(__file__).parent / "fixtures" / "batch.jsonl"


def _run(module: str, script: str, *arguments: object) -> None:
    found = subprocess.run(
        [PYTHON, "-c", f"import importlib.util as u, sys; sys.exit(not u.find_spec({module!r}))"]
    )
    if found.returncode:
        pytest.skip(f"{module} is not installed for {PYTHON} (set ACTIVEDPO_TOOLS_PYTHON)")
    command = [PYTHON, str(SCRIPTS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_label_studio(tmp_path: Path) -> None:
    export_picks(BATCH, "label-studio", tmp_path / "out")
    _run("label_studio_sdk", "label_studio.py", tmp_path / "out", tmp_path)
    for name, cancelled in (("label_studio.json", 1), ("label_studio_min.json", 0)):
        done = import_answers(BATCH, tmp_path / name, "label-studio", tmp_path / "labels.jsonl")
        assert done.answered["1"] == {1: 1, "tie": 1, "skip": 1, 0: 1}
        assert done.answered["2"]["skip"] == cancelled and done.unanswered == 0


def test_argilla(tmp_path: Path) -> None:
    export_picks(BATCH, "argilla", tmp_path / "out")
    _run("argilla", "argilla.py", tmp_path / "out", tmp_path)
    done = import_answers(BATCH, tmp_path / "argilla.json", "argilla", tmp_path / "labels.jsonl")
    answered = [sum(labels.values()) for labels in done.answered.values()]
    assert sorted(answered) == [2, 4]


@pytest.mark.parametrize(
    ("tool", "expected"), [("potato", {"ann": 3, "ben": 2}), ("potato-scale", {"ann": 3})]
)
def test_potato(tool: str, expected: dict[str, int], tmp_path: Path) -> None:
    export_picks(BATCH, tool, tmp_path / "out")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _run("potato", "potato.py", tmp_path / "out", port)
    answers = tmp_path / "out" / "annotation_output"
    done = import_answers(BATCH, answers, tool, tmp_path / "labels.jsonl")
    assert {name: sum(labels.values()) for name, labels in done.answered.items()} == expected


def test_distilabel(tmp_path: Path) -> None:
    export_picks(BATCH, "distilabel", tmp_path / "out.jsonl")
    _run("distilabel", "distilabel.py", tmp_path / "out.jsonl", tmp_path / "rated.jsonl")
    rated = tmp_path / "rated.jsonl"
    done = import_answers(BATCH, rated, "distilabel", tmp_path / "labels.jsonl")
    assert done.answered == {"judge-1": {1: 1, "tie": 1, 0: 1}} and done.unanswered == 1
