"""The section "compile" of `benchmarks.gpu`: every variant of the Triton kernels, by all cores.

Launches find them in Triton's cache afterwards.
"""

from __future__ import annotations

import os
from dataclasses import asdict

from benchmarks.gpu.build import architecture
from benchmarks.gpu.cases import Case, Record, Settings, Skip


def cases(settings: Settings) -> list[Case]:
    return [Case("every variant", lambda _: compiled(settings), 1, 120)]


def compiled(settings: Settings) -> Record:
    """The resources that each variant needs, and the problems of any."""
    if settings.device != "cuda":
        raise Skip("nothing is compiled for a dry run")
    from benchmarks.gpu.kernel_resources import compile_all

    found = compile_all([int(architecture().rstrip("a"))], None, len(os.sched_getaffinity(0)))
    return {
        "variants": len(found),
        "problems": {each.name: each.problems() for each in found if each.problems()},
        "kernels": [asdict(each) for each in found],
    }
