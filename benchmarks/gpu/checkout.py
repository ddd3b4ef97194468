"""Makes a checkout that is not installed importable, for `benchmarks.gpu` and its processes.

`activedpo_fast` itself is found beside this folder. Its kernels are in the folder kernels/, which
only an installation calls `activedpo_fast.kernels`: importing this module makes it so.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import activedpo_fast

ROOT = Path(__file__).resolve().parents[2]

if importlib.util.find_spec("activedpo_fast.kernels") is None:
    activedpo_fast.__path__.append(str(ROOT))
