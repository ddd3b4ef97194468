"""The self-check: captured gradients against autograd's, on responses of the user's own.

Hooks and shared prompts rely on how a model passes tokens through its layers. A model that does it
in another way (a weight used without calling its layer, tokens reordered, samples that influence
each other, positions that are ignored) would give wrong rows without an error; this finds it before
any row is handed out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import nn

from activedpo_fast.errors import UnsupportedParameterError
from activedpo_fast.features.batching import Batch, collate, group_rows
from activedpo_fast.features.capture import Capture, row_dtype, sketch_into, undisturbed
from activedpo_fast.features.parameters import TrainableLinear
from activedpo_fast.features.passes import gradient_pass, logp_pass, whole_model_logps
from activedpo_fast.features.sketch import Sketch, SketchPlan
from activedpo_fast.tokenization import TokenizedPool, scored_tokens

logger = logging.getLogger(__name__)

# Allowed error relative to a parameter's gradient norm: far above rounding (the batch and the
# single sequence are padded differently), far below what a misattributed token gives.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
_LOW_PRECISION_TOLERANCE = 0.25


def choose_layout(
    model: nn.Module,
    linears: Sequence[TrainableLinear],
    tokenized: TokenizedPool,
    pad_token_id: int,
    precision: str | None,
) -> bool:
    """Whether responses can share their prompt's pass, found out on two prompts of the pool.

    A batch of two items, captured in the shared layout, is compared with one backward pass of
    autograd through the whole model for each response. If it differs, or the model cannot run it,
    the same is done without sharing.

    Raises:
        UnsupportedParameterError: naming the first parameter whose gradients differ even so.
    """
    rows = _rows_to_check(tokenized)
    if not rows:
        return True  # nothing is scored, so that every row is zero
    expected = {row: _autograd_gradients(model, linears, tokenized, row, pad_token_id, precision)
                for row in rows}
    try:
        _compare(model, linears, tokenized, rows, expected, pad_token_id, precision, shared=True)
    except Exception as error:  # whatever a model of another kind may raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
    else:
        return True
    _compare(model, linears, tokenized, rows, expected, pad_token_id, precision, shared=False)
    logger.warning("%s cannot continue a prompt that was run once; every response runs with its "
                   "prompt, which is slower (%s)", type(model).__name__, reason)
    return False


def shared_logps_agree(
    model: nn.Module, tokenized: TokenizedPool, pad_token_id: int, precision: str | None
) -> bool:
    """Whether log-probs in the shared layout are those of whole sequences, on two prompts."""
    rows = _rows_to_check(tokenized)
    if not rows:
        return True
    logps = {}
    for shared in (True, False):
        batch = _batch(model, tokenized, rows, pad_token_id, shared)
        with undisturbed(model, precision):
            try:
                logps[shared] = logp_pass(model, batch, shared=shared)
            except Exception:
                if not shared:
                    raise
                return False
    error = (logps[True] - logps[False]).norm() / logps[False].norm()
    return bool(error <= _tolerance(model, precision))


def _compare(
    model: nn.Module,
    linears: Sequence[TrainableLinear],
    tokenized: TokenizedPool,
    rows: list[int],
    expected: dict[int, dict[str, torch.Tensor]],
    pad_token_id: int,
    precision: str | None,
    *,
    shared: bool,
) -> None:
    batch = _batch(model, tokenized, rows, pad_token_id, shared)
    shapes = [shape for linear in linears for shape in linear.shapes()]
    plan = SketchPlan(Sketch("none"), shapes)
    captured = torch.zeros(
        len(rows), plan.dim, dtype=row_dtype(linears), device=batch.input_ids.device)
    with undisturbed(model, precision), Capture(linears, sketch_into(plan, captured)) as capture:
        gradient_pass(model, batch, capture, shared=shared, relative=False)
    tolerance = _tolerance(model, precision)
    for row, found in zip(batch.rows.tolist(), captured, strict=True):
        parts = found.split([math.prod(shape) for _, shape in shapes])
        captured_of = {name: part.view(shape)
                       for (name, shape), part in zip(shapes, parts, strict=True)}
        total = torch.stack([gradient.norm() for gradient in expected[row].values()]).norm()
        for name, gradient in expected[row].items():
            error = (captured_of[name] - gradient).norm()
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
    logger.debug("self-check: %d parameters agree with autograd", len(shapes))


def _batch(
    model: nn.Module, tokenized: TokenizedPool, rows: list[int], pad_token_id: int, shared: bool
) -> Batch:
    groups = group_rows(tokenized, rows, share=shared)
    batch = collate(tokenized.sequences, groups, pad_token_id=pad_token_id)
    return batch.to(next(model.parameters()).device)


def _autograd_gradients(
    model: nn.Module,
    linears: Sequence[TrainableLinear],
    tokenized: TokenizedPool,
    row: int,
    pad_token_id: int,
    precision: str | None,
) -> dict[str, torch.Tensor]:
    batch = _batch(model, tokenized, [row], pad_token_id, False)
    dtype = row_dtype(linears)
    parameters = {
        name: getattr(linear.module, attribute)
        for linear in linears
        for name, attribute in ((linear.weight, "weight"), (linear.bias, "bias"))
        if name is not None
    }
    with undisturbed(model, precision):
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        logp = whole_model_logps(model, batch)
        gradients = torch.autograd.grad(logp, list(parameters.values()), allow_unused=True)
    return {
        name: (torch.zeros_like(parameter) if gradient is None else gradient).detach().to(dtype)
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }


def _rows_to_check(tokenized: TokenizedPool) -> list[int]:
    """Two responses each of the shortest and of a middling item with something to score."""
    by_item: dict[int, list[int]] = {}
    for row, sequence in enumerate(tokenized.sequences):
        if scored_tokens(sequence):
            by_item.setdefault(tokenized.item_of(row), []).append(row)
    items = [rows[:2] for rows in by_item.values()]
    # Items with several responses first: only they can tell whether a prompt can be shared.
    items.sort(key=lambda rows: (-len(rows), len(tokenized.sequences[rows[0]].input_ids)))
    alike = [rows for rows in items if len(rows) == len(items[0])]
    chosen = [alike[0], alike[len(alike) // 2]] if len(alike) > 1 else items[:2]
    return [row for rows in chosen for row in rows]


def _tolerance(model: nn.Module, precision: str | None) -> float:
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if precision is not None or dtypes & {torch.bfloat16, torch.float16}:
        return _LOW_PRECISION_TOLERANCE
    return _TOLERANCE[torch.float32 if torch.float32 in dtypes else torch.float64]
