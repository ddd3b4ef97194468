"""The section "sanitizer" of `benchmarks.gpu`: small tests under NVIDIA's compute-sanitizer.

Its memcheck finds accesses out of bounds or at the wrong address, its racecheck threads of a block
that do not wait for each other. Kernels become many times slower under it, so these are the tests
of small inputs.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.gpu.cases import Case, Found, Record, Settings, Skip
from benchmarks.gpu.checkout import ROOT
from benchmarks.gpu.gpu_tests import run_file

TOOLS = ("memcheck", "racecheck")
# By file, an expression for pytest's -k.
SMALL = {
    "tests/ops/test_outer_sketch.py": "",
    "tests/ops/test_ops.py": "",
    "tests/kernels/test_logp_grad.py": "700-50257",
    "tests/ops/test_pair_lengths.py": "",
    "tests/ops/test_rank_update.py": "not 4099 and not 8192",
    "tests/selection/test_greedy_kernel.py": "test_gpu_rows_at_any_address and 512",
}
_LIMIT = 60.0  # of a file
_SHOWN = 2000  # characters of what it says
_SUMMARY = re.compile(r"SUMMARY: (\d+) (?:errors?|hazards?)")


def cases(settings: Settings) -> list[Case]:
    """One for every tool and file."""
    return [
        Case(f"{tool}, {file}", partial(_checked, tool, file, settings), 20, _LIMIT)
        for tool in TOOLS
        for file in SMALL
    ]


def _checked(tool: str, file: str, settings: Settings, found: Found) -> Record:
    if settings.device != "cuda":
        raise Skip("a dry run has no kernels to check")
    return run_under(tool, ROOT / file, max(1.0, min(_LIMIT, settings.left()) - 2), SMALL[file])


def run_under(tool: str, file: Path, limit: float, only: str = "") -> Record:
    """The counts of the file's tests under a tool, and the errors it found.

    Raises Skip without compute-sanitizer.
    """
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if program is None:
        raise Skip("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        # Calls that fail are the programs' own way to ask what a device can do.
        under = [program, f"--tool={tool}", f"--log-file={log}"]
        under += ["--report-api-errors=no"] if tool == "memcheck" else []
        record = run_file(file, limit, only=only, under=under)
        said = log.read_text() if log.exists() else ""
    summary = _SUMMARY.search(said)
    if summary is None:
        return {"complaint": f"{tool} has no summary: {said[-_SHOWN:]}", **record, "errors": None}
    errors = int(summary[1])
    return {**record, "errors": errors, "said": said[:_SHOWN] if errors else ""}
