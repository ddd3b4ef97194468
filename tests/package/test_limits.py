"""No file fills the memory, stops the program for ever, or writes to the terminal what it likes."""

from __future__ import annotations

import json
import os
import re
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from activedpo_fast import PoolItem, PreferencePool, raised_limits, read_labels
from activedpo_fast._files import parse_json, read_json
from activedpo_fast._printable import one_line, printable
from activedpo_fast.cli.app import main
from activedpo_fast.cli.run_file import load_config
from activedpo_fast.cli.yaml_file import read_yaml
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.settings import LoopConfig

ROW = {"id": "a", "prompt": "p", "responses": ["x", "y"]}


@contextmanager
def _memory(mib: int) -> Iterator[None]:
    """Refuse more than so much memory of Python at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < mib * 2**20
    finally:
        tracemalloc.stop()


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# -- YAML ------------------------------------------------------------------------------------------


def _bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for n in range(1, 12):
        lines.append(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_bomb(), r"\d+ values, the limit is 10000"),
        ("dpo: " + "[" * 2000 + "]" * 2000, "line 1: 51 levels, the limit is 50"),
        ("a: " + "x" * 2**20, "1024.0 KiB, the limit is 1024"),
        ("a: &a [*a]", "an alias of a value that it is in"),
        ("seed: 1\nmodel: m\nseed: 2", "line 3: broken YAML: the key 'seed' is given twice"),
        ("dpo:\n  beta: 1\n  'beta': 2", "line 3: broken YAML: the key 'beta' is given twice"),
        ("a: 0b_", "line 1: broken YAML: '0b_' is not read"),
        ("a: 0x_", "'0x_' is not read"),
        ("a: " + "9" * 5000, "is not read"),
        ("a: !!timestamp 2024-99-99", "timestamp are not read"),
        ("a: !!binary aGk=", "binary are not read"),
        ("a: !!python/object:os.system x", "are not read"),
        ("a: !!set {x}", "set are not read"),
        ("? [a]\n: b", "cannot be a key"),
        ("a: [", "broken YAML"),
        ("a: \x07", "broken YAML"),
    ],
)
def test_yaml_that_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = _written(tmp_path / "run.yaml", text)
    with _memory(32), pytest.raises(ActiveDPOError, match=message) as error:
        load_config(path)
    assert str(path) in str(error.value) and len(one_line(str(error.value))) < 3000


def test_yaml_that_is_read(tmp_path: Path) -> None:
    text = "a: &x {lr: 1e-4, day: 2024-02-30, n: 1_000}\nb: {<<: *x, n: 2}\nc: [yes, ~, 'yes']"
    assert read_yaml(_written(tmp_path / "f", text)) == {
        "a": {"lr": 1e-4, "day": "2024-02-30", "n": 1000},
        "b": {"lr": 1e-4, "day": "2024-02-30", "n": 2},
        "c": [True, None, "yes"],
    }
    assert read_yaml(_written(tmp_path / "f", "")) is None


# -- JSON and Parquet ------------------------------------------------------------------------------


def test_a_long_line(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    with open(path, "wb") as file:
        file.write(json.dumps(ROW).encode() + b'\n{"prompt": "')
        file.truncate(200 * 2**20)  # a sparse file, of null characters
    with _memory(150), pytest.raises(ActiveDPOError, match=r"line 2: 64.0 MiB .* --limit json_mib"):
        PreferencePool.load(path)
    with raised_limits(json_mib=500), pytest.raises(ActiveDPOError, match="line 2: broken JSON"):
        PreferencePool.load(path)
    with raised_limits(file_mib=1), pytest.raises(ActiveDPOError, match="200.0 MiB, the limit is"):
        read_labels(path)


@pytest.mark.parametrize("depth", [101, 100_000])
def test_deep_json(tmp_path: Path, depth: int) -> None:
    deep = '{"a":' * depth + "1" + "}" * depth
    path = _written(tmp_path / "pool.jsonl", json.dumps(ROW)[:-1] + f', "extra": {deep}}}\n')
    for read in (PreferencePool.load, read_labels, read_json):
        with pytest.raises(ActiveDPOError, match="pool.jsonl.*(broken JSON|in each other)"):
            read(path)
    assert parse_json("[" * 100 + "]" * 100, "here")
    assert parse_json("[" + "[]," * 1000 + "[]]", "here")  # many, but not in each other


def test_a_parquet_file_that_expands(tmp_path: Path) -> None:
    path = tmp_path / "pool.parquet"
    texts = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 20_000, pyarrow.int32()), pyarrow.array(["x" * 2**14])
    )
    pyarrow.parquet.write_table(pyarrow.table({"prompt": texts}), path, compression="zstd")
    assert path.stat().st_size < 3_000  # of 320 MiB
    with raised_limits(file_mib=16), pytest.raises(ActiveDPOError, match=r"MiB or more in memory"):
        PreferencePool.load(path)


def test_a_parquet_file_that_says_how_large_it_is(tmp_path: Path) -> None:
    path = tmp_path / "pool.parquet"
    table = pyarrow.table({"prompt": ["x" * 2**22 + str(n) for n in range(8)]})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 100_000
    with raised_limits(file_mib=16), pytest.raises(ActiveDPOError, match=r"MiB in memory"):
        PreferencePool.load(path)


# -- texts and responses ---------------------------------------------------------------------------


def test_long_texts() -> None:
    long = "x" * 10_000_001
    for row in (ROW | {"prompt": long}, ROW | {"responses": ["a", long]}, ROW | {"id": long}):
        with pytest.raises(ActiveDPOError, match="row 1, .* 10000001 characters, the limit is"):
            PreferencePool.from_rows([row])
    with raised_limits(text_chars=10_000_001):
        PreferencePool.from_rows([ROW | {"prompt": long}])


def test_many_responses() -> None:
    item = PoolItem("a", "p", tuple(f"r{n}" for n in range(20_000)))
    with pytest.raises(ActiveDPOError, match="20000 responses to one prompt, the limit is 1000"):
        PreferencePool([item])
    with raised_limits(responses=20_000):
        assert len(PreferencePool([item])) == 1
    with pytest.raises(ActiveDPOError, match="num_generations: 2147483648 responses"):
        LoopConfig(output_dir="run", num_generations=2147483648)


# -- files that are none ---------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".yaml"])
def test_pipes_and_devices(tmp_path: Path, suffix: str) -> None:
    read = load_config if suffix == ".yaml" else PreferencePool.load
    pipe, device = tmp_path / f"pipe{suffix}", tmp_path / f"device{suffix}"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    for path in (pipe, device):
        with pytest.raises(ActiveDPOError, match="a pipe or the like, not a regular file"):
            read(path)


def test_ids_are_never_paths(tmp_path: Path) -> None:
    rows = [ROW | {"id": "../../x"}, ROW | {"id": "/tmp/\x1b[2J", "prompt": "q"}]
    path = _written(tmp_path / "pool.jsonl", "")
    PreferencePool.from_rows(rows).to_jsonl(path)
    assert [item.id for item in PreferencePool.load(path)] == [row["id"] for row in rows]
    assert [file.name for file in tmp_path.iterdir()] == ["pool.jsonl"]


# -- what is shown ---------------------------------------------------------------------------------


def test_printable() -> None:
    assert printable("für 日本 👍 a\tb\nc", keep="\n") == "für 日本 👍 a\\tb\nc"
    assert (
        printable("\x1b[2J\x9b\u202e\ud800\u2028\x7f") == "\\x1b[2J\\x9b\\u202e\\ud800\\u2028\\x7f"
    )
    assert len(one_line("x" * 10**7)) < 3000


def test_messages_of_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b]0;owned\x07\u202e"
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({f"modle{evil}": 1}))
    assert main(["run", str(path)]) == 2
    path.write_text(f"model: 1\n{json.dumps(evil)}: 1\n{json.dumps(evil)}: 2")
    assert main(["run", str(path)]) == 2
    assert main(["store", "info", str(tmp_path / f"store{evil}")]) == 2
    out, err = capfd.readouterr()
    assert len(err.splitlines()) == 3 and "\\x1b]0;owned" in err
    assert not any(character in out + err for character in evil.replace("]0;owned", ""))


def test_limits_of_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = _written(tmp_path / "run.yaml", "a: [1, 2, 3]")
    assert main(["--limit", "yaml_values=5", "run", str(path)]) == 2
    assert "6 values, the limit is 5; if it is meant, raise" in capfd.readouterr().err
    for given in ("x=1", "json_mib", "json_mib=0", "json_mib=-1", "json_mib=" + "9" * 30):
        assert main(["--limit", given, "run", str(path)]) == 2
        assert re.search("limit|below 1", capfd.readouterr().err)
    assert main(["run", str(path)]) == 2  # the limits are as they were
    assert "a: unknown key" in capfd.readouterr().err
