"""The self-check: compare captured gradients with autograd's on the user's own responses.

Hooks, shared prompts and batches rely on how a model passes tokens through its layers. A model that
works differently (a weight used without calling its layer, reordered tokens, samples that influence
each other, positions that are ignored or depend on the longest of the batch) would give wrong rows
without an error. The self-check detects this before any row is returned. The responses are those of
a short, a medium-length and the longest prompt, in one batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from activedpo_fast.errors import ActiveDPOError, UnsupportedParameterError
from activedpo_fast.gradients.batches import SAME_NUMBERS, Batch, Layout, collate, group_rows
from activedpo_fast.gradients.check_plan import CheckPlan
from activedpo_fast.gradients.finite import finite_rows
from activedpo_fast.gradients.passes import hidden_pass, logp_pass
from activedpo_fast.gradients.rounding import disturbed, rounds_its_activations
from activedpo_fast.gradients.rows import autograd_gradients, captured_rows
from activedpo_fast.gradients.running import BatchResult, RunBatch, run_batches
from activedpo_fast.gradients.token_budget import TokenBudget, is_out_of_memory
from activedpo_fast.gradients.trainable import TrainableParameters
from activedpo_fast.models.positions import length_class
from activedpo_fast.models.undisturbed import undisturbed
from activedpo_fast.pool.tokens import TokenizedPool, scored_tokens

logger = logging.getLogger(__name__)


class _Tolerance(NamedTuple):
    """Allowed errors: far above rounding (the batch and the single sequence are padded
    differently), far below the effect of a misattributed token.

    gradient: of a parameter, relative to its norm; also used for hidden states.
    logp: of log π(y|x), a sum that rounding changes less.
    """

    gradient: float
    logp: float


# Eager attention computes its softmax in float32 even in a float64 model.
_TOLERANCE = {torch.float64: _Tolerance(1e-5, 1e-6), torch.float32: _Tolerance(1e-3, 3e-5)}
_LOW_PRECISION_TOLERANCE = _Tolerance(0.25, 0.05)

# In half precision, rounding may be as large as errors from shared prompts, so it is measured. A
# whole row may be off by this multiple of its error in a batch of whole sequences, or by the second
# number. A model that rounds its activations further than its weights' dtype may be off by this
# multiple of what that does, or by what its dtype allows.
_TIMES_ROUNDING, _LEAST_ROUNDING = 3.0, 0.03

_SLOWER = {
    Layout.WHOLE: "%s cannot continue a prompt that was run once; every response runs with its "
    "prompt, which is slower (%s)",
    Layout.ALONE: "%s treats a response in a batch differently than alone; every response runs "
    "alone, which is slower (%s)",
}


def gradient_layout(
    model: nn.Module,
    trained: TrainableParameters,
    tokenized: TokenizedPool,
    pad_token_id: int,
    precision: str | None,
    *,
    fastest: Layout = Layout.SHARED,
) -> Layout:
    """Return the fastest layout in which captured gradients are correct on a few responses.

    None that is faster than `fastest` is tried.

    A batch of three items, captured in a layout, is compared with one autograd backward pass
    through the whole model for each response alone. If it differs, or the model cannot run it, the
    next layout is tried.

    Raises:
        UnsupportedParameterError: naming the first parameter whose gradients differ in any layout,
            or cannot be captured.
    """
    plan = CheckPlan(trained.shapes)
    expected = _autograd_rows(model, trained, plan, tokenized, pad_token_id, precision)
    if not expected:
        return Layout.SHARED  # nothing is scored, so that every row is zero
    shapes = plan.blocks
    run_batch = _captured_gradient_pass(model, trained, plan, precision)
    tolerance = _tolerance(model, precision)
    coarse = tolerance == _LOW_PRECISION_TOLERANCE
    if not coarse and rounds_its_activations(
        model, _alone(model, tokenized, next(iter(expected)), pad_token_id)
    ):
        coarse = True
        with disturbed(model):
            again = _autograd_rows(model, trained, plan, tokenized, pad_token_id, precision)
        off = max(error for row in again for _, error in _errors(again[row], expected[row]))
        most = _LOW_PRECISION_TOLERANCE.gradient
        tolerance = tolerance._replace(gradient=_allowed(off, tolerance.gradient, most))

    def largest_error(layout: Layout) -> float:
        """Return the largest error of a row, relative to its norm; raise if a parameter fails."""
        errors = [0.0]
        for rows, captured in _run(
            model, tokenized, list(expected), run_batch, layout, pad_token_id
        ):
            for row, found in zip(rows.tolist(), captured, strict=True):
                _compare(found, expected[row], shapes, tolerance.gradient)
                whole = torch.cat([gradient.flatten() for gradient in expected[row].values()])
                errors.append(float((found - whole).norm() / whole.norm().clamp(min=1e-30)))
        return max(errors)

    def compare(layout: Layout) -> None:
        found = largest_error(layout)
        if layout is Layout.SHARED and coarse:
            rounding = largest_error(Layout.WHOLE)
            if found > max(_TIMES_ROUNDING * rounding, _LEAST_ROUNDING):
                raise UnsupportedParameterError(
                    f"self-check failed: gradients are off by {found:.1e} of their norm, by "
                    f"{rounding:.1e} where every response runs with its prompt"
                )
        logger.debug("self-check: %d parameters agree with autograd", len(shapes))

    return _first_that_agrees(model, compare, fastest)


def _captured_gradient_pass(
    model: nn.Module, trained: TrainableParameters, plan: CheckPlan, precision: str | None
) -> RunBatch:
    """Return a function that gives (rows, captured gradients [n, plan.dim]) of a batch."""

    def run(batch: Batch, shared: bool) -> BatchResult:
        _, rows = captured_rows(model, trained, plan, batch, precision=precision, shared=shared)
        return batch.rows, rows

    return run


def forward_layout(
    model: nn.Module, tokenized: TokenizedPool, pad_token_id: int, precision: str | None
) -> Layout:
    """Return the fastest layout whose log-probs and hidden states match each response alone."""
    rows = _rows_to_check(tokenized)
    if not rows:
        return Layout.SHARED

    def run(batch: Batch, shared: bool) -> BatchResult:
        with undisturbed(model, precision):
            logps = logp_pass(model, batch, shared=shared).double()
            return batch.rows, logps, hidden_pass(model, batch, shared=shared).double()

    def results(layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        parts = list(_run(model, tokenized, rows, run, layout, pad_token_id))
        order = torch.cat([part[0] for part in parts]).argsort()
        logps, hidden = (torch.cat([part[n].cpu() for part in parts])[order] for n in (1, 2))
        return logps, hidden

    alone, hidden_alone = results(Layout.ALONE)

    def errors(layout: Layout) -> tuple[float, float]:
        """Return the largest errors of hidden states and log-probs; NaN if one is."""
        logps, hidden = results(layout)
        # A response with log π near 0 is measured against the size of the others.
        of_logps = (logps - alone).abs() / alone.abs().maximum(alone.abs().mean())
        of_hidden = (hidden - hidden_alone).norm(dim=1) / hidden_alone.norm(dim=1)
        return float(of_hidden.max()), float(of_logps.max())

    tolerance = _tolerance(model, precision)
    if tolerance != _LOW_PRECISION_TOLERANCE and rounds_its_activations(
        model, _alone(model, tokenized, rows[0], pad_token_id)
    ):
        with disturbed(model):
            off = errors(Layout.ALONE)
        tolerance = _Tolerance(*map(_allowed, off, tolerance, _LOW_PRECISION_TOLERANCE))

    def compare(layout: Layout) -> None:
        if layout is Layout.ALONE:
            return
        for name, error, allowed in zip(
            ("hidden state", "log-prob"), errors(layout), tolerance, strict=True
        ):
            # Written so that NaN does not pass.
            if not error <= allowed:
                raise ActiveDPOError(f"its {name} differs by {error:.1e}")

    return _first_that_agrees(model, compare)


def _first_that_agrees(
    model: nn.Module, compare: Callable[[Layout], None], fastest: Layout = Layout.SHARED
) -> Layout:
    """Return the first layout, from `fastest` on, for which `compare` does not raise."""
    reason = ""
    for layout in SAME_NUMBERS[SAME_NUMBERS.index(fastest) :]:
        try:
            compare(layout)
        except Exception as error:  # other kinds of models may raise anything
            # Running alone can only fix differences; any other error is the model's own.
            if layout is Layout.ALONE or (
                layout is Layout.WHOLE and not isinstance(error, ActiveDPOError)
            ):
                raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
        else:
            if layout in _SLOWER and layout is not fastest:
                logger.warning(_SLOWER[layout], type(model).__name__, reason)
            return layout
    raise AssertionError("the last layout returns or raises")


def _run(
    model: nn.Module,
    tokenized: TokenizedPool,
    rows: Sequence[int],
    run_batch: RunBatch,
    layout: Layout,
    pad_token_id: int,
) -> Iterator[BatchResult]:
    """Run all in one batch, as far as the layout, the model's length classes and memory allow.

    What is not finite there runs again alone in this layout, as when rows are computed.
    """

    def run(rows: Sequence[int]) -> Iterator[BatchResult]:
        return run_batches(
            tokenized,
            rows,
            run_batch,
            layout,
            TokenBudget(1 << 30, next(model.parameters()).device),
            length_class=length_class(model),
            pad_token_id=pad_token_id,
        )

    for result in run(rows):
        finite = finite_rows(result)
        if finite.any():
            yield tuple(part[finite.to(part.device)] for part in result)
        for row in result[0][~finite.to(result[0].device)].tolist():
            yield from run([row])


def _compare(
    found: torch.Tensor,
    expected: dict[str, torch.Tensor],
    shapes: Sequence[tuple[str, torch.Size]],
    tolerance: float,
) -> None:
    """Raise `UnsupportedParameterError` unless a captured row [D] matches autograd's."""
    parts = found.split([math.prod(shape) for _, shape in shapes])
    captured = {name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)}
    for name, error in _errors(captured, expected):
        # Written so that NaN is refused, too.
        if not error <= tolerance:
            raise UnsupportedParameterError(
                f"self-check failed: the captured gradient of {name!r} differs from autograd's by "
                f"{error:.1e} of its norm (allowed {tolerance:.0e})"
            )


