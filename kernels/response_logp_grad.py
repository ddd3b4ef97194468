"""log π of scored tokens and the gradient of their weighted sum at the logits (Triton).

One program per token reads its row of logits twice: once for the largest logit and the sum of
exponentials, and once to write the gradient in the logits' dtype. The second pass starts at the
end, which the caches still hold. No float32 copy of the logits is made; PyTorch makes several.

The gradient goes to a separate tensor. Liger-Kernel's cross entropy (linkedin/Liger-Kernel,
ops/cross_entropy.py) overwrites the logits instead, which saves a tensor of this size. Here
autograd may have saved the logits, for instance as the output of a tanh.

Why not Liger's fused linear cross entropy (ops/fused_linear_cross_entropy.py), which computes the
logits too: it multiplies by a given weight matrix, with an optional bias and soft cap. Adapters on
the head, and anything else a model does there, would be left out; here the model's own head runs.
For per-token losses (reduction="none"), it forms the logits once for the losses and again for the
gradient, when it receives their weights, which here are known from the start. And it reads the
number of scored tokens back from the GPU, which makes the program wait.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from activedpo_fast.kernels.launching import NAMES, on
from activedpo_fast.kernels.variants import LAUNCH, Variant

BLOCK, WARPS = 4096, 8


@triton.jit
def _exponentials(x, largest):
    """Return exp(x - largest), and 0 for a logit of -infinity even if there is no larger one."""
    return tl.exp(x - tl.where(largest == float("-inf"), 0.0, largest))


@triton.jit(do_not_specialize=["logps", "logits_step", "grad_step", "targets", "weights",
                               "vocabulary"])
def response_logp_grad_kernel(logps, grad, logits, logits_step: tl.int64, grad_step: tl.int64,
                              targets, weights, vocabulary: tl.int32, UNIT: tl.constexpr,
                              BLOCK: tl.constexpr):
    """Process one token. Rows of logits and grad (None: no gradient) have whole units of UNIT."""
    token = tl.program_id(0).to(tl.int64)
    logits += token * logits_step * UNIT
    length = tl.cdiv(vocabulary, UNIT) * UNIT  # tells the compiler that it is a multiple
    i = tl.arange(0, BLOCK)
    blocks = tl.cdiv(length, BLOCK)
    # Each place of a block has its own running maximum and sum, combined at the end.
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for block in range(blocks):
        at = block * BLOCK + i
        x = tl.load(logits + at, mask=at < length, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, x)
        sums = sums * _exponentials(largest, larger) + _exponentials(x, larger)
        largest = larger
    peak = tl.max(largest, axis=0)
    total = tl.sum(sums * _exponentials(largest, peak), axis=0)
    target = tl.load(targets + token)
    chosen = tl.load(logits + target).to(tl.float32)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    tl.store(logps + token, (chosen - shift) - tl.log(total.to(tl.float64)).to(tl.float32))
    if grad is not None:
        grad += token * grad_step * UNIT
        weight = tl.load(weights + token)
        scale = weight / total
        for back in range(blocks):
            at = (blocks - 1 - back) * BLOCK + i
            x = tl.load(logits + at, mask=at < length, other=float("-inf")).to(tl.float32)
            value = tl.where(at == target, weight, 0.0) - scale * _exponentials(x, peak)
            tl.store(grad + at, value.to(grad.dtype.element_ty), mask=at < length)


def response_logp_grad(logits: Tensor, targets: Tensor,
                       weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return log softmax(logits)[target] of each token, and ∂ Σ weight · logp / ∂ logits.

    Args:
        logits: [n, V], float32, bfloat16 or float16, unit column stride; -infinity is allowed.
        targets: int64 [n], 0 <= target < V. weights: float32 [n], or None for no gradient.

    Returns:
        The log-probs, float32 [n], and the gradient [n, V] in logits' dtype, weight times one-hot
        minus softmax (None without weights). A NaN among a token's logits makes its log-prob NaN.

    Sums are formed in float32. Arguments are not checked, and nothing waits for the GPU.
    Definition: `reference.response_logp_grad`.
    """
    n, vocabulary = logits.shape
    logps = torch.empty(n, dtype=torch.float32, device=logits.device)
    grad = None
    if weights is not None:
        grad = torch.empty(n, vocabulary, dtype=logits.dtype, device=logits.device)
    if n == 0:
        return logps, grad
    unit = _unit(logits)
    with on(logits.device):
        response_logp_grad_kernel[(n,)](
            logps, grad, logits, logits.stride(0) // unit, vocabulary // unit, targets.contiguous(),
            None if weights is None else weights.contiguous(), vocabulary, UNIT=unit, BLOCK=BLOCK,
            num_warps=WARPS, **LAUNCH)
    return logps, grad


def _unit(logits: Tensor) -> int:
    """Return the unit of a row in numbers, read and written at a time: 16 bytes, or one number."""
    unit = 16 // logits.element_size()
    aligned = logits.shape[1] % unit == logits.stride(0) % unit == logits.data_ptr() % 16 == 0
    return unit if aligned else 1


def variants() -> list[Variant]:
    """Return every configuration of the kernel; rows of partial units may start anywhere."""
    found = []
    rows = {"": True, " any V": True, " anywhere": False}  # whether the first is 16-byte aligned
    for (dtype, name), (kind, aligned), wanted in product(
            NAMES.items(), rows.items(), (True, False)):
        unit = 16 // dtype.itemsize if not kind else 1
        constants = {"UNIT": unit, "BLOCK": BLOCK} | (
            {} if wanted else {"grad": None, "weights": None})
        pointers = {"logps": "*fp32", "grad": f"*{name}", "logits": f"*{name}", "targets": "*i64",
                    "weights": "*fp32"}
        signature = {
            parameter.name: "constexpr" if parameter.name in constants
            else pointers.get(parameter.name, parameter.annotation_type)
            for parameter in response_logp_grad_kernel.params}
        found.append(Variant(
            response_logp_grad_kernel,
            f"response_logp_grad {name}{kind}{'' if wanted else ' no gradient'}", signature,
            constants, WARPS, aligned=("grad",) * wanted + ("logits",) * aligned))
    return found
