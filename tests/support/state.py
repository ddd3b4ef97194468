"""The state of a model, its tokenizer and the process that a call must leave unchanged."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn

_REGISTRIES = ("_parameters", "_buffers", "_modules")


def snapshot(model: nn.Module, tokenizer: Any = None, *, weights: bool = True) -> dict[str, Any]:
    """All observable state, by name; `differences` compares two snapshots.

    Args:
        weights: whether to include values and gradients of parameters, and the random generators,
            all of which training changes.
    """
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _REGISTRIES:
                found[f"{path}: {name}"] = _copy(value)
        found[f"{path}: children"] = {name: id(child) for name, child in module._modules.items()}
        for name, buffer in module._buffers.items():
            found[f"{path}: buffer {name}"] = (
                None if buffer is None else (id(buffer), buffer.dtype, buffer.clone())
            )
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[f"{name}: identity"] = (id(parameter), type(parameter), parameter.dtype)
        found[f"{name}: requires_grad"] = parameter.requires_grad
        if weights:
            found[f"{name}: value"] = parameter.detach().clone()
            gradient = parameter.grad
            found[f"{name}: grad"] = (
                gradient if gradient is None else (id(gradient), gradient.clone())
            )
        else:
            found[f"{name}: has grad"] = parameter.grad is not None
    for path, module in model.named_modules():
        for name in ("config", "generation_config"):
            config = vars(module).get(name)
            if hasattr(config, "to_dict"):
                found[f"{path}: {name}"] = (id(config), repr(config.to_dict()))
    found["peft_config"] = repr(vars(model).get("peft_config"))
    if tokenizer is not None:
        found["tokenizer"] = {
            name: _copy(value) for name, value in vars(tokenizer).items() if name != "_tokenizer"
        }
        backend = tokenizer._tokenizer
        found["tokenizer backend"] = (backend.truncation, backend.padding, backend.to_str())
    if weights:
        found["random"] = (torch.get_rng_state(), repr(random.getstate()))
    found["modes"] = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_default_dtype(),
        torch.get_num_threads(),
    )
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of everything that changed."""
    return [
        name
        for name in {**before, **after}
        if name not in before or name not in after or not _same(before[name], after[name])
    ]


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set)) else value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and list(one) == list(other)
            and all(_same(value, other[name]) for name, value in one.items())
        )
    return one is other or bool(one == other)
