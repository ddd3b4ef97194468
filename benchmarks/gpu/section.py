"""Measures the cases of one section of `benchmarks.gpu`, in a process of its own.

    python -m benchmarks.gpu.section NAME STATE DEVICE DEADLINE [--tiny]

STATE, a JSON file, has a record of every case that was begun, and is replaced after each. Started
again, the process goes on with the cases that have none: a kernel that has broken the device, or
that does not return, costs its own case only.
"""

from __future__ import annotations

import benchmarks.gpu.checkout  # noqa: F401  (first: it makes the kernels importable)

# isort: split
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from activedpo_fast._files import write_atomic
from benchmarks.gpu.cases import SECTIONS, Case, Found, Record, Settings, Skip
from benchmarks.gpu.checkout import ROOT

BROKEN = (
    3  # exit status: the device no longer responds, and the remaining cases need another process
)


def measure(cases: Sequence[Case], settings: Settings, state: Path) -> int:
    """Measure the cases that `state` has no record of; the exit status."""
    found = read_state(state)
    for case in cases:
        if case.name in found:
            continue
        if settings.left() < case.expected:
            found[case.name] = {
                "status": "skipped",
                "reason": (
                    f"takes about {case.expected:.0f} s, "
                    f"{max(0.0, settings.left()):.0f} s were left"
                ),
            }
            _write(state, found)
            continue
        _write(state, found, running=case)
        found[case.name] = _record(case, found)
        _write(state, found)
        if not _device_works(settings.device):
            return BROKEN
    return 0


def read_state(state: Path) -> Found:
    """Records by case; empty where nothing was written yet."""
    return json.loads(state.read_text())["cases"] if state.exists() else {}


def _record(case: Case, found: Found) -> Record:
    started = time.perf_counter()
    try:
        record = {"status": "ok", **case.measure(found)}
    except (Skip, ImportError) as error:
        record = {"status": "skipped", "reason": str(error)}
    except Exception:
        record = {"status": "failed", "traceback": without_paths(traceback.format_exc())}
    return {**record, "took": round(time.perf_counter() - started, 2)}


def without_paths(text: str) -> str:
    """`text` without the folders of one machine."""
    for folder, name in (
        (str(ROOT), "."),
        (sys.prefix, "python"),
        (sys.base_prefix, "python"),
        (str(Path.home()), "~"),
    ):
        text = text.replace(folder, name) if len(folder) > 1 else text
    return text


def _write(state: Path, found: Found, running: Case | None = None) -> None:
    now = (
        None
        if running is None
        else {"name": running.name, "until": time.time() + running.limit, "limit": running.limit}
    )
    write_atomic(state, json.dumps({"cases": found, "running": now}))


def _device_works(device: str) -> bool:
    gc.collect()
    if device != "cuda":
        return True
    import torch  # which takes seconds, and not every section needs it

    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def main() -> int:
    name, state, device, deadline = sys.argv[1:5]
    if device == "cpu":
        os.environ.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    settings = Settings(device, "--tiny" in sys.argv, float(deadline))
    return measure(SECTIONS[name].cases(settings), settings, Path(state))


if __name__ == "__main__":
    sys.exit(main())
