"""Disks that are full or read-only, signals at every stage, and files that are gone or moved.

One clear line, nothing lost, and the same command goes on to the same bytes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from activedpo_fast._files import read_checked_json, read_json, write_json
from activedpo_fast.cli.app import main
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.training.run_folder import save_adapter
from tests.support.faults import STAGES, as_nobody, at, largest_file
from tests.support.killing import (
    content,
    disk_full,
    features,
    project,
    reward_model,
    run,
    run_file,
    select,
    send,
)
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    project(folder)
    reward_model(folder / "reward")
    return folder


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, picks and a run, all complete. Tests must not change it."""
    folder = tmp_path_factory.mktemp("whole")
    # In this process: what it imports, the processes of the tests need not import again.
    for command in (features(files, folder), select(folder), run_file(files, folder)):
        assert main(command) == 0
    return folder


def _one_line(code: int, said: str, *parts: str, expected: int = 2) -> None:
    assert code == expected and said.startswith("activedpo: ") and said.count("\n") == 1, said
    for part in parts:
        assert part in said


# -- stages of a run -------------------------------------------------------------------------------


def _breaks(
    files: Path, whole: Path, output: Path, stages: list[tuple[str, Callable[[], None], int, str]]
) -> None:
    """Break a run off at one stage after the other, let it end, and compare.

    Args:
        stages: the stage, what happens in its middle, the exit code, and what is said then.
    """
    expected = {name: data for name, data in content(whole).items() if name.startswith("run/")}
    for stage, act, code, says in stages:
        found, _, said = run([run_file(files, output)], around=at(stage, act))
        _one_line(found, said, says, expected=code)
        assert not content(output).keys() - expected.keys(), stage  # no leftovers
    found, _, said = run([run_file(files, output)])
    assert (found, said) == (0, "")
    assert content(output) == expected


_INT = (send(signal.SIGINT), 130, "activedpo: interrupted\n")
_TERM = (send(signal.SIGTERM), 143, "activedpo: terminated\n")
_FULL = (disk_full, 2, " cannot be written: ")


def test_a_run_that_is_interrupted_and_terminated(files: Path, whole: Path, tmp_path: Path) -> None:
    _breaks(files, whole, tmp_path, [("generate", *_INT), ("train", *_TERM), ("evaluate", *_INT)])


def test_a_run_on_a_full_disk(files: Path, whole: Path, tmp_path: Path) -> None:
    _breaks(files, whole, tmp_path, [("label", *_FULL), ("save", *_FULL)])


@pytest.mark.slow
@pytest.mark.parametrize("what", [_INT, _TERM, _FULL], ids=["SIGINT", "SIGTERM", "full disk"])
def test_a_run_that_is_broken_off_at_every_stage(
    files: Path, whole: Path, tmp_path: Path, what: tuple[Callable[[], None], int, str]
) -> None:
    _breaks(files, whole, tmp_path, [(stage, *what) for stage in STAGES])


