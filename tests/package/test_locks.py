"""One process at a time writes to a folder; a lock ends with its process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from activedpo_fast._locks import locked_folder
from activedpo_fast.errors import ActiveDPOError
from tests.support.faults import largest_file

_HOLD = """
import sys
from activedpo_fast._locks import locked_folder
with locked_folder(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def _holder(folder: Path) -> subprocess.Popen[str]:
    found = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert found.stdout is not None and found.stdout.readline() == "locked\n"
    return found


def test_the_second_process_is_told_of_the_first(tmp_path: Path) -> None:
    holder = _holder(tmp_path / "s")
    try:
        who = f"process {holder.pid} on {socket.gethostname()}"
        with (
            pytest.raises(ActiveDPOError, match=f"is being written to by {who}: wait"),
            locked_folder(tmp_path / "s"),
        ):
            pass
        holder.kill()
        holder.wait()
        with locked_folder(tmp_path / "s"):  # what a killed process leaves is no lock
            assert str(os.getpid()) in (tmp_path / "s" / ".lock").read_text()
    finally:
        holder.kill()
        holder.communicate()
    assert not list((tmp_path / "s").iterdir())


def test_a_lock_leaves_nothing(tmp_path: Path) -> None:
    with locked_folder(tmp_path / "a" / "b"), locked_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="x"), locked_folder(tmp_path / "a"):
        (tmp_path / "a" / "file").write_text("x")
        raise ValueError("x")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def test_threads_and_children(tmp_path: Path) -> None:
    refused: list[str] = []

    def other() -> None:
        try:
            with locked_folder(tmp_path):
                pass
        except ActiveDPOError as error:
            refused.append(str(error))

    with locked_folder(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        child = os.fork()
        if child == 0:  # a child has no lock, and does not keep its parent's
            other()
            os._exit(len(refused) - 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        other()  # the thread that holds it may
    assert len(refused) == 1 and f"process {os.getpid()} on" in refused[0]
    with locked_folder(tmp_path):
        pass


def test_a_lock_on_a_full_disk(tmp_path: Path) -> None:
    with largest_file(0), locked_folder(tmp_path / "s"):
        assert (tmp_path / "s" / ".lock").read_bytes() == b""
    assert not list(tmp_path.iterdir())
