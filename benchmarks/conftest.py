"""Options, workloads made once, and the tables at the end of a run."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import pytest
import torch

from activedpo_fast.errors import ActiveDPOError
from benchmarks.machine import describe_run, vectors
from benchmarks.rows.tables import tables, tables_of_runs
from benchmarks.rows.workloads import WORKLOADS, Workload

ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--workload",
        default=",".join(WORKLOADS),
        metavar="NAMES",
        help=f"which of {', '.join(WORKLOADS)} to measure, comma-separated",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "workload" in metafunc.fixturenames:
        names = metafunc.config.getoption("--workload").split(",")
        unknown = sorted(set(names) - set(WORKLOADS))
        if unknown:
            raise pytest.UsageError(
                f"unknown workload {', '.join(unknown)}; known: {', '.join(WORKLOADS)}"
            )
        metafunc.parametrize("workload", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def workload(request: pytest.FixtureRequest) -> Iterator[Workload]:
    datasets.disable_progress_bars()
    try:
        made = WORKLOADS[request.param]()
    except ActiveDPOError as error:
        pytest.skip(str(error))
    yield made
    del made
    gc.collect()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.pop("node", None)  # the name of the machine
    machine_info.update(describe_run())


def pytest_benchmark_update_json(output_json: dict) -> None:
    """Medians are enough for a file that is committed."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)


@pytest.fixture(autouse=True)
def _keep(request: pytest.FixtureRequest, benchmark: Any) -> Iterator[None]:
    yield
    if benchmark.extra_info:
        row = {**benchmark.extra_info, "group": benchmark.group}
        request.config.stash.setdefault(ROWS, []).append(row)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    rows = config.stash.get(ROWS, [])
    found = tables_of_runs([(vectors(describe_run()), rows)]) | tables(rows)
    for table in found.values():
        terminalreporter.write_line(f"\n{table}")


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    """As many threads as cores that this process may use, as torch chooses; recorded in the
    results."""
    if hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(min(torch.get_num_threads(), len(os.sched_getaffinity(0))))
