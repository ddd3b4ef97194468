"""The command `activedpo label`, as a process of its own: killed, continued, ended."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import signal
import socket
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import pytest

pytest.importorskip("starlette")
pytest.importorskip("markdown_it")

from activedpo_fast.cli.app import main  # noqa: E402
from activedpo_fast.labels.files import labels_file  # noqa: E402
from activedpo_fast.labels.page import writing  # noqa: E402
from activedpo_fast.labels.page.labeling import journal_path  # noqa: E402
from activedpo_fast.labels.page.session import Session  # noqa: E402
from tests.support.labeling import open_labeling, plain_picks, write_picks  # noqa: E402


class _Command:
    """`activedpo label` in a process of its own, and requests like those of its page."""

    def __init__(self, *arguments: object) -> None:
        out, child_out = os.pipe()
        err, child_err = os.pipe()
        self.pid = os.fork()  # everything is imported already
        if self.pid == 0:
            code = 99
            try:
                os.dup2(child_out, 1)
                os.dup2(child_err, 2)
                sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
                signal.signal(signal.SIGINT, signal.default_int_handler)
                code = main(["label", *map(str, arguments)])
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        os.close(child_out)
        os.close(child_err)
        self.out, self.err = open(out), open(err)
        self.said = self.out.readline()
        found = re.search(r"(http://127\.0\.0\.1:\d+)/#(\S+)", self.said)
        assert found is not None, (self.said, self.err.read())
        self.base, self.token = found.groups()

    def ask(self, path: str, body: dict | None = None) -> dict:
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return {"status": error.code, **json.load(error)}

    def answer(self, choice: str) -> dict:
        pair = self.ask("/api/pair")["pair"]["number"]
        return self.ask(
            "/api/answer", {"pair": pair, "choice": choice, "seconds": 1, "comment": ""}
        )

    def disk(self, bytes_: int) -> None:
        """Let no file have more bytes: writing beyond them fails as on a full disk."""
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (bytes_, resource.RLIM_INFINITY))

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> tuple[int, str, str]:
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        with self.out, self.err:
            return code, self.out.read(), self.err.read()


@pytest.fixture(autouse=True)
def every_write_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels file follows every answer, however slow the machine is."""
    monkeypatch.setattr(writing, "_QUICK", math.inf)


@pytest.fixture
def picks(tmp_path: Path) -> Path:
    return write_picks(tmp_path / "picked.jsonl", plain_picks(4))


