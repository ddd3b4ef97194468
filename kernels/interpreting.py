"""Triton's interpreter with NumPy 2.4, which Triton 3.6 was not made for.

A number that a kernel has loaded is an array with one element to the interpreter. NumPy no longer
makes a Python number of such an array, as a loop of a kernel needs (triton-lang/triton issue 9171;
Triton 3.7 does it another way).
"""

from __future__ import annotations

from typing import Any

import triton
from triton.runtime import interpreter


def accept_numpy_2_4() -> None:
    """Let kernels loop up to a number that they have loaded. Other versions of Triton can."""
    if not triton.__version__.startswith("3.6."):
        return
    patch = interpreter._patch_lang_tensor

    def patch_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_index
