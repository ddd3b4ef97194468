"""The journal: on disk at once, shared by processes, and mended after a power failure."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.journal import Journal


def _entries(path: Path) -> list[dict]:
    with Journal(path).locked() as entries:
        return entries


def test_entries_are_read_back_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first, second = Journal(path), Journal(path)
    with first.locked() as new:
        assert new == []
        first.append({"n": 0}, {"n": 1, "text": "ä\u2028"})
        assert json.loads(path.read_text().split("\n")[1]) == {"n": 1, "text": "ä\u2028"}
    with second.locked() as new:
        assert [entry["n"] for entry in new] == [0, 1]
        second.append({"n": 2})
    with first.locked() as new:
        assert new == [{"n": 2}]  # not its own again
    assert [entry["n"] for entry in _entries(path)] == [0, 1, 2]


def test_a_half_written_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"n": 0}\n{"n": 1, "comm')
    journal = Journal(path)
    with journal.locked() as new:
        assert new == [{"n": 0}]
        journal.append({"n": 2})
    assert path.read_text() == '{"n": 0}\n{"n": 2}\n'


def test_a_last_line_that_only_lacks_its_end_is_an_entry(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"n": 0}\n{"n": 1}')  # as an editor may leave it
    journal = Journal(path)
    with journal.locked() as new:
        assert new == [{"n": 0}, {"n": 1}]
        journal.append({"n": 2})
    assert path.read_text() == '{"n": 0}\n{"n": 1}\n{"n": 2}\n'


@pytest.mark.parametrize(
    "content", ["my notes", '{\n "a": 1\n}', "a line\nand a last one", "- a: 1\n- {b: 2}", "[1,\n2"]
)
def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(ActiveDPOError, match=r"notes\.txt"):
        _entries(path)
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{", "line 2: broken JSON"),
        ("[1]", "line 2: not a JSON object"),
        (r'{"comment": "\ud800"}', "line 2: .* is half of a surrogate pair"),
        ("\udcff", "line 2: not UTF-8"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, error: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(os.fsencode(f'{{"n": 0}}\n{line}\n{{"n": 1}}\n'))
    with pytest.raises(ActiveDPOError, match=error):
        _entries(path)


def test_a_deeply_nested_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(ActiveDPOError, match="line 1: broken JSON"):
        _entries(path)


@pytest.mark.parametrize("change", ["cut", "replaced", "removed"])
def test_a_file_that_is_changed_in_use_is_left_as_it_is(tmp_path: Path, change: str) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    with journal.locked():
        journal.append({"n": 0}, {"n": 1})
    if change == "cut":
        path.write_text('{"n": 0}\n')
    elif change == "replaced":
        (tmp_path / "other").write_text('{"n": 5}\n{"n": 6}\n{"n": 7}\n')
        (tmp_path / "other").rename(path)
    else:
        path.unlink()
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(ActiveDPOError, match="while it was in use|no such file"), journal.locked():
        pass
    assert (path.read_bytes() if path.exists() else None) == before


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ActiveDPOError, match="no such file or directory"):
        _entries(tmp_path / "missing" / "journal.jsonl")


FORK = multiprocessing.get_context("fork")  # torch is loaded already


def _append(path: Path, who: str) -> None:
    journal = Journal(path)
    for n in range(60):
        with journal.locked():
            journal.append({"who": who, "n": n, "text": "x" * 5000})


def test_two_processes_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    both = [FORK.Process(target=_append, args=(path, who)) for who in "ab"]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    found = _entries(path)
    for who in "ab":
        assert [entry["n"] for entry in found if entry["who"] == who] == list(range(60))


def _append_beyond_the_limit(path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    journal = Journal(path)
    with pytest.raises(ActiveDPOError, match=f"{path}: file too large"), journal.locked() as new:
        assert new == [{"n": 0}]
        journal.append({"n": 1, "text": "x" * 500})


def test_an_entry_that_does_not_fit_on_the_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"n": 0}\n')
    process = FORK.Process(target=_append_beyond_the_limit, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert path.read_text() == '{"n": 0}\n'
