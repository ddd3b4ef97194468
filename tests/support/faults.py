"""Faults in the middle of a stage of `activedpo run`, and a user who may write nothing."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from peft import PeftModel
from torch.nn.modules.module import register_module_forward_pre_hook

from activedpo_fast import selector
from activedpo_fast.training import loop

STAGES = ("generate", "features", "select", "label", "train", "save", "evaluate")
_NAMES = {"features": "select"}  # timed as a part of it
_FORWARDS = 12  # modules that have run by then: a stage has begun, and has not ended
_NOBODY = 65534


@contextlib.contextmanager
def at(stage: str, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` once in the middle of a stage: while a model computes, or is saved."""
    left = [act]

    def once() -> None:
        if left:
            left.pop()()

    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as hooks:
        if stage == "select":
            patch.setattr(selector, "run_selection", _with(once, selector.run_selection))
        elif stage == "save":
            # Of a round: the adapter of the start, if it is not there yet, is the first.
            saved, train = PeftModel.save_pretrained, loop.train_dpo
            trained: list[bool] = []
            patch.setattr(loop, "train_dpo", _with(lambda: trained.append(True), train))
            patch.setattr(PeftModel, "save_pretrained", _with(lambda: trained and once(), saved))
        else:
            inside = [""]
            for name in ("timed", "measured"):
                patch.setattr(loop, name, _noted(getattr(loop, name), inside))
            count = iter(range(10**9))

            def forward(*module_and_inputs: Any) -> None:
                if inside[-1] == _NAMES.get(stage, stage) and next(count) == _FORWARDS:
                    once()

            hooks.callback(register_module_forward_pre_hook(forward).remove)
        yield


def _with(act: Callable[[], Any], real: Any) -> Any:
    """Return `real`, with `act` at its end."""

    def call(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        act()
        return found

    return call


def _noted(real: Any, inside: list[str]) -> Any:
    """Return a context manager like `real` that notes which stage it is of."""

    @contextlib.contextmanager
    def call(folder: Any, stage: str, *rest: Any) -> Iterator[Any]:
        inside.append(stage)
        try:
            with real(folder, stage, *rest) as found:
                yield found
        finally:
            inside.pop()

    return call


@contextlib.contextmanager
def largest_file(size: int = 0) -> Iterator[None]:
    """Let no file have more bytes: writing beyond them fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Be a user without rights, in a process that ends with it. Permissions bind no superuser."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    yield
