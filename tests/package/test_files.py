"""Whether a file or folder can be written is known before anything is computed for it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from activedpo_fast._files import (
    check_file_target,
    check_folder_target,
    check_readable,
    read_checked_json,
    write_atomic,
    write_checked_json,
)
from activedpo_fast.cli.app import main
from activedpo_fast.errors import ActiveDPOError


@pytest.fixture
def as_anybody() -> Iterator[Path]:
    """A folder of this process, which has only the rights of its owner while the test runs.

    Permissions do not apply to an administrator, as whom tests in containers run.
    """
    folder = Path(tempfile.mkdtemp())
    if os.geteuid() != 0:
        yield folder
        shutil.rmtree(folder)
        return
    main(["run", str(folder / "nothing")])  # imports modules that it could not read later
    os.chown(folder, 65534, 65534)
    os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(0)
        shutil.rmtree(folder)


def test_writable_paths_pass(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (None, tmp_path / "file", tmp_path / "new", tmp_path / "a" / "b" / "new"):
        check_file_target(path)
    for folder in (tmp_path, tmp_path / "new", tmp_path / "a" / "b" / "new"):
        check_folder_target(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_obstacles_are_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ActiveDPOError, match=f"{tmp_path} is a folder, not a file"):
        check_file_target(tmp_path)
    with pytest.raises(ActiveDPOError, match=f"{file} is a file, not a folder"):
        check_folder_target(file)
    for check in (check_file_target, check_folder_target):
        with pytest.raises(ActiveDPOError, match=f"{file}/a/b cannot be written: {file} is not"):
            check(file / "a" / "b")


def test_permissions(as_anybody: Path, capsys: pytest.CaptureFixture[str]) -> None:
    closed = as_anybody / "closed"
    closed.mkdir(mode=0o500)
    check_folder_target(as_anybody / "open")
    for path in (closed / "x", closed / "x" / "y"):
        for check in (check_file_target, check_folder_target):
            with pytest.raises(ActiveDPOError, match=f"{path} cannot be written: {closed} is not"):
                check(path)
    with pytest.raises(ActiveDPOError, match=f"{closed} cannot be written"):
        check_folder_target(closed)
    secret = as_anybody / "secret.json"
    secret.write_text("{}")
    check_readable([secret, as_anybody / "missing"])
    secret.chmod(0)
    with pytest.raises(ActiveDPOError, match=f"{secret}: permission denied"):
        check_readable([secret])
    with pytest.raises(PermissionError):
        write_atomic(closed / "x", "content")
    # An obstacle that is found late is also one line on the command line.
    capsys.readouterr()
    assert main(["run", str(secret)]) == 2
    assert capsys.readouterr().err == f"activedpo: error: {secret}: permission denied\n"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("x" * 256, "file name too long"),
        ("missing/" + "ä" * 128, "file name too long"),  # 256 bytes
        ("/".join(["x" * 200] * 30), "file name too long"),
        ("a\0b", "null"),
        ("\ud800", "surrogates not allowed"),
    ],
)
def test_names_that_no_file_can_have(tmp_path: Path, name: str, why: str) -> None:
    for check in (check_file_target, check_folder_target):
        with pytest.raises(ActiveDPOError, match=f"cannot be written: .*{why}"):
            check(tmp_path / name)
        check(tmp_path / "missing" / ("x" * 255))


def test_paths_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    value = {"folder": os.fsdecode(b"/\xff/\xc3\xa4")}
    write_checked_json(path, value)
    assert read_checked_json(path) == value
    assert r"/\udcff/ä" in path.read_text()
