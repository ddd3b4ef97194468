"""How many examples a test with Hypothesis tries."""

from __future__ import annotations

import os

_PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "repeatable")


def examples(count: int) -> int:
    """Return `count`, of which a run without HYPOTHESIS_PROFILE tries a quarter, and one with
    "fuzz" twenty times as many."""
    return {"thorough": count, "fuzz": 20 * count}.get(_PROFILE, -(-count // 4))
