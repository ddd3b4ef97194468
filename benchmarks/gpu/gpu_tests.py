"""The section "tests" of `benchmarks.gpu`: the tests marked `gpu`, a process for each file.

What a file's tests gave is written line by line as they end, so that a test that hangs or breaks
the device takes nothing from those before it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

from benchmarks.gpu.cases import Case, Found, Record, Settings
from benchmarks.gpu.checkout import ROOT

_MARK = "pytest.mark.gpu"
_LIMIT = 120.0  # of a file
_SPARE = 2.0  # seconds for writing down what an ended file gave


def cases(settings: Settings) -> list[Case]:
    """One a file that has such tests; a dry run collects those of one."""
    files = [file for file in sorted((ROOT / "tests").rglob("test_*.py"))
             if _MARK in file.read_text()]
    files = files[:1] if settings.tiny else files
    return [Case(str(file.relative_to(ROOT)), partial(_run, file, settings), 10, _LIMIT)
            for file in files]


def _run(file: Path, settings: Settings, found: Found) -> Record:
    limit = max(1.0, min(_LIMIT, settings.left()) - _SPARE)
    return run_file(file, limit, collect_only=settings.device != "cuda")


def run_file(file: Path, limit: float, collect_only: bool = False) -> Record:
    """Counts by outcome of the file's tests, and what failed."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "reports"
        command = [sys.executable, "-m", "pytest", str(file), "-q", "-m", "gpu", "-p",
                   "benchmarks.gpu.run_pytest", "-p", "no:cacheprovider", "--tb=short",
                   *(["--collect-only"] if collect_only else [])]
        try:
            done = subprocess.run(command, cwd=ROOT, env={**os.environ, "GPU_REPORTS": str(log)},
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                  timeout=limit)
            status, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired:
            status, output = None, ""
        return _summary(_lines(log), status, output, limit)


def _lines(log: Path) -> list[Record]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def _summary(lines: list[Record], status: int | None, output: str, limit: float) -> Record:
    outcome = {line["test"]: line for line in lines if "outcome" in line}
    counts = Counter(line["outcome"] for line in outcome.values())
    record: Record = {"counts": dict(counts), "collected": _collected(lines), "failures": [
        {"test": name, "message": line["message"]} for name, line in outcome.items()
        if line["outcome"] == "failed"]}
    begun = [line["test"] for line in lines if "began" in line]
    if status is None:
        record |= {"complaint": f"ended after {limit:.0f} s", "unfinished": begun[-1:]}
    elif status not in (0, 1, 5):  # all passed, some failed, none there
        record |= {"complaint": f"pytest ended with {status}: {output[-2000:]}",
                   "unfinished": [name for name in begun[-1:] if name not in outcome]}
    return record


def _collected(lines: list[Record]) -> int | None:
    return next((line["collected"] for line in lines if "collected" in line), None)
