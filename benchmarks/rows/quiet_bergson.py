"""bergson without what it does to the root logger and prints."""

from __future__ import annotations

import importlib
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import ModuleType


def import_bergson(module: str = "") -> ModuleType:
    """Import bergson, which replaces the handlers of the root logger, and restore them."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    kept = importlib.import_module(f"bergson.{module}" if module else "bergson")
    root.handlers[:] = handlers
    root.setLevel(level)
    return kept


@contextmanager
def quiet() -> Iterator[None]:
    """Hide bergson's progress bars and lists of modules, for which it has no options."""
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
