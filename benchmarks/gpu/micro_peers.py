"""The kernels of the library and their alternatives, one function each.

Each takes inputs of `micro_inputs.py` and returns a call to be timed. Tables of buckets and signs,
and inputs padded to one length, are made before, outside of the peer's time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from activedpo_fast.ops import rank_update_, reference
from activedpo_fast.ops.backends import backends
from benchmarks.gpu.cases import Settings, Skip
from benchmarks.gpu.micro_inputs import Scored, Tokens, Update

Call = Callable[[], Any]
PIECES = 2.0  # bfloat16 numbers into which ours splits a number of a gradient, for bfloat16 inputs
_JL_BATCHES = (8, 16, 32)  # rows that fast_jl has functions for
_SIGNS_AT_A_TIME = 1 << 22


def kernel(name: str) -> Any:
    """A module of the Triton kernels, which imports Triton."""
    return import_module(f"activedpo_fast.kernels.{name}")


def ours_sparse(given: Tokens, method: str, deterministic: bool) -> Call:
    module = kernel("lora_grad_sketch")

    def call() -> Tensor:
        weights = [(given.left, given.right, given.key)]
        module.lora_grad_sketches(given.out, weights, given.segments, method, deterministic)
        return given.out

    return call


def ours_rademacher(given: Tokens) -> Call:
    module = kernel("lora_grad_rademacher")

    def call() -> Tensor:
        module.lora_grad_rademacher(given.out, given.left, given.right, given.segments, given.key)
        return given.out

    return call


def formed(left: Tensor, right: Tensor) -> Tensor:
    """Whole gradients, float32 [n, D], of padded sides."""
    return torch.bmm(left, right).flatten(1).float()


def _sjlt(left: Tensor, right: Tensor, bucket: Tensor, sign: Tensor, out: Tensor) -> Tensor:
    return out.index_add(1, bucket, formed(left, right) * sign)


def plain_sjlt(given: Tokens) -> Call:
    return _sjlt_call(given, _sjlt)


def compiled_sjlt(given: Tokens, settings: Settings) -> Call:
    return _sjlt_call(given, _compiled(_sjlt, settings))


def _sjlt_call(given: Tokens, function: Callable[..., Tensor]) -> Call:
    left, right = given.padded()
    positions = torch.arange(left.shape[1] * right.shape[2], device=left.device)
    k = given.out.shape[1]
    bucket, sign = reference.sjlt_hash(positions, given.key, k)
    out = torch.zeros(len(given.out), k, device=left.device)
    return lambda: function(left, right, bucket, sign.float(), out)


def package_sjlt(given: Tokens) -> Call:
    """The package sjlt, one non-zero a column; its tables are its own."""
    projection = import_module("sjlt").SJLTProjection
    left, right = given.padded()
    project = projection(
        original_dim=left.shape[1] * right.shape[2], proj_dim=given.out.shape[1], c=1
    )
    return lambda: project(formed(left, right))


def _rademacher(left: Tensor, right: Tensor, signs: Tensor, scale: float) -> Tensor:
    return (formed(left, right).bfloat16() @ signs).float() * scale


def plain_rademacher(given: Tokens) -> Call:
    return _rademacher_call(given, _rademacher)


def compiled_rademacher(given: Tokens, settings: Settings) -> Call:
    return _rademacher_call(given, _compiled(_rademacher, settings))


def _rademacher_call(given: Tokens, function: Callable[..., Tensor]) -> Call:
    left, right = given.padded()
    k = given.out.shape[1]
    signs = _signs(left.shape[1] * right.shape[2], k, given)
    return lambda: function(left, right, signs, k**-0.5)


def _signs(length: int, k: int, given: Tokens) -> Tensor:
    """The definition's signs, bfloat16 [length, k]."""
    device = given.left.device
    signs = torch.empty(length, k, dtype=torch.bfloat16, device=device)
    columns = torch.arange(k, device=device)
    for positions in torch.arange(length, device=device).split(max(1, _SIGNS_AT_A_TIME // k)):
        signs[positions] = reference.rademacher_signs(positions, columns, given.key).bfloat16()
    return signs


def fast_jl(given: Tokens) -> Call:
    """TRAK's CUDA projector; its signs are its own."""
    module = import_module("fast_jl")
    left, right = given.padded()
    rows, k = given.out.shape
    if rows not in _JL_BATCHES:
        raise Skip(f"fast_jl has no function for {rows} rows")
    project = getattr(module, f"project_rademacher_{rows}")
    processors = torch.cuda.get_device_properties(left.device).multi_processor_count
    return lambda: project(formed(left, right), k, 0, processors)


def ours_logps(given: Scored) -> Call:
    function = kernel("response_logp_grad").response_logp_grad
    return lambda: function(given.logits, given.targets, given.weights)


def _logps(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.float().log_softmax(1).gather(1, targets[:, None]).squeeze(1)


def plain_logps(given: Scored) -> Call:
    return _logps_call(given, _logps)


def compiled_logps(given: Scored, settings: Settings) -> Call:
    """With the log-probs, torch.compile compiles what autograd makes of them."""
    return _logps_call(given, _compiled(_logps, settings))


def _logps_call(given: Scored, function: Callable[..., Tensor]) -> Call:
    def call() -> tuple[Tensor, Tensor]:
        leaf = given.logits.detach().requires_grad_()
        logps = function(leaf, given.targets)
        (gradient,) = torch.autograd.grad(logps, leaf, given.weights)
        return logps.detach(), gradient

    return call


def ours_update(given: Update) -> Call:
    """One triangle."""
    require("rank_update", given.matrix)

    def call() -> Tensor:
        rank_update_(given.matrix, given.rows, alpha=-1)
        return given.matrix

    return call


def plain_update(given: Update) -> Call:
    """Both triangles, as addmm takes them."""
    return lambda: given.matrix.addmm_(given.rows.T, given.rows, alpha=-1)


def require(operation: str, tensor: Tensor) -> None:
    """Skip the case where the CUDA extension does not serve a tensor on a GPU."""
    if tensor.is_cuda and (status := backends()[operation]["cuda"]["cuda"]) != "active":
        raise Skip(f"the CUDA extension does not serve {operation}: {status}")


def _compiled(function: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    # A dry run does not need generated code; the graph is still captured.
    return _compiled_by(function, "inductor" if settings.device == "cuda" else "eager")


@cache
def _compiled_by(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, backend=backend)
