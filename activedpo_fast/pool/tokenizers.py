"""Restoring a tokenizer's settings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def tokenizer_as_found(tokenizer: Any) -> Iterator[None]:
    """Restore the truncation and padding that a tokenizer's file may set.

    Every call of a fast tokenizer sets both in its backend, and `save_pretrained` would write them
    from there. A processor's tokenizer is meant by the processor.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = getattr(backend, "truncation", None), getattr(backend, "padding", None)
    try:
        yield
    finally:
        if backend is not None:
            if backend.truncation != truncation:
                _set(truncation, backend.enable_truncation, backend.no_truncation)
            if backend.padding != padding:
                _set(padding, backend.enable_padding, backend.no_padding)


def leaves_tokenizer(position: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function whose argument at `position`, or `processing_class`, is a tokenizer."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            given = args[position] if len(args) > position else kwargs.get("processing_class")
            with tokenizer_as_found(given):
                return function(*args, **kwargs)

        return call

    return decorate


def _set(settings: dict[str, Any] | None, enable: Callable[..., Any], disable: Any) -> None:
    if settings is None:
        disable()
    else:
        enable(**settings)