def test_no_room_for_temporary_files(files: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    tempfile.tempdir = None  # what an earlier test has found
    code, _, said = run([run_file(files, tmp_path)], largest=0)
    _one_line(code, said, "a folder for temporary files: no usable", "set TMPDIR")
    assert not content(tmp_path)


def test_an_adapter_that_cannot_be_written(tmp_path: Path) -> None:
    model, tokenizer = lora(tiny_causal_lm("llama"), "llama"), tiny_tokenizer()
    sizes = [len(data) for data in content(_saved(model, tokenizer, tmp_path / "whole")).values()]
    for size in sorted({0, *(size - 1 for size in sizes)}):  # each file in turn does not fit
        with largest_file(size):
            with pytest.raises(ActiveDPOError, match="cannot be written: .*ile too large"):
                save_adapter(model, tokenizer, tmp_path / "a" / "adapter")
        assert not content(tmp_path / "a")
    with pytest.raises(ActiveDPOError, match="its path is not UTF-8"):
        save_adapter(model, tokenizer, tmp_path / os.fsdecode(b"\xff") / "adapter")
    # Their order does not depend on the file system.
    names = list(read_checked_json(tmp_path / "whole" / "checksums.json"))
    assert names == sorted(names)


def _saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    save_adapter(model, tokenizer, folder / "adapter")
    return folder


@pytest.mark.slow
def test_a_system_without_a_home_and_an_encoding(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole / "run", tmp_path / "rün 1"))
    system = {"LC_ALL": "C", "HOME": "/dev/null/x", "TMPDIR": "/dev/null/x"}
    for command in (["report", str(folder)], ["store", "verify", str(whole / "store")]):
        done = subprocess.run(
            [sys.executable, "-m", "activedpo_fast", *command],
            env={**os.environ, **system, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
        )
        assert (done.returncode, done.stderr) == (0, b"")
    assert (folder / "report.html").exists()


# -- disks -----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """What mounts a disk of so many KiB, or makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        how = "remount," if folder.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{how}size={size}k", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a file system can be mounted by the superuser only")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("size", [4, 12])
def test_a_store_on_a_small_disk(
    files: Path, whole: Path, small_disk: Callable[[int], Path], size: int
) -> None:
    output = small_disk(size)
    code, _, said = run([features(files, output), select(output)])
    _one_line(code, said, str(output), " cannot be written: no space left on device")
    small_disk(10_000)
    code, _, said = run([features(files, output), select(output)])
    assert (code, said) == (0, "")
    expected = {name: data for name, data in content(whole).items() if name[:4] != "run/"}
    assert content(output) == expected


@pytest.mark.slow
@pytest.mark.parametrize("size", [24, 40, 56, 72, 88, 120, 160, 200])
def test_a_run_on_a_small_disk(
    files: Path, whole: Path, small_disk: Callable[[int], Path], size: int
) -> None:
    output = small_disk(size)
    code, _, said = run([run_file(files, output)])
    _one_line(code, said, str(output), " cannot be written: ", "o space left on device")
    small_disk(10_000)
    _breaks(files, whole, output, [])


def test_folders_that_are_read_only(files: Path, whole: Path) -> None:
    with tempfile.TemporaryDirectory() as parent:  # which everybody may enter
        Path(parent).chmod(0o755)
        here = Path(shutil.copytree(whole, Path(parent) / "here"))
        project = Path(shutil.copytree(files, Path(parent) / "project"))
        there = Path(parent) / "there"
        there.mkdir()
        there.chmod(0o777)
        (there / "run.yaml").write_text((here / "run.yaml").read_text())
        for path in (*here.rglob("*"), here):
            path.chmod(0o555 if path.is_dir() else 0o444)
        # What these import, nobody may not be able to read.
        import_module("activedpo_fast.cli.label")
        assert main(["report", str(whole / "run"), f"--output={there / 'x.html'}", "-q"]) == 0
        before = content(here)
        store, picks = str(here / "store"), str(here / "picked.jsonl")
        (here / "run.yaml").chmod(0o644)
        run_again = run_file(project, here)
        (here / "run.yaml").chmod(0o444)
        for command in (
            features(project, here),
            select(here),
            run_again,
            ["label", picks],
            ["exchange", "export", picks, "--tool=csv", f"--output={here / 'x.csv'}"],
            ["store", "gc", store],
            ["store", "export", store, f"{here / 'x.safetensors'}"],
            ["report", str(here / "run")],
        ):
            code, _, said = run([command], around=as_nobody())
            _one_line(code, said, str(here))
        for command in (
            [*select(here)[:-1], f"--output={there / 'picked.jsonl'}", "--quiet"],
            ["exchange", "export", picks, "--tool=csv", f"--output={there / 'x.csv'}"],
            ["store", "verify", store],
            ["store", "info", store],
            ["store", "export", store, f"{there / 'x.safetensors'}"],
            ["report", str(here / "run"), f"--output={there / 'report.html'}"],
        ):
            code, _, said = run([command], around=as_nobody())
            assert (code, said) == (0, ""), command
        assert content(here) == before
        assert (there / "picked.jsonl").read_bytes() == Path(picks).read_bytes()


# -- files that are gone, empty, newer or moved ----------------------------------------------------


@pytest.fixture
def made(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "made"))


def test_a_shard_that_is_gone(
    files: Path, made: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (made / "store" / "rows-00000.safetensors").unlink()
    assert main(select(made)) == 2
    _one_line(2, capsys.readouterr().err, f"{made / 'store'} is incomplete", "activedpo features")
    assert main(features(files, made)) == 0
    assert main(select(made)) == 0
    assert content(made) == content(whole)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("rows-00000.safetensors", "delete"),
        ("pool.jsonl", "delete it and run"),
        ("tokens.safetensors", "delete it and run"),
        ("manifest.json", "broken JSON"),
    ],
)
def test_a_store_with_an_empty_file(
    files: Path, made: Path, whole: Path, name: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made / "store" / name
    path.write_bytes(b"")
    assert main(["store", "verify", str(made / "store")]) == 2
    _one_line(2, capsys.readouterr().err, str(path), says)
    if name == "manifest.json":
        shutil.copy(whole / "store" / name, path)
    else:
        path.unlink()
    assert main(features(files, made)) == 0
    assert main(select(made)) == 0
    assert content(made) == content(whole)


@pytest.mark.parametrize("name", ["store/manifest.json", "run/config.json"])
def test_what_a_newer_version_made(
    files: Path, made: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(made / name, {**read_json(made / name), "format": 99})
    before = content(made)
    if name.startswith("store"):
        commands = [features(files, made), select(made), ["store", "info", str(made / "store")]]
    else:
        commands = [run_file(files, made)]
    for command in commands:
        assert main(command) == 2
        _one_line(2, capsys.readouterr().err, "a newer version", "99", "update activedpo-fast")
    assert content(made) == before


def test_what_was_moved(
    files: Path, made: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = made.with_name("moved")
    shutil.rmtree(made / "run" / "round-001")
    made.rename(moved)
    for command in (features(files, moved), select(moved), run_file(files, moved)):
        assert main(command) == 0
    assert content(moved) == content(whole)
    assert capsys.readouterr().err.count("\n") <= 1
