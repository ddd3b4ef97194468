"""`FeatureExtractor`: gradient rows, log-probs and hidden states of tokenized responses."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from activedpo_fast._modes import in_own_modes
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.batches import Batch, Layout, group_rows
from activedpo_fast.gradients.hooks import Capture, row_dtype
from activedpo_fast.gradients.lm_head import causal_lm
from activedpo_fast.gradients.passes import divisors, gradient_pass, hidden_pass, logp_pass
from activedpo_fast.gradients.running import Take, Taken, run_batches
from activedpo_fast.gradients.self_check import forward_layout, gradient_layout
from activedpo_fast.gradients.sketch import Sketch, SketchPlan
from activedpo_fast.gradients.sketching import sketch_into
from activedpo_fast.gradients.supported import require_supported
from activedpo_fast.gradients.token_budget import TokenBudget
from activedpo_fast.gradients.trainable import trainable_linears
from activedpo_fast.models.fingerprints import fingerprint_weights
from activedpo_fast.models.named import GivenModel, as_model_alone
from activedpo_fast.models.positions import LengthClass, batch_changes_attention, length_class
from activedpo_fast.models.undisturbed import undisturbed
from activedpo_fast.pool.tokens import TokenizedPool, completion_tokens

logger = logging.getLogger(__name__)

PRECISIONS = (None, "bf16")


@dataclass(frozen=True)
class GradientRows:
    """The result of one pass over some responses.

    Attributes:
        rows: int64 [n], indices of the responses in the tokenized pool.
        gradients: [n, k], β ∇θ log π(y|x), sketched; float32 (float64 for a float64 model). If
            relative, minus the row of the item's first response, whose own row is then zero.
        logps: float64 [n], log π(y|x).

    With `length_normalized`, both use log π(y|x) / |y|.
    """

    rows: torch.Tensor
    gradients: torch.Tensor
    logps: torch.Tensor


class FeatureExtractor:
    """Compute per-response features of one model at its current weights.

    The model is restored afterward, also after an exception: train or eval mode, `requires_grad`
    flags, hooks, `forward` and `.grad`. Features are computed in eval mode, without dropout, in the
    model's own precision: autocast, inference mode and no_grad around a call change nothing, nor
    does the autocast that a trainer with bf16=True puts around the model's `forward`.

    Args:
        model: a transformers causal LM, or a PEFT model around one, or the name of either as in
            `ActiveDPOSelector`. The gradient is computed for every parameter that requires one (of
            the active adapter).
        sketch: the random projection of the gradients; its `dim` is k.
        beta: β of the implicit reward r = β log(π/π_ref); the rows are multiplied by it.
        length_normalized: use log π(y|x) / |y| instead of log π(y|x), in rows and log-probs, as
            losses of mean log-probs do (TRL's "ipo" and "sigmoid_norm"; |y| as in
            `completion_tokens`).
        pad_token_id: fills padded positions; it never influences a result.
        max_tokens_per_batch: padded tokens in one forward and backward pass; None picks a number
            that fits the model and the memory (see `TokenBudget`). Halved, with a warning, when
            memory runs out.
        precision: "bf16" computes matrix products in bfloat16 (autocast; the weights are not
            converted), on CPUs and GPUs that support it; None uses the model's own dtype.
        verify: before the first batch, compare the captured per-sample gradients of a few responses
            with autograd's, refuse a model for which they differ, and determine how responses can
            be batched (see `Layout`). Without it prompts are never shared, which is slower.

        skip_non_finite: give a response for which the model's numbers are not finite a row of zeros
            and the log-prob NaN, and log a warning that names it, instead of raising.

    Raises:
        UnsupportedParameterError, ActiveDPOError: see `require_supported`, which checks the kind
            of model even without `verify`, `trainable_linears` and `gradient_layout`; an option out
            of range; bf16 on a CPU that does not support it.

    Every number is that of the response run alone in a freshly loaded model: responses that the
    model would treat differently together than alone are not batched together.

    Source: the gradient of the implicit reward as the feature of a response is ActiveDPO's, Lin et
    al., arXiv 2505.19241.

    Examples:
        >>> from activedpo_fast import FeatureExtractor, Sketch
        >>> tokens = selector.tokenize(pool)
        >>> rows = FeatureExtractor(model, Sketch("sjlt", 1024), beta=0.1).gradients(tokens)
        >>> rows.gradients.shape, rows.gradients.dtype
        (torch.Size([10, 1024]), torch.float32)
        >>> bool((rows.logps < 0).all())
        True
    """

    def __init__(
        self,
        model: GivenModel,
        sketch: Sketch,
        *,
        beta: float = 0.1,
        length_normalized: bool = False,
        pad_token_id: int = 0,
        max_tokens_per_batch: int | None = None,
        precision: str | None = None,
        verify: bool = True,
        skip_non_finite: bool = False,
    ) -> None:
        if not (_is_number(beta) and 0 < beta < math.inf):
            raise ActiveDPOError(f"beta must be a positive, finite number, not {beta!r}")
        if max_tokens_per_batch is not None and not _is_count(max_tokens_per_batch):
            raise ActiveDPOError(
                f"max_tokens_per_batch must be an integer from 1, not {max_tokens_per_batch!r}"
            )
        if not isinstance(length_normalized, bool):
            raise ActiveDPOError(
                f"length_normalized must be True or False, not {length_normalized!r}"
            )
        self.model = as_model_alone(model)
        require_supported(self.model, pad_token_id=pad_token_id)
        _check_precision(precision, self.model)
        self.sketch = sketch
        self.beta = beta
        self.length_normalized = length_normalized
        self.pad_token_id = pad_token_id
        self.max_tokens_per_batch = max_tokens_per_batch
        self.precision = precision
        self._verify = verify
        self.skip_non_finite = skip_non_finite
        # How responses are batched, once known, and the longest response it was determined with:
        # for gradients by whether the pool had prompts to share, otherwise by model.
        self._gradient_layout: dict[bool, tuple[Layout, int]] = {}
        self._forward_layout: WeakKeyDictionary[nn.Module, tuple[Layout, int]] = WeakKeyDictionary()
        self._said_lengths: WeakSet[nn.Module] = WeakSet()

    @in_own_modes
    def gradients(
        self, tokenized: TokenizedPool, *, relative: bool = False, show_progress: bool | None = None
    ) -> GradientRows:
        """Return the gradient rows of all R responses, in pool order.

        Args:
            relative: rows minus the row of the item's first response. Differences of an item's rows
                do not change, and neither do pair features φ without normalization or with "pair".
                Each prompt takes one backward pass less.

        Raises:
            ActiveDPOError: no responses; not enough memory for a single item; a row that is not
                finite, even when its response runs alone; with `relative`, an item with only one
                response.
        """
        count = len(tokenized.sequences)
        if count == 0:
            raise ActiveDPOError("there is no response to take gradients of")
        logps = torch.empty(count, dtype=torch.float64)
        gradients: torch.Tensor | None = None
        absolute = torch.ones(count, dtype=torch.bool)
        for (rows, taken, taken_logps), is_relative in self._gradient_parts(
            tokenized, range(count), relative, show_progress
        ):
            if gradients is None:
                gradients = taken.new_empty(count, taken.shape[1])
            gradients[rows], logps[rows], absolute[rows] = taken, taken_logps, not is_relative
        assert gradients is not None
        if relative:
            _subtract_first(gradients, tokenized, absolute)
        return GradientRows(torch.arange(count), gradients, logps)

    @in_own_modes
    def iter_gradients(
        self,
        tokenized: TokenizedPool,
        rows: Sequence[int],
        *,
        max_tokens_per_batch: int | None = None,
        show_progress: bool | None = None,
    ) -> Iterator[GradientRows]:
        """Yield the given gradient `rows` batch by batch, longest sequences first.

        Batches are planned of the whole pool, so that a row has the same bits whichever others are
        asked for, as long as memory suffices for `max_tokens_per_batch` (see `tokens_per_batch`;
        default: the extractor's).
        """
        wanted = torch.zeros(len(tokenized.sequences), dtype=torch.bool)
        wanted[list(rows)] = True
        for taken, _ in self._gradient_parts(
            tokenized, rows, False, show_progress, max_tokens_per_batch, whole_pool=True
        ):
            asked = wanted[taken[0]]
            yield GradientRows(*(part[asked] for part in taken))

    @in_own_modes
    def tokens_per_batch(self, tokenized: TokenizedPool) -> int:
        """Return `max_tokens_per_batch`, or what a first batch shows to be suitable for it."""
        if self.max_tokens_per_batch is not None:
            return self.max_tokens_per_batch
        budget = TokenBudget(None, next(self.model.parameters()).device)
        next(
            self._gradient_parts(
                tokenized, range(len(tokenized.sequences)), False, False, budget=budget
            )
        )
        return budget.tokens

    def identity(self) -> dict[str, Any]:
        """Return JSON values that gradient rows depend on, except for the responses."""
        return {
            "sketch": self.sketch.method,
            "proj_dim": self.sketch.dim,
            "sketch_seed": self.sketch.seed,
            "beta": self.beta,
            "length_normalized": self.length_normalized,
            "precision": self.precision,
            "weights": fingerprint_weights(self.model.named_parameters()),
        }

    def _gradient_parts(
        self,
        tokenized: TokenizedPool,
        rows: Sequence[int],
        relative: bool,
        show_progress: bool | None,
        max_tokens: int | None = None,
        *,
        whole_pool: bool = False,
        budget: TokenBudget | None = None,
    ) -> Iterator[tuple[Taken, bool]]:
        """Yield (rows, gradients, logps) by batch, and whether the rows are relative (not all)."""
        self._require_supported(tokenized, gradients=True)
        linears = trainable_linears(self.model)
        plan = SketchPlan(self.sketch, [shape for linear in linears for shape in linear.shapes()])
        dtype = row_dtype(linears)

        def taking(relative: bool) -> Take:
            def take(batch: Batch, shared: bool) -> Taken:
                # Sum over layers in float64, round once.
                sketched = torch.zeros(
                    len(batch.rows), plan.dim, dtype=torch.float64, device=batch.input_ids.device
                )
                lengths = self.lengths(tokenized, batch.rows.tolist())
                with (
                    undisturbed(self.model, self.precision),
                    sketch_into(plan, sketched) as consume,
                    Capture(linears, consume) as capture,
                ):
                    logps = gradient_pass(
                        self.model,
                        batch,
                        capture,
                        shared=shared,
                        relative=relative,
                        lengths=lengths,
                    )
                if lengths is not None:
                    logps = logps / lengths.to(logps.device)
                    sketched /= divisors(batch, lengths, relative).to(sketched.device)[:, None]
                # β last: multiplying the objective would lose bits of small gradients in bf16.
                gradients = sketched.mul_(self.beta).to(dtype).cpu()
                return batch.rows, gradients, logps.double().cpu()

            return take

        groups = group_rows(tokenized, rows, Layout.WHOLE)
        if relative and any(len(group.rows) == 1 for group in groups):
            raise ActiveDPOError("relative rows need two or more responses of every item")
        layout = self.check(tokenized)
        # Rows are relative to each other if they can be in one batch.
        batched = group_rows(tokenized, rows, layout, length_class(self.model))
        relative = relative and len(batched) == len(groups)
        for taken in self._run(
            tokenized,
            rows,
            taking(relative),
            self.model,
            layout,
            "gradient features",
            show_progress,
            whole_items=relative,
            budget=budget or self._budget(self.model, max_tokens),
            planned=range(len(tokenized.sequences)) if whole_pool else None,
        ):
            finite = _finite(taken)
            if relative and not finite.all():
                items = [tokenized.item_of(row) for row in taken[0].tolist()]
                spoiled = {
                    item for item, good in zip(items, finite.tolist(), strict=True) if not good
                }
                finite = torch.tensor([item not in spoiled for item in items])
            yield tuple(part[finite] for part in taken), relative
            for alone in self._alone(
                tokenized, taken[0][~finite], taking(False), self.model, skip=self.skip_non_finite
            ):
                yield alone, False

    @in_own_modes
    def check(self, tokenized: TokenizedPool) -> Layout:
        """Return how responses are batched; run the self-check if this is not known yet.

        The check is repeated for a pool with a response longer than all before, because models
        differ in how they treat long responses.

        Raises:
            UnsupportedParameterError: captured gradients differ from autograd's.
            ActiveDPOError: an unsupported model or tokens (see `require_supported`).
        """
        self._require_supported(tokenized, gradients=True)
        least = _fastest_allowed(self.model)
        if not self._verify:
            return Layout.slowest(Layout.WHOLE, least)
        rows = range(len(tokenized.sequences))
        has_prompts = any(group.shared for group in group_rows(tokenized, rows, Layout.SHARED))
        longest = _longest(tokenized)
        layout, checked = self._gradient_layout.get(has_prompts, (Layout.SHARED, 0))
        if longest > checked:
            layout = gradient_layout(
                self.model,
                trainable_linears(self.model),
                tokenized,
                self.pad_token_id,
                self.precision,
            )
            self._gradient_layout[has_prompts] = layout, longest
        # The finding of either check also holds for the other.
        forward, _ = self._forward_layout.get(self.model, (layout, 0))
        return Layout.slowest(layout, forward, least)

    @in_own_modes
    def logps(
        self,
        tokenized: TokenizedPool,
        *,
        model: PreTrainedModel | PeftModel | None = None,
        show_progress: bool | None = None,
    ) -> torch.Tensor:
        """Return log π(y|x), float64 [R], in pool order, under `model` (π_ref) if given.

        With `length_normalized`, log π(y|x) / |y|.
        """
        scored_by = model if model is not None else self.model
        self._require_supported(tokenized, scored_by)
        result = torch.empty(len(tokenized.sequences), dtype=torch.float64)

        def take(batch: Batch, shared: bool) -> Taken:
            with undisturbed(scored_by, self.precision):
                return batch.rows, logp_pass(scored_by, batch, shared=shared).double().cpu()

        for rows, logps in self._forward(tokenized, take, scored_by, "log-probs", show_progress):
            result[rows] = logps
        lengths = self.lengths(tokenized)
        return result if lengths is None else result / lengths

    def lengths(
        self, tokenized: TokenizedPool, rows: Sequence[int] | None = None
    ) -> torch.Tensor | None:
        """Return |y| of the responses `rows` (default: all), int64 [n]; None without
        `length_normalized`."""
        if not self.length_normalized:
            return None
        of = tokenized.sequences if rows is None else [tokenized.sequences[row] for row in rows]
        return torch.tensor([completion_tokens(sequence) for sequence in of], dtype=torch.int64)

    @in_own_modes
    def hidden(
        self, tokenized: TokenizedPool, *, show_progress: bool | None = None
    ) -> torch.Tensor:
        """Return the last layer's hidden state at the last response token, float32 [R, h]."""
        self._require_supported(tokenized)

        def take(batch: Batch, shared: bool) -> Taken:
            with undisturbed(self.model, self.precision):
                return batch.rows, hidden_pass(self.model, batch, shared=shared).float().cpu()

        taken = list(self._forward(tokenized, take, self.model, "hidden states", show_progress))
        rows = torch.cat([rows for rows, _ in taken])
        return torch.cat([hidden for _, hidden in taken])[rows.argsort()]

    def _require_supported(
        self, tokenized: TokenizedPool, model: nn.Module | None = None, *, gradients: bool = False
    ) -> None:
        require_supported(
            self.model if model is None else model,
            tokenized,
            pad_token_id=self.pad_token_id,
            gradients=gradients,
        )

    def _forward(
        self,
        tokenized: TokenizedPool,
        take: Take,
        model: nn.Module,
        title: str,
        show_progress: bool | None,
    ) -> Iterator[Taken]:
        """Run `take` on all responses; all results are finite."""
        layout = Layout.WHOLE
        if self._verify:
            layout, checked = self._forward_layout.get(model, (layout, 0))
            longest = _longest(tokenized)
            if longest > checked:
                layout = forward_layout(model, tokenized, self.pad_token_id, self.precision)
                self._forward_layout[model] = layout, longest
            if model is self.model:
                layout = Layout.slowest(
                    layout, *(found for found, _ in self._gradient_layout.values())
                )
        layout = Layout.slowest(layout, _fastest_allowed(model))
        rows = range(len(tokenized.sequences))
        for taken in self._run(tokenized, rows, take, model, layout, title, show_progress):
            finite = _finite(taken)
            yield tuple(part[finite] for part in taken)
            yield from self._alone(tokenized, taken[0][~finite], take, model)

    def _run(
        self,
        tokenized: TokenizedPool,
        rows: Sequence[int],
        take: Take,
        model: nn.Module,
        layout: Layout,
        title: str,
        show_progress: bool | None,
        whole_items: bool = False,
        budget: TokenBudget | None = None,
        planned: Sequence[int] | None = None,
    ) -> Iterator[Taken]:
        classify = length_class(model)
        if (
            classify is not None
            and model not in self._said_lengths
            and _say_lengths_apart(model, tokenized, classify)
        ):
            self._said_lengths.add(model)
        return run_batches(
            tokenized,
            rows,
            take,
            layout,
            budget or self._budget(model),
            length_class=classify,
            pad_token_id=self.pad_token_id,
            title=title,
            show_progress=show_progress,
            whole_items=whole_items,
            planned=planned,
        )

    def _budget(self, model: nn.Module, tokens: int | None = None) -> TokenBudget:
        return TokenBudget(tokens or self.max_tokens_per_batch, next(model.parameters()).device)

    def _alone(
        self,
        tokenized: TokenizedPool,
        rows: torch.Tensor,
        take: Take,
        model: nn.Module,
        *,
        skip: bool = False,
    ) -> Iterator[Taken]:
        """Run `take` alone on each response that was not finite in a batch.

        With `skip`, what is still not finite is given zeros, and NaN as the log-prob.

        A model with a nearly infinite mask gives NaN at padding that can attend to nothing else.
        """
        if len(rows) == 0:
            return
        logger.warning(
            "%d responses are not finite in a batch (first: %s); each is run alone",
            len(rows),
            tokenized.place(int(rows[0])),
        )
        for taken in self._run(tokenized, rows.tolist(), take, model, Layout.ALONE, "", False):
            if skip and not _finite(taken).all():
                logger.warning(
                    "%s: what the model gives for it is not finite (NaN or infinite): it is kept "
                    "out of V and of the picks",
                    tokenized.place(int(taken[0][0])),
                )
                numbers, gradients, logps = taken
                yield numbers, torch.zeros_like(gradients), torch.full_like(logps, torch.nan)
                continue
            if not _finite(taken).all():
                raise ActiveDPOError(
                    f"{tokenized.place(int(taken[0][0]))}: what the model gives for it is not "
                    "finite (NaN or infinite), also when it runs alone; use a dtype with a wider "
                    "range, skip it (--skip-non-finite), or leave the item out"
                )
            yield taken


def _fastest_allowed(model: nn.Module) -> Layout:
    """Return the fastest layout allowed for this kind of model, whatever the self-check finds."""
    return Layout.ALONE if batch_changes_attention(model) else Layout.SHARED


def _finite(taken: Taken) -> torch.Tensor:
    """Return which rows have only finite numbers, bool [n]."""
    return torch.stack(
        [
            part.isfinite().flatten(1).all(dim=1) if part.dim() > 1 else part.isfinite()
            for part in taken[1:]
        ]
    ).all(dim=0)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _longest(tokenized: TokenizedPool) -> int:
    return max((len(sequence.input_ids) for sequence in tokenized.sequences), default=0)


def _subtract_first(
    gradients: torch.Tensor, tokenized: TokenizedPool, absolute: torch.Tensor
) -> None:
    """Make the rows that are `absolute`, bool [R], relative to the first of their item, in place.

    The rows of an item are either all absolute or all relative.
    """
    first: dict[int, int] = {}
    for row in absolute.nonzero().flatten().tolist():
        start = first.setdefault(tokenized.item_of(row), row)
        if start != row:
            gradients[row] -= gradients[start]
    gradients[list(first.values())] = 0.0


def _say_lengths_apart(model: nn.Module, tokenized: TokenizedPool, classify: LengthClass) -> bool:
    """Log a warning if responses are kept apart by length; return whether it was logged."""
    groups = group_rows(tokenized, range(len(tokenized.sequences)), Layout.SHARED, classify)
    apart = sum(len(group.rows) for group in groups if group.kind != 0)
    if apart:
        logger.warning(
            "%s embeds positions by the longest sequence of a batch: %d of %d responses are longer "
            "than its original length; they share a batch or a prompt's pass only where that "
            "changes nothing, which is slower",
            type(causal_lm(model)).__name__,
            apart,
            len(tokenized.sequences),
        )
    return apart > 0


def _check_precision(precision: str | None, model: nn.Module) -> None:
    if precision not in PRECISIONS:
        raise ActiveDPOError(f"precision is {precision!r}, expected 'bf16' or None")
    on_cpu = next(model.parameters()).device.type == "cpu"
    has_bf16 = any(
        present for name, present in torch.cpu.get_capabilities().items() if name.endswith("bf16")
    )
    if precision == "bf16" and on_cpu and not has_bf16:
        raise ActiveDPOError(
            "precision 'bf16' would be slower here: this CPU has no bfloat16 "
            "instructions (AVX512-BF16 or AMX); leave it out"
        )
