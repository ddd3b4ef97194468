"""Settings of the whole suite."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

# Before any import of torch or a Hugging Face library.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models: starting threads costs more than they compute. Of processes that tests start, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# Triton interprets the kernels where there is no GPU. It looks at this when it is imported, which
# torch does not do, but transformers does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # It replaces what only these versions are known to have.
    if find_spec("triton") and version("triton").startswith("3.7."):
        from tests.support.interpreter import patch_once_a_launch

        patch_once_a_launch()


# Files that take long. `make test` gives whole files to its processes: one of these at the end
# would keep one of them busy while the others have nothing left.
FIRST = (
    "kernels/test_compile.py",
    "integration/test_sharded.py",
    "benchmarks/test_gpu_benchmark.py",
    "integration/test_cli.py",
    "integration/test_demo.py",
    "integration/test_loop.py",
    "kernels/test_sketch.py",
    "package/test_build.py",
)


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of modules that run their kernels on the GPU, where there is one, are GPU tests."""
    for item in items:
        if getattr(getattr(item, "module", None), "DEVICE", "cpu") == "cuda":
            item.add_marker(pytest.mark.gpu)
    items.sort(key=lambda item: not item.path.as_posix().endswith(FIRST))


@pytest.fixture(scope="module", autouse=True)
def without_imports_in_garbage_collections() -> Iterator[None]:
    """Leave what is in memory before a file's tests out of garbage collections: they look through
    a million objects of imported libraries otherwise, and each training collects once or more."""
    gc.collect()
    gc.freeze()
    yield


# The suite says the same every time; HYPOTHESIS_PROFILE=thorough tries four times as many examples
# (`make test-slow`), and =fuzz looks for new ones. No example has a deadline: how long one takes
# depends on what else the machine does. Tests with a number of their own have it from
# tests/support/examples.py.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("thorough", derandomize=True, deadline=None)
settings.register_profile("fuzz", derandomize=False, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def _fsync(file: int | Any) -> None:
    os.fstat(file if isinstance(file, int) else file.fileno())  # which refuses what fsync does


# Milliseconds each, and a round of a run has dozens. Only a loss of power would show a difference.
# Programs that tests start wait for the disk.
os.fsync = _fsync

torch.set_num_threads(1)  # where OMP_NUM_THREADS says otherwise
