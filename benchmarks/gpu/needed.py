"""Ends with one line if a package that `benchmarks.gpu` itself imports is missing."""

from __future__ import annotations

import sys
from importlib.util import find_spec

_PACKAGES = ("torch", "numpy", "typer")

if missing := [name for name in _PACKAGES if find_spec(name) is None]:
    sys.exit(f"benchmarks.gpu needs what is not installed: {', '.join(missing)}")
