"""A pytest plugin that writes a line for every test to the file GPU_REPORTS, as soon as it ends."""

from __future__ import annotations

import benchmarks.gpu.checkout  # noqa: F401  (first: it makes the kernels importable)

# isort: split
import json
import os
from typing import Any

import pytest

_LONGEST = 2000  # characters of a failure


def pytest_collection_finish(session: pytest.Session) -> None:
    _write({"collected": len(session.items)})


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    _write({"test": nodeid, "began": True})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Report a test's call, and failures and skips in its setup or teardown."""
    if report.when == "call" or report.outcome != "passed":
        message = "" if report.passed else str(report.longrepr)[-_LONGEST:]
        _write({"test": report.nodeid, "outcome": report.outcome, "message": message})


def _write(line: dict[str, Any]) -> None:
    with open(os.environ["GPU_REPORTS"], "a") as log:
        log.write(json.dumps(line) + "\n")
