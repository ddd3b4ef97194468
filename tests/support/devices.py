"""Two devices on a machine that has one: tensors of the CPU that are said to be elsewhere.

Numbers are computed as they are on the CPU. What a machine with several GPUs would refuse is
refused here: an operation on tensors of different devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pytest
import torch
import torch._decomp.decompositions_for_jvp  # it reads the sources of what is replaced here
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST = torch.device("cpu")
FIRST, SECOND = torch.device("cpu", 0), torch.device("cpu", 1)
_aten = torch.ops.aten
# On a GPU their indices may also be on the CPU, and so may what is copied there.
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_ANYWHERE = {_aten.copy_.default, _aten._to_copy.default}


class _Places:
    """Which storages are on a device other than the host."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[torch.device, Any]] = {}
        self.making: torch.device | None = None  # where what is made now is said to be

    def of(self, tensor: Tensor) -> torch.device:
        if not _has_place(tensor):
            return HOST
        return self._found.get(tensor.untyped_storage().data_ptr(), (HOST, None))[0]

    def put(self, tensor: Tensor, device: torch.device) -> None:
        storage = tensor.untyped_storage()
        if device == HOST:
            self._found.pop(storage.data_ptr(), None)
        else:  # kept alive, so that no other storage has its address
            self._found[storage.data_ptr()] = device, storage

    @contextmanager
    def made_on(self, device: torch.device | None) -> Iterator[None]:
        before, self.making = self.making, device or self.making
        try:
            yield
        finally:
            self.making = before


def _has_place(value: Any) -> bool:
    # A derivative that is zero has no storage.
    return isinstance(value, Tensor) and value.numel() > 0 and not value._is_zerotensor()


class _Operations(TorchDispatchMode):
    """Puts results where operands are, which must be in one place."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self._places = places

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [args[0], *args[2:]] if func in _INDEXING else args
        if func in _INDEXING:
            given += [index for index in args[1] if index is not None and self._is_away(index)]
        operands = [x for x in tree_leaves((given, kwargs)) if _has_place(x)]
        first = self._places.of(operands[0]) if operands else HOST
        away = {self._places.of(x) for x in operands if x.dim() or self._is_away(x)} or {first}
        making = self._places.making
        if len(away) > 1 and making is None and func not in _ANYWHERE:
            raise RuntimeError(f"{func}: expected all tensors on one device, found {away}")
        result = func(*args, **(kwargs or {}))
        place = making or (first if func in _ANYWHERE else away.pop())
        for tensor in tree_leaves(result):
            if _has_place(tensor):
                self._places.put(tensor, place)
        return result

    def _is_away(self, tensor: Tensor) -> bool:
        return self._places.of(tensor) != HOST


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device, places: _Places) -> Tensor:
        ctx.back, ctx.places = tensor.device, places
        with places.made_on(device):
            return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        with ctx.places.made_on(ctx.back):
            return gradient.clone(), None, None


# What takes a device as the argument of this name.
_FACTORIES = "arange empty empty_like eye full ones ones_like tensor zeros zeros_like".split()
_METHODS = "new_empty new_full new_ones new_tensor new_zeros".split()


@contextmanager
def two_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let FIRST and SECOND be devices apart from each other and from HOST."""
    places, to = _Places(), Tensor.to

    def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tensor.to"""
        named = [x for x in (*args, kwargs.get("device")) if isinstance(x, (str, torch.device))]
        like = [x for x in args if isinstance(x, Tensor)]
        kinds = [x for x in (*args, kwargs.get("dtype")) if isinstance(x, torch.dtype)]
        kinds += [x.dtype for x in like]
        copy = {"copy": True} if kwargs.get("copy") else {}
        converted = to(tensor, kinds[0] if kinds else tensor.dtype, **copy)
        device = torch.device(named[0]) if named else like[0].device if like else tensor.device
        return converted if device == tensor.device else _Move.apply(converted, device, places)

    def made_there(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(function)
        def call(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            with places.made_on(None if device is None else torch.device(device)):
                return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch, _Operations(places):
        patch.setattr(Tensor, "device", property(places.of), raising=False)
        patch.setattr(Tensor, "to", moved)
        patch.setattr(Tensor, "cpu", lambda tensor: moved(tensor, HOST))
        for owner, names in ((torch, _FACTORIES), (Tensor, _METHODS)):
            for name in names:
                patch.setattr(owner, name, made_there(getattr(owner, name)))
        yield