def _errors(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> Iterator[tuple[str, float]]:
    """Yield the parameters of a row with the errors of their gradients, relative to the norm."""
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm()
        # A block that is almost zero is measured against the size of the whole gradient.
        scale = torch.maximum(gradient.norm(), 1e-3 * total)
        yield name, float(error / scale) if error != 0 else 0.0


def _autograd_rows(
    model: nn.Module,
    trained: TrainableParameters,
    plan: CheckPlan,
    tokenized: TokenizedPool,
    pad_token_id: int,
    precision: str | None,
) -> dict[int, dict[str, torch.Tensor]]:
    """Return autograd's gradients of the responses to check, in the blocks of `plan`, as far as
    memory allows."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for row in _rows_to_check(tokenized):
        try:
            found[row] = plan.of(
                _autograd_gradients(model, trained, tokenized, row, pad_token_id, precision),
                next(model.parameters()).device,  # of captured rows
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not found:
                raise
            logger.warning(
                "self-check: not enough memory for autograd on %d tokens; only shorter responses "
                "are checked",
                len(tokenized.sequences[row].input_ids),
            )
            return found
    return found


def _autograd_gradients(
    model: nn.Module,
    trained: TrainableParameters,
    tokenized: TokenizedPool,
    row: int,
    pad_token_id: int,
    precision: str | None,
) -> dict[str, torch.Tensor]:
    batch = _alone(model, tokenized, row, pad_token_id)
    _, gradients = autograd_gradients(model, trained.by_name, batch, precision)
    return {
        name: gradients[name] if name in gradients else torch.zeros_like(parameter)
        for name, parameter in trained.by_name.items()
    }


def _alone(model: nn.Module, tokenized: TokenizedPool, row: int, pad_token_id: int) -> Batch:
    groups = group_rows(tokenized, [row], Layout.ALONE)
    batch = collate(tokenized, groups, pad_token_id=pad_token_id)
    return batch.to(next(model.parameters()).device)


def _rows_to_check(tokenized: TokenizedPool) -> list[int]:
    """Return two responses each of the shortest, a medium-length and the longest item with
    something to score, the shortest first."""
    by_item: dict[int, list[int]] = {}
    for row, sequence in enumerate(tokenized.sequences):
        if scored_tokens(sequence):
            by_item.setdefault(tokenized.item_of(row), []).append(row)
    # The longest response of each item, and another one.
    items = [
        sorted(rows, key=lambda row: -len(tokenized.sequences[row].input_ids))[:2]
        for rows in by_item.values()
    ]
    # Items with several responses first: only they show whether a prompt can be shared.
    items.sort(key=lambda rows: (-len(rows), len(tokenized.sequences[rows[0]].input_ids)))
    if not items:
        return []
    alike = [rows for rows in items if len(rows) == len(items[0])]
    longest = max(items, key=lambda rows: len(tokenized.sequences[rows[0]].input_ids))
    chosen: list[list[int]] = []
    for rows in (alike[0], alike[len(alike) // 2], longest, *items[1:2]):
        if rows not in chosen and len(chosen) < 3:
            chosen.append(rows)
    return [row for rows in chosen for row in rows]


def _allowed(off: float, by_dtype: float, in_half: float) -> float:
    """Return the error to allow where the model's rounding alone makes one of `off`."""
    return min(max(by_dtype, _TIMES_ROUNDING * off), in_half)


def _tolerance(model: nn.Module, precision: str | None) -> _Tolerance:
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if precision is not None or dtypes & {torch.bfloat16, torch.float16}:
        return _LOW_PRECISION_TOLERANCE
    return _TOLERANCE[torch.float32 if torch.float32 in dtypes else torch.float64]
