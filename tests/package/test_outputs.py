"""What a command may write to: regular files that it does not read, outside stores and runs."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from activedpo_fast._files import (
    atomic_path,
    check_file_target,
    is_temporary,
    read_checked_json,
    temporary_name,
    write_atomic,
    write_checked_json,
)
from activedpo_fast.cli.outputs import check_output
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.selection.picks_jsonl import Pick
from activedpo_fast.selection.result import Selection


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for path, why in (
        (Path("/dev/null"), "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "nowhere", "is a link to .*gone, which does not exist"),
        (tmp_path, "is a folder"),
    ):
        for write in (check_file_target, lambda path: write_atomic(path, "x")):
            with pytest.raises(ActiveDPOError, match=why):
                write(path)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "nowhere"}


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    write_atomic(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_names_and_permissions(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "a.jsonl") as first, atomic_path(tmp_path / "a.jsonl") as other:
            assert first.name != other.name and first.suffix == ".jsonl"
            assert is_temporary(first.name, "a") and not is_temporary(first.name, "b")
            assert stat.S_IMODE(first.stat().st_mode) == 0o666 & ~umask
        assert stat.S_IMODE((tmp_path / "a.jsonl").stat().st_mode) == 0o666 & ~umask
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    assert len(temporary_name(Path("x" * 250 + ".jsonl"))) < 255
    write_atomic(tmp_path / ("é" * 120 + ".jsonl"), "x")


def test_what_killed_writers_left_is_removed_by_the_next(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / temporary_name(Path(f"{name}.jsonl"))).write_text("left")
    with atomic_path(tmp_path / "a.jsonl") as one:
        one.write_text("one")
        write_atomic(tmp_path / "a.jsonl", "two")  # does not remove what is being written
    assert (tmp_path / "a.jsonl").read_text() == "one"
    left = {path.name for path in tmp_path.iterdir()} - {"a.jsonl"}
    assert len(left) == 1 and is_temporary(left.pop(), "b")


def test_a_changed_json_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_checked_json(path, {"a": [1, 2.5, None], "b": "é"})
    assert read_checked_json(path) == {"a": [1, 2.5, None], "b": "é"}
    whole = path.read_bytes()
    for n in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[n] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                assert read_checked_json(path) == {"a": [1, 2.5, None], "b": "é"}  # white space
            except ActiveDPOError as error:
                assert str(path) in str(error)


def test_inputs_stores_and_runs_are_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("x")
    (tmp_path / "hard.jsonl").hardlink_to(tmp_path / "in.jsonl")
    (tmp_path / "soft.jsonl").symlink_to(tmp_path / "in.jsonl")
    for name in ("in", "hard", "soft"):
        with pytest.raises(ActiveDPOError, match="is what --labeled names: choose another --out"):
            check_output("--out", tmp_path / f"{name}.jsonl", {"--labeled": tmp_path / "in.jsonl"})
    with pytest.raises(ActiveDPOError, match="is inside what STORE names"):
        check_output("--out", tmp_path / "new", {"STORE": tmp_path})
    check_output("--out", tmp_path / "new", {"--labeled": tmp_path / "in.jsonl", "--x": None})
    for file, content, what in (
        ("manifest.json", {"format": 1, "pool": "", "responses": 1}, "a feature store"),
        ("config.json", {"format": 1, "settings": {}, "versions": {}}, "the folder of a run"),
    ):
        folder = tmp_path / what.split()[-1]
        folder.mkdir()
        check_output("--out", folder / "sub" / "x", {})
        (folder / file).write_text(json.dumps(content))
        with pytest.raises(ActiveDPOError, match=f"is inside {what}, {folder}"):
            check_output("--out", folder / "sub" / "x", {})


def test_labels_are_kept_when_their_file_is_replaced(tmp_path: Path) -> None:
    picks = Selection((Pick("a", (0, 1), 1.0, 0, "p", ("x", "y")),), "random")
    path = tmp_path / "picked.jsonl"
    picks.to_jsonl(path)
    path.write_text(path.read_text().replace("}", ', "label": null}'))
    picks.to_jsonl(path)
    assert [found.name for found in tmp_path.iterdir()] == ["picked.jsonl"]  # nothing to keep
    for n, label in enumerate(("0", '"skip"'), start=1):
        path.write_text(path.read_text().replace("}", f', "label": {label}}}'))
        labeled = path.read_bytes()
        picks.to_jsonl(path)
        assert (tmp_path / f"picked.jsonl.labels-{n}").read_bytes() == labeled
    assert "label" not in path.read_text()
