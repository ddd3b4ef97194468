"""Answers that are no labels are named, and refused or set aside; files that are none, too."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.exchange import TOOLS, export_picks, import_answers, reading
from activedpo_fast.selection.picks_jsonl import read_picks
from tests.labels.exchange.answering import fill_in

BATCH = Path(__file__).parent / "fixtures" / "batch.jsonl"
Rows = list[dict[str, Any]]


def _import(path: Path, tool: str = "jsonl", **more: Any) -> Any:
    return import_answers(BATCH, path, tool, path.parent / "labels.jsonl", **more)


def _answered(folder: Path, change: Callable[[Rows], Any] = lambda rows: None) -> Path:
    """Export as JSONL, answer "left" everywhere, and change the rows."""
    path = folder / "rows.jsonl"
    export_picks(BATCH, "jsonl", path, seed=None)
    fill_in("jsonl", path, ["left"] * 4)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = change(rows) or rows
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _swap_texts(rows: Rows) -> None:
    for row in rows:
        row["left"], row["right"] = row["right"], row["left"]


def _swap_hashes_and_drop_texts(rows: Rows) -> None:
    for row in rows:
        row["left_sha256"], row["right_sha256"] = row["right_sha256"], row["left_sha256"]
        del row["left"], row["right"], row["prompt"]


def _only_hashes(row: dict[str, Any]) -> dict[str, Any]:
    for name in ("left", "right", "prompt"):
        del row[name]
    return row


@pytest.mark.parametrize("change", [_swap_texts, _swap_hashes_and_drop_texts])
def test_swapped_sides_are_recognized(change: Callable[[Rows], None], tmp_path: Path) -> None:
    _import(_answered(tmp_path, change))
    labels = [record["label"] for _, _, record in read_picks(tmp_path / "labels.jsonl")]
    assert labels == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("change", "reason", "kept"),
    [
        (lambda rows: rows[1].update(id="../../x"), "line 2: the id '../../x' is not one", 3),
        (lambda rows: rows[1].update(id="\x1b[31m" * 99), r"line 2: the id '\\x1b\[31m.*\.\.\.", 3),
        (lambda rows: rows[1].update(id="0123456789abcdef-01"), "not in the batch", 3),
        (lambda rows: rows[1].update(id=rows[0]["id"]), "the prompt is not that of 'q1'", 3),
        (lambda rows: _only_hashes(rows[1]).update(pick_id="q1"), "'pick_id' is 'q1', but", 3),
        (
            lambda rows: _only_hashes(rows[1]).update(left_sha256="0"),
            "hashes are .* the left one",
            3,
        ),
        (lambda rows: rows[1].update(left=[[]]), r"not those of '../../q2': \[\[\]\] and", 3),
        (lambda rows: rows[1].update(left="other"), "the left one was changed", 3),
        (lambda rows: rows[1].update(right=rows[1]["left"]), "both sides are the same", 3),
        (lambda rows: rows[1].update(prompt="other"), "the prompt is not that of '../../q2'", 3),
        (lambda rows: rows[1].update(choice="both"), "the answer 'both' is not one of left", 3),
        (lambda rows: rows[1].update(choice=1), "the answer '1' is not one of left", 3),
        (lambda rows: rows[1].update(labeler="\ud800"), "half of a surrogate pair", 3),
        (lambda rows: rows[1].update(labeler="x" * 201), "more than 200 characters", 3),
        (lambda rows: [*rows, rows[1]], r"line 5: .* already answered pair \[0, 2\].*line 2", 4),
        (
            lambda rows: [*rows, {**rows[1], "choice": "tie"}],
            r"line 2: labeler 'ann' gave different answers \(0, 'tie'\).*and 1 more",
            3,
        ),
    ],
)
def test_an_answer_that_is_no_label(
    change: Callable[[Rows], Any], reason: str, kept: int, tmp_path: Path
) -> None:
    path = _answered(tmp_path, change)
    with pytest.raises(ActiveDPOError, match=reason) as caught:
        _import(path)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert not (tmp_path / "labels.jsonl").exists()
    done = _import(path, set_aside=tmp_path / "aside.jsonl")
    records = [record for _, _, record in read_picks(tmp_path / "labels.jsonl")]
    assert sum(record["label"] is not None for record in records) == kept == 4 - done.unanswered
    aside = [json.loads(line) for line in (tmp_path / "aside.jsonl").read_text().splitlines()]
    assert len(aside) == done.set_aside > 0
    assert all(str(tmp_path) in row["place"] and row["reason"] and row["record"] for row in aside)


def test_labelers_are_kept_apart_in_files_that_stay_in_the_folder(tmp_path: Path) -> None:
    names = ["ann", "Ann", "../../etc/passwd", "=cmd", "\x1b[2J"]

    def by_all(rows: Rows) -> Rows:
        return [{**row, "labeler": name} for name in names for row in rows]

    (tmp_path / "inner").mkdir()
    done = _import(_answered(tmp_path / "inner", by_all))
    assert set(done.files) == set(names) and len(set(done.files.values())) == len(names)
    assert {path.parent for path in done.files.values()} == {tmp_path / "inner"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inner"]
    for name, path in done.files.items():
        assert {record["labeler"] for _, _, record in read_picks(path)} == {name}


def test_both_a_side_and_no_preference(tmp_path: Path) -> None:
    export_picks(BATCH, "label-studio", tmp_path / "ls")
    path = fill_in("label-studio", tmp_path / "ls", ["left"] * 4)
    tasks = json.loads(path.read_text())
    tie = {"from_name": "no_preference", "value": {"choices": ["tie"]}}
    tasks[0]["annotations"][0]["result"].append(tie)
    tasks[1]["annotations"][0]["result"] = []
    path.write_text(json.dumps(tasks))
    with pytest.raises(
        ActiveDPOError, match="annotation 0: .* several answers: 'left' and 'tie'.*and 1 more"
    ):
        _import(path, "label-studio")
    _import(path, "label-studio", set_aside=tmp_path / "aside.jsonl")
    assert "annotation has no answer" in (tmp_path / "aside.jsonl").read_text()


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    "content",
    [b"", b"\x00\x01", "\ufefföä".encode("utf-16"), b"[" * 100_000, b"\xff", b"[1, 2]", b"{}"],
)
def test_files_of_another_kind_are_one_clear_line(
    tool: str, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / f"answers{TOOLS[tool].suffix or '.json'}"
    path.write_bytes(content)
    with pytest.raises(ActiveDPOError) as caught:
        _import(path, tool)
    message = str(caught.value)
    assert str(path) in message and len(message) < len(str(tmp_path)) * 2 + 250
    assert "\n" not in message


@pytest.mark.parametrize("tool", TOOLS)
def test_no_file(tool: str, tmp_path: Path) -> None:
    missing = tmp_path / f"missing{TOOLS[tool].suffix or '.json'}"
    with pytest.raises(ActiveDPOError, match="missing.*no such file"):
        _import(missing, tool)
    if tool.startswith("potato"):
        with pytest.raises(ActiveDPOError, match=r"no folder in it has a user_state\.json"):
            _import(tmp_path, tool)


def test_big_files_are_refused_before_they_are_read(tmp_path: Path, monkeypatch: Any) -> None:
    path = _answered(tmp_path)
    monkeypatch.setattr(reading, "MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(ActiveDPOError, match="are read at once"):
        _import(path)


def test_long_and_deep_answers_are_cut_in_the_file_of_those_set_aside(tmp_path: Path) -> None:
    def change(rows: Rows) -> None:
        rows[0]["id"] = "x" * 200_000

    aside = tmp_path / "aside.jsonl"
    _import(_answered(tmp_path, change), set_aside=aside)
    assert aside.stat().st_size < 2000 and "left out: too long" in aside.read_text()


def test_csv_runs_nothing_and_may_have_other_separators(tmp_path: Path) -> None:
    path = tmp_path / "picks.csv"
    export_picks(BATCH, "csv", path, seed=None)
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row)
    assert "'=2+2" in rows[2] and "''merhaba'" in rows[3]
    for row in rows[1:]:
        row[rows[0].index("choice")] = " Right "
    for delimiter in ",;\t":
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, delimiter=delimiter).writerows(rows)
        done = _import(path, "csv", labeler="ann")
        assert done.answered == {"ann": {1: 4}}
    rows[2].append("more")
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(ActiveDPOError, match="line 3: 15 cells where the header has 14"):
        _import(path, "csv")


@pytest.mark.parametrize(
    ("text", "message"), [("nul \0", "a response has"), ("half \ud800", ".ud800 is half")]
)
def test_texts_that_no_tool_keeps_are_refused_on_export(
    text: str, message: str, tmp_path: Path
) -> None:
    row = json.loads(BATCH.read_text().split("\n")[0])
    row["responses"][1] = text
    (tmp_path / "batch.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ActiveDPOError, match=f"line 1: {message}"):
        export_picks(tmp_path / "batch.jsonl", "csv", tmp_path / "out.csv")


def test_batches_and_outputs_that_cannot_be(tmp_path: Path) -> None:
    labeled = tmp_path / "labeled.jsonl"
    row = json.loads(BATCH.read_text().split("\n")[0])
    labeled.write_text(json.dumps({**row, "label": 1}) + "\n")
    with pytest.raises(ActiveDPOError, match="line 1: is labeled already"):
        export_picks(labeled, "csv", tmp_path / "out.csv")
    labeled.write_text("")
    with pytest.raises(ActiveDPOError, match="has no picks"):
        export_picks(labeled, "csv", tmp_path / "out.csv")
    with pytest.raises(ActiveDPOError, match=r"the output of csv is one \.csv file"):
        export_picks(BATCH, "csv", tmp_path / "out")
    with pytest.raises(ActiveDPOError, match="no tool 'excel': choose one of label-studio"):
        export_picks(BATCH, "excel", tmp_path / "out")
    with pytest.raises(ActiveDPOError, match="not a folder to write to"):
        export_picks(BATCH, "potato", labeled)
    answers = _answered(tmp_path)
    with pytest.raises(ActiveDPOError, match="is also the file of labels"):
        _import(answers, set_aside=tmp_path / "labels.jsonl")
    unanswered = tmp_path / "unanswered.jsonl"
    export_picks(BATCH, "jsonl", unanswered)
    with pytest.raises(ActiveDPOError, match="no answer to any of the 4 pairs"):
        _import(unanswered)


def test_a_seed_decides_the_sides_of_each_pick_alone(tmp_path: Path) -> None:
    def ids(seed: int | None, batch: Path = BATCH) -> set[str]:
        path = tmp_path / "rows.jsonl"
        path.unlink(missing_ok=True)
        export_picks(batch, "jsonl", path, seed=seed)
        return {json.loads(line)["id"] for line in path.read_text().splitlines()}

    part = tmp_path / "part.jsonl"
    part.write_text("".join(BATCH.read_text().split("\n")[2] + "\n"))
    assert ids(0) == ids(0)
    assert len({frozenset(ids(seed)) for seed in range(8)}) > 2
    assert all(record_id.endswith("-01") for record_id in ids(None))
    assert ids(0, part) < ids(0)


def test_nothing_that_is_read_is_written_to(tmp_path: Path) -> None:
    batch = tmp_path / "labels-ann.jsonl"
    batch.write_bytes(BATCH.read_bytes())
    link = tmp_path / "link.jsonl"
    link.symlink_to(batch)
    answers = _answered(tmp_path, lambda rows: [{**r, "labeler": n} for r in rows for n in "ab"])
    named_ann = answers.read_text().replace('"labeler": "a"', '"labeler": "ann"')
    answers.write_text(named_ann)
    before = batch.read_bytes()
    free = tmp_path / "free.jsonl"
    for attempt in (
        lambda: export_picks(batch, "jsonl", batch),
        lambda: export_picks(batch, "jsonl", link),
        lambda: import_answers(batch, answers, "jsonl", batch),
        lambda: import_answers(batch, answers, "jsonl", answers),
        lambda: import_answers(batch, answers, "jsonl", free, set_aside=answers),
        lambda: import_answers(batch, answers, "jsonl", free, set_aside=link),
        lambda: import_answers(batch, answers, "jsonl", tmp_path / "labels.jsonl"),  # -ann
    ):
        with pytest.raises(ActiveDPOError, match="is read, and would be replaced: choose another"):
            attempt()
        assert (batch.read_bytes(), answers.read_text()) == (before, named_ann)
    picks = tmp_path / "project" / "picks.jsonl"  # what Potato's export calls a file of its own
    picks.parent.mkdir()
    picks.write_bytes(before)
    with pytest.raises(ActiveDPOError, match="is read, and would be replaced"):
        export_picks(picks, "potato", picks.parent)
    assert picks.read_bytes() == before
    assert [file.name for file in picks.parent.iterdir()] == ["picks.jsonl"]
