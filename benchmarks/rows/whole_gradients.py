"""Peers' gradients of log π(y|x), whole, a batch of responses at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from activedpo_fast.pool.tokens import TokenizedPool
from benchmarks.rows.batches import (
    collate,
    dimension,
    log_likelihood,
    plan_batches,
    private_copy,
    rows_at_once,
    trainable,
)

Gradients = Callable[[], Iterator[tuple[list[int], Tensor]]]  # (rows, float32 [len(rows), D])


def loop_gradients(model: nn.Module, tokenized: TokenizedPool) -> Gradients:
    """One forward and backward pass per response: the obvious implementation."""
    parameters = list(trainable(model).values())
    dim = dimension(model)

    def gradients() -> Iterator[tuple[list[int], Tensor]]:
        for begin in range(0, len(tokenized.sequences), rows_at_once(dim)):
            end = min(begin + rows_at_once(dim), len(tokenized.sequences))
            block = torch.empty(end - begin, dim)
            for row in range(begin, end):
                ids, labels = collate(tokenized, [row])
                logp = log_likelihood(model(input_ids=ids, use_cache=False).logits, labels)
                parts = torch.autograd.grad(logp, parameters)
                torch.cat([part.flatten() for part in parts], out=block[row - begin])
            yield list(range(begin, end)), block

    return gradients


def vmap_gradients(model: nn.Module, tokenized: TokenizedPool) -> Gradients:
    """torch.func: vmap over the gradient of one response's log-likelihood.

    A batch is within TOKENS_A_BATCH already, so vmap's own chunk_size has nothing to cut. Attention
    is "eager": vmap has no rule for the CPU's fused attention, and would process its rows one by
    one.
    """
    from torch.func import functional_call, grad, vmap

    copied = private_copy(model)
    copied.set_attn_implementation("eager")
    parameters = {name: p.detach() for name, p in trainable(model).items()}
    dim = dimension(model)

    def logp(parameters: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
        inputs = {"input_ids": ids[None], "use_cache": False}
        return log_likelihood(functional_call(copied, parameters, (), inputs).logits, labels[None])

    per_response = vmap(grad(logp), in_dims=(None, 0, 0))

    def gradients() -> Iterator[tuple[list[int], Tensor]]:
        for rows in plan_batches(tokenized, dim):
            found = per_response(parameters, *collate(tokenized, rows))
            yield rows, torch.cat([found[name].flatten(1) for name in parameters], dim=1)

    return gradients


def opacus_gradients(model: nn.Module, tokenized: TokenizedPool) -> Gradients:
    """Opacus' `GradSampleModule`, whose backward pass leaves a `grad_sample` at each parameter."""
    from opacus import GradSampleModule

    copied = private_copy(model)
    # Its hooks record only modules in training mode; all other modules stay without dropout.
    for module in copied.modules():
        module.training = isinstance(module, nn.Linear)
    sampled = GradSampleModule(copied, loss_reduction="sum")
    dim = dimension(model)

    def gradients() -> Iterator[tuple[list[int], Tensor]]:
        for rows in plan_batches(tokenized, dim):
            ids, labels = collate(tokenized, rows)
            log_likelihood(sampled(input_ids=ids, use_cache=False).logits, labels).backward()
            found = [vars(p)["grad_sample"].flatten(1) for p in trainable(copied).values()]
            yield rows, torch.cat(found, dim=1)
            sampled.zero_grad(set_to_none=True)

    return gradients
