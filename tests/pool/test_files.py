"""The files that pools and prompts are read from, and one-line errors for those that cannot be
read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.reading import read_prompts

USER = [{"role": "user", "content": "Hi", "name": "Ann"}]
ROWS = [{"id": n, "prompt": f"p{n}", "responses": ["a", "b"], "n": n} for n in range(4)]
CHAT = [
    {"prompt": prompt, "responses": [[{"role": "assistant", "content": t}] for t in "ab"]}
    for prompt in ([{"role": "user", "content": "Hi"}], USER)
]
READERS = [PreferencePool.load, read_prompts]


def made_for(reader: Callable[..., Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prompts have no responses yet."""
    return (
        rows
        if reader is not read_prompts
        else [{name: value for name, value in row.items() if name != "responses"} for row in rows]
    )


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix.lower() == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def refused(path: Path, message: str, readers: list[Callable[..., Any]] = READERS) -> None:
    for reader in readers:
        with pytest.raises(ActiveDPOError, match=message) as caught:
            reader(path)
        assert "\n" not in str(caught.value)


def ids(read: Any) -> list[str]:
    return [one.id for one in read]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".JSONL", ".PARQUET", ".Parquet"])
def test_files(reader: Callable[..., Any], suffix: str, tmp_path: Path) -> None:
    rows, chat = (made_for(reader, given) for given in (ROWS, CHAT))
    read = reader(write(tmp_path / f"x{suffix}", rows))
    assert ids(read) == ["0", "1", "2", "3"] and [one.extra["n"] for one in read] == [0, 1, 2, 3]
    # Parquet gives all messages the same keys: the name of one is null in the other.
    read = reader(write(tmp_path / f"chat{suffix}", chat))
    assert [one.prompt for one in read] == [row["prompt"] for row in CHAT]


def test_ids_do_not_depend_on_the_kind_of_file(tmp_path: Path) -> None:
    for rows in (CHAT, [{**row, "id": None} for row in ROWS]):
        for reader in READERS:
            first, second = (
                ids(reader(write(tmp_path / name, made_for(reader, rows))))
                for name in ("x.jsonl", "x.parquet")
            )
            assert first == second


