"""Isolation from the caller's PyTorch modes, so that they do not change the results."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def own_modes(device: str = "cpu") -> Iterator[None]:
    """Disable the caller's autocast, inference mode and default device; turn grad mode on.

    Autocast would round the products of features and of V to bfloat16; tensors made in inference
    mode cannot take part in a backward pass.

    Args:
        device: a device type whose autocast is turned off, in addition to the CPU's and the
            available accelerator's.
    """
    with ExitStack() as stack:
        for kind in dict.fromkeys(("cpu", device, *_accelerators())):
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


def in_own_modes(function: Callable[P, T]) -> Callable[P, T]:
    """Run `function` in `own_modes`; for a generator function, each of its steps."""
    if not inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            with own_modes():
                return function(*args, **kwargs)

        return call

    @functools.wraps(function)
    def steps(*args: P.args, **kwargs: P.kwargs) -> Iterator[Any]:
        # Never held across a `yield`: the consumer continues in its own modes.
        generator = function(*args, **kwargs)
        while True:
            with own_modes():
                try:
                    value = next(generator)
                except StopIteration:
                    return
            yield value

    return cast(Callable[P, T], steps)


def _accelerators() -> tuple[str, ...]:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return () if found is None else (found.type,)
