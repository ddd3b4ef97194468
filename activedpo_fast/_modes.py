"""What the caller has switched on in PyTorch and must not change a number here."""

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
    """Inside, no autocast, inference mode or default device of the caller's, and grad mode on.

    Autocast would round the products of features and of V to bfloat16; tensors made in inference
    mode cannot take part in a backward pass.

    Args:
        device: a device type whose autocast is switched off, besides those of the CPU and of the
            accelerator that is there.
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
    """`function` runs in `own_modes`; a generator function does at each of its steps."""
    if not inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            with own_modes():
                return function(*args, **kwargs)

        return call

    @functools.wraps(function)
    def steps(*args: P.args, **kwargs: P.kwargs) -> Iterator[Any]:
        # Never held over a `yield`: whoever iterates goes on in modes of their own.
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
