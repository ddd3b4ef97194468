"""A model's forward pass as the model defines it, without any wrappers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

# The modules that define the wrappers which accelerate and torch.autocast put around `forward`.
_WRAPPERS = ("torch.amp.autocast_mode", "accelerate.utils.operations")


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Run without autocast around any `forward`, without compiled modules or leftover hooks.

    * A trainer with bf16=True or fp16=True leaves its model with a `forward` that runs in autocast
      and converts the output (accelerate's `prepare_model`). Features should have the model's own
      precision, and be the same before and after training.
    * Compiled modules do not run hooks that are added later.
    * To output hidden states or a router's logits, transformers adds hooks that it never removes.

    Everything is restored afterward.
    """
    modules = list(model.modules())
    with ExitStack() as stack:
        if _has_compiled(modules):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in modules:
            own = vars(module)
            if "forward" in own:
                unwrapped = _without_autocast(own["forward"])
                if unwrapped is not own["forward"]:
                    stack.callback(own.__setitem__, "forward", own["forward"])
                    own["forward"] = unwrapped
        stack.enter_context(_no_hooks_for_outputs(modules))
        yield


@contextmanager
def _no_hooks_for_outputs(modules: list[nn.Module]) -> Iterator[None]:
    """Remove the hooks that transformers' `capture_outputs` adds in this context."""
    flag = "_output_capturing_hooks_installed"
    had = {id(module) for module in modules if flag in vars(module)}
    hooks = [(module._forward_hooks, dict(module._forward_hooks)) for module in modules]
    try:
        yield
    finally:
        new = [module for module in modules if flag in vars(module) and id(module) not in had]
        for module in new:
            delattr(module, flag)
        if new:
            for own, before in hooks:
                own.clear()
                own.update(before)


def _without_autocast(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the `forward` inside the wrappers, bound to the same module."""
    inside: Any = forward
    while _module_of(inside) in _WRAPPERS:
        inside = inside.__wrapped__
    if isinstance(forward, MethodType) and not isinstance(inside, MethodType):
        # accelerate wraps the bare function of the class and binds the result.
        return MethodType(inside, forward.__self__)
    found: Callable[..., Any] = inside
    return found


def _module_of(function: Any) -> str | None:
    """Return the module in which a wrapper was defined; None if it is not a wrapper.

    `__module__` does not work: wrappers copy it from the function they wrap.
    """
    if not hasattr(function, "__wrapped__"):
        return None
    function = getattr(function, "__func__", function)
    scope = getattr(function, "__globals__", None)
    return type(function).__module__ if scope is None else scope.get("__name__")


def _has_compiled(modules: list[nn.Module]) -> bool:
    if "torch._dynamo" not in sys.modules:
        return False
    return any(
        getattr(module, "_compiled_call_impl", None) is not None
        or type(module).__name__ == "OptimizedModule"
        for module in modules
    )
