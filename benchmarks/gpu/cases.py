"""The parts of a section of `benchmarks.gpu`: cases, measured and recorded one by one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

Record = dict[str, Any]
Found = dict[str, Record]  # the records of the section's earlier cases, by name


class Skip(Exception):
    """Raised with the reason why a case cannot be measured here; a missing module is treated the
    same."""


@dataclass(frozen=True)
class Settings:
    """The settings of every case.

    device: "cuda", or "cpu" for a dry run. tiny: sizes that a dry run takes.
    deadline: of the section, in `time.time()`'s seconds.
    """

    device: str
    tiny: bool
    deadline: float

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()


@dataclass(frozen=True)
class Case:
    """One measurement.

    measure: takes what was found before, gives the record.
    expected: seconds; with less left it is not begun. limit: seconds after which it is ended.
    """

    name: str
    measure: Callable[[Found], Record]
    expected: float = 5.0
    limit: float = 60.0


@dataclass(frozen=True)
class Section:
    """A process of its own: what it is about, and the share of the whole time that it may take.

    Time that it does not use is left for later sections; the shares add up to more than 1.
    """

    title: str
    module: str
    share: float

    def cases(self, settings: Settings) -> list[Case]:
        return import_module(self.module).cases(settings)


# In this order: the last ones, which may be cut off when time runs out, matter least.
SECTIONS = {
    "build": Section("extensions built in place", "benchmarks.gpu.build", 0.35),
    "compile": Section("Triton kernels compiled", "benchmarks.gpu.compile", 0.20),
    "tests": Section("tests marked gpu", "benchmarks.gpu.gpu_tests", 0.30),
    "selection": Section("selection", "benchmarks.gpu.selection", 0.15),
    "end_to_end": Section("gradient rows of whole models", "benchmarks.gpu.end_to_end", 0.75),
    "micro": Section("kernels beside floors and peers", "benchmarks.gpu.micro", 1.0),
    "sanitizer": Section("small tests under compute-sanitizer", "benchmarks.gpu.sanitizer", 1.0),
}
