"""The extension module that tests alone call: the GPU's arithmetic on the CPU."""

from __future__ import annotations

from types import ModuleType

import pytest

_testing: ModuleType | None
try:
    from activedpo_fast import _testing
except ImportError:
    _testing = None


def module_for_tests() -> ModuleType:
    """Return activedpo_fast._testing; the test that calls this is skipped if it is not built."""
    if _testing is None:
        pytest.skip(
            "activedpo_fast._testing is not built: only a checkout has it, after `make env` or "
            "`python setup.py build_ext --inplace`"
        )
    return _testing
