"""`activedpo exchange`: the commands of its help, from picks to labels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest

from activedpo_fast import Selection, read_labels
from activedpo_fast.cli.app import main
from activedpo_fast.cli.commands.exchange import ToolName
from activedpo_fast.labels import FileOracle, LabelsPending
from activedpo_fast.labels.exchange import TOOLS
from tests.labels.exchange.answering import fill_in

FIXTURES = Path(__file__).parents[1] / "labels" / "exchange" / "fixtures"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(FIXTURES / "batch.jsonl", tmp_path / "picked.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_tools_of_the_help_are_those_that_there_are() -> None:
    assert get_args(ToolName) == tuple(TOOLS)


def test_export_and_import(folder: Path, capsys: Any) -> None:
    command = "exchange export picked.jsonl --tool csv --output to_label.csv --seed 7"
    assert main(command.split()) == 0
    fill_in("csv", folder / "to_label.csv", ["left", "right", "tie", "skip"], "")
    command = "exchange import picked.jsonl to_label.csv --tool csv --output labels.jsonl"
    assert main([*command.split(), "--labeler", "ann"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "to_label.csv: 4 pairs for csv",
        "labels.jsonl: 4 of 4 pairs answered by 'ann' (2 with a preference, 1 ties, 1 skips)",
    ]
    answered, labels = read_labels("labels.jsonl")
    assert labels[2:] == [None, None] and set(labels[:2]) <= {0, 1}
    assert answered == Selection.from_jsonl("picked.jsonl")


def test_sides_may_be_kept(folder: Path) -> None:
    command = "exchange export picked.jsonl --tool jsonl --output out.jsonl --keep-sides"
    assert main(command.split()) == 0
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert {row["id"][-3:] for row in rows} == {"-01"} and {row["seed"] for row in rows} == {"none"}


def test_several_labelers_and_what_is_set_aside(folder: Path, capsys: Any) -> None:
    answers = FIXTURES / "label_studio.json"
    tasks = json.loads(answers.read_text())
    tasks[0]["data"]["left"] = "changed"
    (folder / "export.json").write_text(json.dumps(tasks))
    command = (
        "exchange import picked.jsonl export.json --tool label-studio --output labels.jsonl".split()
    )
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "export.json, task 1, annotation 11: the responses" in error
    assert not list(folder.glob("labels*"))
    assert main([*command, "--set-aside", "not_used.jsonl"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "labels-1.jsonl: 3 of 4 pairs answered by '1' (1 with a preference, 1 ties, 1 skips)",
        "labels-2.jsonl: 2 of 4 pairs answered by '2' (1 with a preference, 0 ties, 1 skips)",
        "1 of 4 pairs have no answer yet",
        "not_used.jsonl: 2 answers set aside",
    ]


def test_a_run_that_waits_for_labels_reads_them(folder: Path) -> None:
    """The file that `activedpo run` asks to fill in is exported; its labels go back beside it."""
    picks = Selection.from_jsonl("picked.jsonl")
    oracle = FileOracle(folder / "labeling")
    with pytest.raises(LabelsPending):
        oracle.label(picks)
    to_label, labels = map(str, oracle.paths(picks))
    assert main(["exchange", "export", to_label, "--tool", "potato", "--output", "to_label"]) == 0
    fill_in("potato", folder / "to_label", ["left", "right", "tie", "skip"])
    command = ["exchange", "import", to_label, "to_label/annotation_output", "--tool", "potato"]
    assert main([*command, "--output", labels]) == 0
    found = oracle.label(picks)
    assert found[2:] == [None, None] and set(found[:2]) <= {0, 1}


def test_answers_and_labels_are_not_overwritten(folder: Path, capsys: Any) -> None:
    export = "exchange export picked.jsonl --tool csv --output out.csv".split()
    assert main(export) == 0 == main(export)  # the same bytes
    (folder / "out.csv").write_text((folder / "out.csv").read_text() + "filled in\n")
    assert main(export) == 2
    assert "out.csv exists and may hold answers" in capsys.readouterr().err
    shutil.copy(FIXTURES / "label_studio.json", folder / "export.json")
    load = "exchange import picked.jsonl export.json --tool label-studio --output l.jsonl".split()
    assert main([*load, "--combine", "majority"]) == 0
    assert "l.jsonl: 4 of 4 pairs have a label (2 with a preference, 2 ties, 0 skips)" in (
        capsys.readouterr().out
    )
    first = (folder / "l.jsonl").read_bytes()
    assert main([*load, "--combine", "dawid-skene"]) == 0
    assert (folder / "l.jsonl.labels-1").read_bytes() == first


def test_labels_of_two_files_are_not_half_ignored(folder: Path, capsys: Any) -> None:
    assert main("select store --labeled a.jsonl --labeled b.jsonl --output c.jsonl".split()) == 2
    assert "--labeled is given twice" in capsys.readouterr().err
