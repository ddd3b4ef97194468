"""The command `activedpo report`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from activedpo_fast.cli.app import main
from activedpo_fast.cli.report import report_runs
from activedpo_fast.errors import ActiveDPOError

pytest.importorskip("matplotlib")
Copy = Callable[[str], Path]


def test_one_run(copied: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied("mine")
    assert main(["report", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "mine: strategy activedpo, 2 complete rounds" in said and "norm" in said
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert str(folder / "report.html") in said


def test_several_runs(
    runs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *map(str, runs)]) == 0
    assert "random − activedpo" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()
    assert not list(runs[0].glob("*.html"))  # the runs stay as they are
    assert main(["report", *map(str, runs), "--output", "mine.html", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "mine.html").read_text() == (tmp_path / "report.html").read_text()


def test_the_card_is_one_the_hub_can_read(
    copied: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, path = copied("mine"), tmp_path / "README.md"
    assert main(["report", str(folder), "--card", str(path)]) == 0
    card = ModelCard.load(path)
    assert card.data.library_name == "peft" and "dpo" in card.data.tags
    assert card.data.base_model is None  # a model in memory has no name
    head = yaml.safe_load(path.read_text().split("---\n")[1])
    assert head["model_name"] == "mine"
    for text in (
        "round-001",
        "| round | labels | norm | train loss |",
        "preferences",
        "2505.19241",
    ):
        assert text in card.text


def test_what_is_wrong_is_one_line(
    copied: Copy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copied("mine")

    def refused(*argv: str) -> str:
        assert main(["report", *argv]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        return captured.err

    assert "no such folder" in refused(str(tmp_path / "none"))
    assert "is a folder, not a file" in refused(str(folder), "--output", str(tmp_path))
    assert "give one RUN" in refused(str(folder), str(copied("other")), "--card", "x.md")
    assert "Missing argument" in refused()
    for adapter in folder.glob("round-*/adapter"):
        adapter.rename(adapter.with_name("gone"))
    assert "no round is trained" in refused(str(folder), "--card", str(tmp_path / "x.md"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert "pip install activedpo-fast[report]" in refused(str(folder))


@pytest.mark.parametrize(
    "name", ["config.json", "round-000/labels.jsonl", "start/adapter/README.md", "new.jsonl"]
)
def test_no_file_of_a_run_is_written_to(copied: Callable[[str], Path], name: str) -> None:
    run = copied("run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for arguments in ({"output": run / name}, {"card": run / name}):
        with pytest.raises(ActiveDPOError, match="only .html and .md files beside the run's own"):
            report_runs([run], **arguments)
    with pytest.raises(ActiveDPOError, match="--card .* is also the report's file"):
        report_runs([run], output=run / "x.md", card=run / "x.md")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_folder_whose_name_is_no_text(copied: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(os.fsdecode(b"\xff"))
    assert main(["report", str(folder), "--card", str(folder / "README.md")]) == 0
    assert r"\udcff: strategy activedpo" in capsys.readouterr().out
    assert r"\udcff" in (folder / "report.html").read_text()
    assert r"# \udcff" in (folder / "README.md").read_text()
