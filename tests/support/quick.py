"""Which parameters of a test run every time; `make test-slow` runs the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_except(quick: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Return the parameters, with those that are not in `quick` marked as slow. A tuple is the
    values of several arguments."""
    values = list(values)
    lost = [value for value in quick if value not in values]
    assert not lost, f"not among the parameters: {lost}"
    return [
        value
        if value in quick
        else pytest.param(*value if isinstance(value, tuple) else (value,), marks=pytest.mark.slow)
        for value in values
    ]
