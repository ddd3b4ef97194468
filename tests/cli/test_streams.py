"""Outputs that are closed, full or of another encoding, and paths with any characters."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from activedpo_fast.cli.app import main
from activedpo_fast.cli.streams import mend_streams
from activedpo_fast.store.store import FeatureStore
from tests.support.killing import content, features, project, run, select

# A name that shells, Markdown, globs, YAML, HTML and terminals could take for something else.
_ODD = "-a  b\n'\"`$(x) [y]*?{z}%s&<b> ünï \x1b[31m"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    project(folder)
    for command in (features(folder, folder), select(folder)):
        assert main(command) == 0
    return folder


@contextlib.contextmanager
def _closed(*descriptors: int) -> Iterator[None]:
    """Close standard streams in a process of its own, as a shell does with `>&-`."""
    for descriptor in descriptors:
        os.close(descriptor)
    yield


def _in_a_child(check: object) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            check()  # type: ignore[operator]
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_closed_streams_are_no_place_for_files(folder: Path, tmp_path: Path) -> None:
    def check() -> None:
        for descriptor in range(3):
            os.close(descriptor)
        sys.stdin = sys.stdout = sys.stderr = None  # type: ignore[assignment]
        assert main(["store", "info", str(folder / "store")]) == 0
        assert main(["store", "info", str(tmp_path)]) == 2
        with open(tmp_path / "file", "w") as file:
            assert file.fileno() > 2
        os.write(1, b"of a library")
        os.write(2, b"of a library")
        assert (tmp_path / "file").read_bytes() == b""

    _in_a_child(check)


def test_a_store_made_without_any_stream(folder: Path, tmp_path: Path) -> None:
    code, _, said = run([features(folder, tmp_path)], around=_closed(0, 1))
    assert (code, said) == (0, "")
    expected = {name: data for name, data in content(folder).items() if name[:6] == "store/"}
    assert content(tmp_path) == expected


def test_a_full_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:
        with contextlib.redirect_stdout(full):
            assert main(["store", "info", str(folder / "store")]) == 2
    said = capsys.readouterr().err
    assert said == (
        "activedpo: error: the standard output cannot be written: no space left on device\n"
    )


def test_an_encoding_without_these_characters(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ä 日").symlink_to(folder / "store")
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    with contextlib.redirect_stdout(out):
        assert main(["store", "verify", str(tmp_path / "ä 日")]) == 0
        out.flush()
    assert b"\xe4 \\u65e5 are as written" in out.buffer.getvalue()
    assert main(["store", "verify", str(tmp_path / "ö")]) == 2
    assert "ö" in capsys.readouterr().err


def test_streams_that_work_are_left_alone() -> None:
    before = sys.stdin, sys.stdout, sys.stderr
    mend_streams()
    assert (sys.stdin, sys.stdout, sys.stderr) == before


@pytest.mark.parametrize("name", [_ODD, os.fsdecode(b"\xff\xfe"), "x" * 250])
def test_any_name(
    folder: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    here = Path(name)  # relative, so that a leading dash is the first character
    loud = [word for word in features(folder, here) if word != "--quiet"]
    assert main(loud) == 0
    assert capsys.readouterr().out.count("\n") == 1
    picks = str(here / "picked.jsonl")
    for command in (
        features(folder, here),
        ["select", *select(here)[2:], "--", str(here / "store")],
        ["store", "verify", "--", str(here / "store")],
        ["store", "export", "--", str(here / "store"), str(here / "rows.safetensors")],
        ["exchange", "export", f"--output={here / 'to_label.csv'}", "--tool=csv", "--", picks],
        ["exchange", "export", f"--output={here / 'to_label'}", "--tool=potato", "--", picks],
        ["exchange", "export", f"--output={here / 'ls'}", "--tool=label-studio", "--", picks],
    ):
        assert main(command) == 0, capsys.readouterr().err
    assert FeatureStore.open(here / "store").load().gradients.shape == (12, 16)
    assert (here / "picked.jsonl").read_bytes() == (folder / "picked.jsonl").read_bytes()
    capsys.readouterr()
    assert main(["label", "--report", "--", picks]) == 2
    assert capsys.readouterr().err.count("\n") == 1
