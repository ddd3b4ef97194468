"""The section "tests" of `benchmarks.gpu`: the tests marked `gpu`, a process for each file.

The files run side by side: tests use few of a GPU's multiprocessors. Results are written line by
line as tests end, so that a test that hangs or breaks the device does not lose the results before
it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.cases import Case, Found, Record, Settings, Skip
from benchmarks.gpu.checkout import ROOT

_MARKS = ("pytest.mark.gpu", 'DEVICE = "cuda"')  # conftest.py marks modules with the second
_LIMIT = 150.0  # of a file
_SPARE = 2.0  # seconds for writing down what an ended file gave


def cases(settings: Settings) -> list[Case]:
    """One per file that has such tests; a dry run collects those of the smallest."""
    files = [
        file
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        if any(mark in file.read_text() for mark in _MARKS)
    ]
    if settings.tiny:
        files = [min(files, key=lambda file: file.stat().st_size)]
    return [
        Case(str(file.relative_to(ROOT)), partial(_result, file, files, settings), 10, _LIMIT)
        for file in files
    ]


_begun: dict[Path, Future[Record]] = {}


def _result(file: Path, files: list[Path], settings: Settings, found: Found) -> Record:
    """The results of the file's tests; the first call starts every file that has no record yet."""
    if missing := [name for name in ("pytest", "hypothesis") if find_spec(name) is None]:
        raise Skip(f"the tests need what is not installed: {', '.join(missing)}")
    if not _begun:
        limit = max(1.0, min(_LIMIT, settings.left()) - _SPARE)
        pool = ThreadPoolExecutor(len(files))
        for each in files:
            if str(each.relative_to(ROOT)) not in found:
                _begun[each] = pool.submit(
                    run_file, each, limit, collect_only=settings.device != "cuda"
                )
    return _begun[file].result()


def run_file(
    file: Path, limit: float, collect_only: bool = False, only: str = "", under: Sequence[str] = ()
) -> Record:
    """Counts of the file's tests by outcome, and the failures.

    only: an expression for pytest's -k. under: a command that runs the one after it.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "reports"
        command = [
            *under,
            sys.executable,
            "-m",
            "pytest",
            str(file),
            "-q",
            "-m",
            "gpu",
            "-k",
            only,
            "-p",
            "benchmarks.gpu.run_pytest",
            "-p",
            "no:cacheprovider",
            "--tb=short",
            *(["--collect-only"] if collect_only else []),
        ]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "GPU_REPORTS": str(log)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit,
            )
            status, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired:
            status, output = None, ""
        return _summary(_lines(log), status, output, limit)


def _lines(log: Path) -> list[Record]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def _summary(lines: list[Record], status: int | None, output: str, limit: float) -> Record:
    outcome = {line["test"]: line for line in lines if "outcome" in line}
    counts = Counter(line["outcome"] for line in outcome.values())
    record: Record = {
        "counts": dict(counts),
        "collected": _collected(lines),
        "failures": [
            {"test": name, "message": line["message"]}
            for name, line in outcome.items()
            if line["outcome"] == "failed"
        ],
    }
    begun = [line["test"] for line in lines if "began" in line]
    if status is None:
        record |= {"complaint": f"ended after {limit:.0f} s", "unfinished": begun[-1:]}
    elif status not in (0, 1, 5) or (status == 1 and not outcome):  # all passed, some failed, none
        record |= {
            "complaint": f"pytest ended with {status}: {output[-2000:]}",
            "unfinished": [name for name in begun[-1:] if name not in outcome],
        }
    return record


def _collected(lines: list[Record]) -> int | None:
    return next((line["collected"] for line in lines if "collected" in line), None)