def test_killed_and_continued_and_finished(picks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = _Command(picks, "--labeler", "ann")
    assert "4 pairs for ann" in command.said
    command.answer("left")
    command.answer("tie")
    command.send(signal.SIGKILL)  # right after the response
    assert command.end()[0] == -signal.SIGKILL

    assert main(["label", str(picks), "--report"]) == 0
    assert f"{picks}: 2 of 4 pairs have a label" in capfd.readouterr().out

    command = _Command(picks, "--labeler", "ann")
    assert "2 pairs for ann" in command.said
    command.answer("right")
    command.send(signal.SIGINT)
    code, out, err = command.end()
    assert (code, err) == (3, "")  # a pair is left
    assert "3 of 4 pairs have a label" in out and out.endswith(f"labels: {labels_file(picks)}\n")

    command = _Command(picks, "--labeler", "ann")
    assert command.answer("skip")["pair"] is None
    command.ask("/api/finish", {})
    code, out, err = command.end()
    assert (code, err) == (0, "")
    assert "4 of 4 pairs have a label" in out
    labels = [json.loads(line)["label"] for line in labels_file(picks).open()]
    assert labels[0] in (0, 1) and labels[1] == "tie" and labels[2] in (0, 1)
    assert labels[3] == "skip"
    # Nothing is left: the command does not wait for anybody.
    labels_file(picks).unlink()
    assert main(["label", str(picks)]) == 0
    assert [json.loads(line)["label"] for line in labels_file(picks).open()] == labels


def test_quiet_prints_the_address_alone(picks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = _Command(picks, "--quiet")
    assert command.said == f"{command.base}/#{command.token}\n"
    command.answer("left")
    command.send(signal.SIGINT)
    assert command.end() == (3, "", "")
    assert main(["label", str(picks), "--report", "-q"]) == 0
    assert capfd.readouterr().out == ""


def test_terminated(picks: Path) -> None:
    command = _Command(picks)
    command.answer("left")
    command.send(signal.SIGTERM)
    assert command.end() == (143, ANY, "activedpo: terminated\n")
    labels = [json.loads(line)["label"] for line in labels_file(picks).open()]
    assert labels[0] in (0, 1) and labels[1:] == [None] * 3
    assert {path.name for path in picks.parent.iterdir()} == {
        "picked.jsonl",
        "labels-picked.jsonl",
        "labels-picked.journal.jsonl",
    }


def test_a_full_disk(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pairs = [replace(pick, responses=("Good " * 500, "Bad")) for pick in plain_picks(4)]
    picks = write_picks(tmp_path / "picked.jsonl", pairs)
    command = _Command(picks)
    command.answer("left")
    before = command.ask("/api/pair")
    command.disk(0)
    refused = command.answer("tie")
    assert refused["status"] == 500
    assert refused["error"].startswith("The answer was not saved: ")
    assert "labels-picked.journal.jsonl: file too large. Try again" in refused["error"]
    assert "Taking it back was not saved" in command.ask("/api/undo", {})["error"]
    assert command.ask("/api/pair") == before  # the page shows the same pair
    command.disk(resource.RLIM_INFINITY)
    assert command.answer("skip")["done"] == 2
    # The answers fit, but not the labels file, which has the texts, too.
    labels_file(picks).unlink()
    command.disk(journal_path(labels_file(picks)).stat().st_size + 200)
    assert command.answer("right")["done"] == 3
    command.send(signal.SIGINT)
    code, _, said = command.end()
    warning, error = said.splitlines()
    cannot = f"{labels_file(picks)} cannot be written: file too large"
    assert (code, error) == (2, f"activedpo: error: {cannot}")
    assert warning == f"activedpo: the answers are saved, but not yet the labels file: {cannot}"
    assert main(["label", str(picks), "--report"]) == 0
    assert "3 of 4 pairs have a label" in capfd.readouterr().out
    command = _Command(picks)
    command.answer("left")
    command.ask("/api/finish", {})
    assert command.end()[0] == 0
    assert None not in [json.loads(line)["label"] for line in labels_file(picks).open()]


def test_a_labeler_without_open_pairs_gets_the_report(
    picks: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("ann", "ben"):
        one = Session(open_labeling(picks, overlap=50.0), name)
        while (pair := one.current()) is not None:
            one.answer(pair, "left" if one.left(pair) == 0 else "right", seconds=1)
    assert main(["label", str(picks), "--labeler", "ben", "--combine", "dawid-skene"]) == 0
    said = capfd.readouterr().out
    assert "ann and ben: the same answer to 2 of 2 pairs, Cohen's kappa not defined" in said
    records = [json.loads(line) for line in labels_file(picks).open()]
    assert [record["label"] for record in records] == [0] * 4
    assert sorted(len(record["answers"]) for record in records) == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--report"], "nothing has been labeled yet with `activedpo label "),
        (["--labeler", ""], "a name has 1 to 64 characters"),
        (["--overlap", "101"], "--overlap 101: expected a number from 0 to 100"),
        (["--output", "{picks}"], "is the file of the pairs: choose another --output"),
    ],
)
def test_mistakes_are_one_clear_line(
    picks: Path, arguments: list[str], error: str, capfd: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(picks=picks) for argument in arguments]
    before = picks.read_bytes()
    assert main(["label", str(picks), *given]) == 2
    said = capfd.readouterr().err
    assert error in said and said.count("\n") == 1
    assert picks.read_bytes() == before
    assert not labels_file(picks).exists()
    assert open_labeling(picks, overlap=30.0, seed=5).overlap == 30.0  # nothing was begun


def test_a_port_in_use_is_one_clear_line(picks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["label", str(picks), "--port", str(port)]) == 2
    assert f"--port {port}: address already in use; choose another" in capfd.readouterr().err


def test_without_the_extra_it_says_what_to_install(
    picks: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # as if it were not installed
    assert main(["label", str(picks)]) == 2
    assert "pip install activedpo-fast[label]" in capfd.readouterr().err
