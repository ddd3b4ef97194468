"""The Triton kernels, installed as `activedpo_fast.kernels`; Triton is imported by its modules."""

from __future__ import annotations

import os
from importlib.util import find_spec


def why_not() -> str:
    """Why the kernels cannot be used here; empty where they can."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install activedpo-fast[gpu])"
    return ""


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1), as the tests do."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
