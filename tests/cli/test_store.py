"""`activedpo store`, and commands that meet another writer, a signal or a closed output."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from activedpo_fast._files import temporary_name
from activedpo_fast._locks import locked_folder
from activedpo_fast.cli.app import main
from activedpo_fast.cli.store_info import _MEANINGS
from activedpo_fast.store.store import FeatureStore
from tests.support.killing import content, project, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    project(folder)
    assert main(_features(folder, "store")) == 0
    return folder


def _features(folder: Path, name: str, *options: str) -> list[str]:
    return [
        "features",
        str(folder / "pool.jsonl"),
        f"--model={folder / 'model'}",
        f"--adapter={folder / 'adapter'}",
        f"--output={folder / name}",
        "--proj-dim=16",
        "--device=cpu",
        "--no-verify",
        "--max-tokens-per-batch=16",
        *options,
    ]


def test_info_verify_and_export(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(folder / "store")
    capsys.readouterr()
    assert main(["store", "info", store]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith(":")] == [
        "rows and files:",
        "made with:",
        "computed with:",
    ]
    shown = {line[2:23].strip(): line[25:].split(None, 1) for line in lines if line[0] == " "}
    assert shown["complete"] == ["yes", "`activedpo select` can read it"]
    assert shown["responses"] == ["12", "in the pool; each gets a gradient row"]
    assert shown["beta"][0] == "0.1" and shown["gguf_file"][0] == "none"
    assert all(len(what) == 2 for what in shown.values()), "each line says what it is"
    assert main(["store", "info", store, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["store", "verify", store]) == 0
    assert capsys.readouterr().out == f"all files of {store} are as written: 12 rows\n"
    assert main(["store", "export", store, str(folder / "rows.safetensors")]) == 0
    rows = load_file(folder / "rows.safetensors")["features"]
    assert torch.equal(rows, FeatureStore.open(store).load().gradients)
    capsys.readouterr()
    shard = f"{store}/rows-00000.safetensors"
    assert main(["store", "export", store, shard]) == 2
    assert f"{shard} is inside a feature store" in capsys.readouterr().err
    assert main(_features(folder, "store", f"--export={shard}")) == 2
    assert f"{shard} is inside what --output names" in capsys.readouterr().err
    assert main(["store", "verify", store]) == 0


def test_info_explains_settings_that_most_stores_do_not_have() -> None:
    optional = [
        "gradient",
        "last_layers",
        "length_normalized",
        "chat_template_kwargs",
    ]  # written if not default
    assert [name for name in optional if not _MEANINGS.get(name)] == []


def test_info_and_gc_of_a_killed_store(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = folder / "killed"
    code, _, _ = run([_features(folder, "killed")], when=60)
    assert code == -signal.SIGKILL
    left = store / temporary_name(store / "pool.jsonl")
    left.write_text("x")
    (store / "notes").write_text("mine")
    before = content(store)
    capsys.readouterr()
    assert main(["store", "info", str(store)]) == 0
    said = capsys.readouterr().out
    assert "  complete               no " in said and "  missing rows           0 " not in said
    assert "  files being filled     1 " in said and "  files left behind      1 " in said
    assert main(["store", "gc", str(store), "--dry-run"]) == 0
    assert "1 files of killed processes would be removed" in capsys.readouterr().out
    assert left.exists()
    assert main(["store", "gc", str(store)]) == 0
    assert str(left) in capsys.readouterr().out
    after = {name for name in before if name not in (".lock", left.name)}
    assert set(content(store)) == after and "rows-00000.partial" in after
    assert main(["store", "verify", str(store)]) == 2
    assert "is incomplete" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["store", "new"])
def test_two_writers(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with locked_folder(folder / name):
        code, counts, said = run([_features(folder, name)])
    assert code == 2 and counts["passes"] == 0
    assert f"is being written to by process {os.getpid()} on" in said
    assert "Traceback" not in said and len(said.splitlines()) == 1


def test_select_writes_to_no_device(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "dangling").symlink_to(folder / "gone")
    for output in ("/dev/null", str(folder / "pipe"), str(folder / "dangling")):
        capsys.readouterr()
        assert main(["select", str(folder / "store"), "--output", output]) == 2
        assert capsys.readouterr().err.startswith(f"activedpo: error: {output} is a ")
    name = str(folder / ("x" * 300))
    assert main(["select", str(folder / "store"), "--pairs=2", "--output", name]) == 2
    assert "name too long" in capsys.readouterr().err


def test_an_output_that_nobody_reads_any_more(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    os.close(read)
    capsys.readouterr()
    with open(write, "w") as nobody, contextlib.redirect_stdout(nobody):
        assert main(["store", "info", str(folder / "store")]) == 1
    assert capsys.readouterr().err == ""


def test_manifests_that_are_no_manifests(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("", "[]", "{", '{"format": 5}', '{"format": "5"}', json.dumps({"format": 9})):
        (tmp_path / "manifest.json").write_text(text)
        for argv in (
            ["store", "info", str(tmp_path)],
            ["select", str(tmp_path), "--output", str(tmp_path.parent / "out.jsonl")],
        ):
            capsys.readouterr()
            assert main(argv) == 2
            said = capsys.readouterr().err
            assert str(tmp_path) in said and len(said.splitlines()) == 1


def test_rows_and_numbers_that_say_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = f"--output={folder / 'none.jsonl'}"
    assert main(_features(folder, "zeros", "--beta=1e-300")) == 0
    capsys.readouterr()
    assert main(["store", "verify", str(folder / "zeros")]) == 0
    assert "12 rows, 12 of them all zeros" in capsys.readouterr().out
    select = ["select", "--pairs=2", output]
    assert main([*select, str(folder / "zeros")]) == 2
    assert "all scores are 0" in capsys.readouterr().err
    for options in (["--lam=1e300"], ["--lam=1e-300"], ["--lam=1e90", "--kappa=1e-90"]):
        assert main([*select, str(folder / "store"), *options]) == 2
        assert "lam / kappa is" in capsys.readouterr().err
    for beta in ("inf", "nan"):
        assert main(_features(folder, "beta", f"--beta={beta}")) == 2
        assert f"--beta: {beta} is not positive and finite" in capsys.readouterr().err
    assert not (folder / "none.jsonl").exists() and not (folder / "beta").exists()
