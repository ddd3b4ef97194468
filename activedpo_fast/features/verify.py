"""The self-check: captured per-sample gradients against autograd's, on two real responses.

Hooks rely on how a model passes tokens through its layers. A model that does it in another way (a
weight used without calling its layer, tokens reordered, samples that influence each other) would
give wrong rows without an error; this finds it before any row is handed out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from activedpo_fast.errors import UnsupportedParameterError
from activedpo_fast.features.batching import collate
from activedpo_fast.features.capture import capture, row_dtype, sample_gradients, undisturbed
from activedpo_fast.features.logprobs import response_logps
from activedpo_fast.features.parameters import TrainableLinear
from activedpo_fast.tokenization import TokenizedResponse

logger = logging.getLogger(__name__)

# Allowed error relative to a parameter's gradient norm: far above rounding (the batch and the
# single sequence are padded differently), far below what a misattributed token gives.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
_LOW_PRECISION_TOLERANCE = 0.25


def verify_capture(
    model: nn.Module,
    linears: Sequence[TrainableLinear],
    sequences: Sequence[TokenizedResponse],
    pad_token_id: int,
) -> None:
    """Compare a captured batch of two responses with one backward pass of autograd for each.

    Raises:
        UnsupportedParameterError: naming the first parameter whose gradients differ.
    """
    rows = _two_short_rows(sequences)
    captured = _captured_gradients(model, linears, sequences, rows, pad_token_id)
    tolerance = _tolerance(model)
    for index, row in enumerate(rows):
        expected = _autograd_gradients(model, linears, sequences, row, pad_token_id)
        total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
        for name, gradient in expected.items():
            block = captured.get(name)
            found = torch.zeros_like(gradient) if block is None else block[index]
            error = (found - gradient).norm()
            # A block that is all but zero is held to the size of the whole gradient.
            scale = torch.maximum(gradient.norm(), 1e-3 * total)
            # Written so that a NaN is refused too.
            if not bool(error <= tolerance * scale):
                raise UnsupportedParameterError(
                    f"self-check failed: the captured gradient of {name!r} differs from "
                    f"autograd's by {float(error / scale):.1e} of its norm (allowed "
                    f"{tolerance:.0e}); this model cannot be handled, leave the parameter out of "
                    "the adapter"
                )
    logger.debug("self-check: %d parameters agree with autograd", len(expected))


def _captured_gradients(
    model: nn.Module,
    linears: Sequence[TrainableLinear],
    sequences: Sequence[TokenizedResponse],
    rows: list[int],
    pad_token_id: int,
) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    batch = collate(sequences, rows, pad_token_id=pad_token_id).to(device)
    dtype = row_dtype(linears)
    captured: dict[str, torch.Tensor] = {}

    def consume(linear: TrainableLinear, h: torch.Tensor, g: torch.Tensor) -> None:
        for name, gradient in sample_gradients(linear, h.to(dtype), g.to(dtype)):
            captured[name] = captured[name] + gradient if name in captured else gradient

    shape = (batch.input_ids.shape[0], batch.input_ids.shape[1])
    with undisturbed(model), capture(linears, shape, consume):
        logps = response_logps(model, batch)
        if logps.requires_grad:
            logps.sum().backward()
    return captured


def _autograd_gradients(
    model: nn.Module,
    linears: Sequence[TrainableLinear],
    sequences: Sequence[TokenizedResponse],
    row: int,
    pad_token_id: int,
) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    batch = collate(sequences, [row], pad_token_id=pad_token_id).to(device)
    dtype = row_dtype(linears)
    parameters = {
        name: getattr(linear.module, attribute)
        for linear in linears
        for name, attribute in ((linear.weight, "weight"), (linear.bias, "bias"))
        if name is not None
    }
    with undisturbed(model):
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        logp = response_logps(model, batch).sum()
        gradients = torch.autograd.grad(logp, list(parameters.values()), allow_unused=True)
    return {
        name: (torch.zeros_like(parameter) if gradient is None else gradient).detach().to(dtype)
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }


def _two_short_rows(sequences: Sequence[TokenizedResponse]) -> list[int]:
    """Two short responses with something to score, of unequal length if there are such."""
    scored = [
        row
        for row, sequence in enumerate(sequences)
        if len(sequence.input_ids) > max(sequence.completion_start, 1)
    ]
    scored.sort(key=lambda row: len(sequences[row].input_ids))
    if len(scored) < 2:
        return scored
    first = scored[0]
    longer = [
        row for row in scored if len(sequences[row].input_ids) > len(sequences[first].input_ids)
    ]
    return [first, longer[0] if longer else scored[1]]


def _tolerance(model: nn.Module) -> float:
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes & {torch.bfloat16, torch.float16}:
        return _LOW_PRECISION_TOLERANCE
    return _TOLERANCE[torch.float32 if torch.float32 in dtypes else torch.float64]