@pytest.mark.parametrize("reader", READERS)
def test_folders_of_shards(reader: Callable[..., Any], tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO", logger="activedpo_fast")
    rows = made_for(reader, ROWS)
    for suffix in (".jsonl", ".parquet"):
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        (folder / "README.md").write_text("which rows these are")
        (folder / "_SUCCESS").write_text("")
        for n in range(2):
            write(folder / f"train-0000{n}-of-00002{suffix}", rows[2 * n : 2 * n + 2])
        assert ids(reader(folder)) == ["0", "1", "2", "3"]
        assert (
            f"{folder}: 2 files, from train-00000-of-00002{suffix} to train-00001-of-00002{suffix}"
        ) in caplog.text
    write(tmp_path / "jsonl" / "train-00001-of-00002.jsonl", [*rows[2:], {"id": 1}])
    refused(tmp_path / "jsonl", "train-00001-of-00002.jsonl, line 3: .*no ", [reader])


@pytest.mark.parametrize("reader", READERS)
def test_saved_data_sets(reader: Callable[..., Any], tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(made_for(reader, ROWS))
    dataset.select([3, 1]).save_to_disk(str(tmp_path / "saved"))
    assert ids(reader(tmp_path / "saved")) == ["3", "1"]
    datasets.Dataset.from_list(made_for(reader, CHAT)).save_to_disk(str(tmp_path / "chat"))
    assert [one.prompt for one in reader(tmp_path / "chat")] == [row["prompt"] for row in CHAT]


def test_folders_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    splits = datasets.DatasetDict(train=dataset, test=dataset)
    splits.save_to_disk(str(tmp_path / "splits"))
    refused(
        tmp_path / "splits",
        "splits: a saved data set with the splits 'test', 'train': give "
        "the folder of one of them, for instance .*splits/test$",
    )
    assert ids(PreferencePool.load(tmp_path / "splits" / "train")) == ["0", "1", "2", "3"]
    dataset.save_to_disk(str(tmp_path / "broken"))
    next((tmp_path / "broken").glob("*.arrow")).unlink()
    refused(tmp_path / "broken", "broken: a saved data set that cannot be read: ")
    bad = datasets.Dataset.from_list([*ROWS, {**ROWS[0], "id": 4, "prompt": " "}])
    bad.save_to_disk(str(tmp_path / "bad"))
    refused(tmp_path / "bad", "bad.* row 5: the prompt is empty", [PreferencePool.load])
    datasets.Dataset.from_list([{"prompt": "x"}, {"prompt": " "}]).save_to_disk(
        str(tmp_path / "bad prompts")
    )
    refused(tmp_path / "bad prompts", "bad prompts.* row 2: the prompt is empty", [read_prompts])

    def folder(name: str, *files: str) -> Path:
        (tmp_path / name).mkdir()
        for n, file in enumerate(files):
            write(tmp_path / name / file, ROWS[n : n + 1])
        return tmp_path / name

    refused(folder("empty"), "empty: a folder without .jsonl or .parquet files")
    refused(folder("both", "a.jsonl", "b.parquet"), "both: has .jsonl and .parquet files")
    refused(
        folder("two", "train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        "two: has files of the splits 'test', 'train': give one file",
    )
    refused(folder("part", "train-00000-of-00002.jsonl"), "part: has 1 of the 2 files of 'train'")
    (folder("store", "pool.jsonl") / "manifest.json").write_text("{}")
    refused(tmp_path / "store", "store: a feature store; its pool is .*store/pool.jsonl")
    (tmp_path / "x.json").write_text("[]")
    refused(tmp_path / "x.json", "unsupported suffix '.json', expected .jsonl or .parquet, a fol")
    refused(tmp_path / "none", "none: no such file or folder")
    for name in ("none.parquet", "none.PARQUET", "none.jsonl"):
        refused(tmp_path / name, "no such file")
    (tmp_path / "text.PARQUET").write_text("no")
    refused(tmp_path / "text.PARQUET", "text.PARQUET: not a Parquet file")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "x"}, {"prompt": "y"}, {"prompt": "x"}],
            "x.jsonl, line 3: the same prompt as .*x.jsonl, line 1: remove one of them$",
        ),
        ([{"id": 1, "prompt": "x"}, {"id": "1", "prompt": "x"}], "line 2: the same prompt as"),
        (
            [{"id": 1, "prompt": "x"}, {"id": "1", "prompt": "y"}],
            "line 2: id '1' is already that of .*, line 1, another prompt: "
            "prompts need ids of their own",
        ),
        (
            [{"id": True, "prompt": "x"}],
            "line 1: 'id' must be a string or an integer, got bool True",
        ),
        (
            [{"id": 0.5, "prompt": "x"}],
            "line 1: 'id' must be a string or an integer, got float 0.5",
        ),
        ([{"prompt": "x"}, {"prompt": USER}], "line 2: chat messages, but .*line 1 has plain text"),
        ([{"text": "x"}], "line 1: no 'prompt'$"),
        ([{"prompt": float("nan")}], "line 1: no 'prompt'$"),
        (["x"], "line 1: expected an object with named columns, got str 'x'"),
        (
            [{name: f"\n\nHuman: Hi\n\nAssistant: {name}" for name in ("chosen", "rejected")}],
            "line 1: no 'prompt': the texts are whole transcripts; split each after its last",
        ),
        ([], "x.jsonl: no rows$"),
    ],
)
def test_bad_prompts_are_named(rows: list[Any], message: str, tmp_path: Path) -> None:
    refused(write(tmp_path / "x.jsonl", rows), message, [read_prompts])


def test_one_prompt_may_have_several_ids(tmp_path: Path) -> None:
    rows = [{"id": n, "prompt": "x"} for n in range(2)]
    assert ids(read_prompts(write(tmp_path / "x.jsonl", rows))) == ["0", "1"]
