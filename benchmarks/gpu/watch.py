"""Runs one section of `benchmarks.gpu` in a process, and survives its failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from activedpo_fast._files import write_atomic
from benchmarks.gpu.cases import Found
from benchmarks.gpu.checkout import ROOT

_POLL = 0.2
_GRACE = 5.0  # seconds beyond the deadline for a case that is about to end
_LAST_LINES = 15  # characters of a process's output, if it died
_MOST_PROCESSES = 8  # that a section may use up


@dataclass(frozen=True)
class Child:
    """How to start the process.

    command: given the file of its state. environment: of its own. log: what it says goes there.
    """

    command: list[str]
    environment: Mapping[str, str]
    state: Path
    log: Path


def section_process(
    name: str,
    folder: Path,
    device: str,
    deadline: float,
    tiny: bool,
    environment: Mapping[str, str],
) -> Child:
    """The process that measures a section; `folder` takes its files."""
    state = folder / f"{name}.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.section",
        name,
        str(state),
        device,
        str(deadline),
        *(["--tiny"] if tiny else []),
    ]
    return Child(command, environment, state, folder / f"{name}.log")


def run(child: Child, deadline: float, changed: Callable[[Found], None]) -> Found:
    """Run until all cases have a record, or the deadline; what was found.

    A case that takes longer than its limit, or ends the process, is recorded as failed, and another
    process goes on after it. `changed` is called with the records whenever there are more.
    """
    for _ in range(_MOST_PROCESSES):
        reason = _watch(child, deadline, changed)
        if reason is None or not _recorded(child, reason) or time.time() > deadline:
            break
    found = _state(child)["cases"]
    changed(found)
    return found


def _watch(child: Child, deadline: float, changed: Callable[[Found], None]) -> str | None:
    """The reason why the process did not measure every case; None if it did."""
    with open(child.log, "ab") as log:
        process = subprocess.Popen(
            child.command,
            cwd=ROOT,
            env=dict(child.environment),
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    seen = -1
    try:
        while process.poll() is None:
            time.sleep(_POLL)
            state = _state(child)
            if len(state["cases"]) != seen:
                seen = len(state["cases"])
                changed(state["cases"])
            running, now = state["running"], time.time()
            if running and now > running["until"]:
                return f"ended after {running['limit']:.0f} s, its limit"
            if now > deadline + _GRACE:
                return "ended at the section's deadline"
    finally:
        _end(process)
    if process.returncode == 0:
        return None
    last = child.log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
    return "\n".join([f"the process ended with {process.returncode}", *last])


def _recorded(child: Child, reason: str) -> bool:
    """Whether a case caused the failure, so that another process can continue after it."""
    state = _state(child)
    if running := state["running"]:
        state["cases"][running["name"]] = {"status": "failed", "traceback": reason}
    elif state["cases"]:  # the last of them broke the device, and reported how
        return True
    else:
        state["cases"]["start"] = {"status": "failed", "traceback": reason}
    write_atomic(child.state, json.dumps({**state, "running": None}))
    return running is not None


def _state(child: Child) -> dict:
    if not child.state.exists():
        return {"cases": {}, "running": None}
    return json.loads(child.state.read_text())


def _end(process: subprocess.Popen) -> None:
    """End the process and its children."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
