"""`FeatureExtractor`: gradient rows, log-probs and hidden states of tokenized responses.

One class, as the three share the model, what the self-check found about it and its token limit.
How each is computed is in the other modules of this folder.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from activedpo_fast._checks import fits, is_count
from activedpo_fast._modes import in_own_modes
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.batches import Batch, Layout, group_rows
from activedpo_fast.gradients.finite import ModelRunner, finite_rows, whole_items
from activedpo_fast.gradients.gradient_rows import GradientRows
from activedpo_fast.gradients.last_layers import decoder_layers
from activedpo_fast.gradients.layouts import HowGradients, KnownLayouts
from activedpo_fast.gradients.passes import divisors, hidden_pass, logp_pass
from activedpo_fast.gradients.rows import autograd_rows, captured_rows
from activedpo_fast.gradients.running import BatchResult, RunBatch
from activedpo_fast.gradients.sketch import Sketch, SketchPlan
from activedpo_fast.gradients.supported import require_supported
from activedpo_fast.gradients.token_budget import TokenBudget
from activedpo_fast.gradients.trainable import TrainableParameters, trainable_parameters
from activedpo_fast.models.fingerprints import fingerprint_weights
from activedpo_fast.models.named import GivenModel, as_model_alone
from activedpo_fast.models.positions import length_class
from activedpo_fast.models.undisturbed import undisturbed
from activedpo_fast.pool.tokens import TokenizedPool, completion_tokens

PRECISIONS = (None, "bf16")
GRADIENTS = ("all_tokens", "response_tokens")


class FeatureExtractor:
    """Compute per-response features of one model at its current weights.

    The model is restored afterward, also after an exception: train or eval mode, `requires_grad`
    flags, hooks, `forward` and `.grad`. Features are computed in eval mode, without dropout, in the
    model's own precision: autocast, inference mode and no_grad around a call change nothing, nor
    does the autocast that a trainer with bf16=True puts around the model's `forward`.

    Args:
        model: a transformers causal LM or encoder-decoder LM, or a PEFT model around one, or the
            name of either as in `ActiveDPOSelector`. The gradient is computed for every parameter
            that requires one (of the active adapter).
        sketch: the random projection of the gradients; its `dim` is k.
        beta: β of the implicit reward r = β log(π/π_ref); the rows are multiplied by it.
        length_normalized: use log π(y|x) / |y| instead of log π(y|x), in rows and log-probs, as
            losses of mean log-probs do (TRL's "ipo" and "sigmoid_norm"; |y| as in
            `completion_tokens`).
        pad_token_id: fills padded positions; it never influences a result.
        max_tokens_per_batch: padded tokens in one forward and backward pass; None picks a number
            that fits the model and the memory (see `TokenBudget`). Halved, with a warning, when
            memory runs out.
        gradient: "all_tokens", or "response_tokens": the gradient by which the weights act on the
            tokens of the response and on the prompt's last token, which predicts the first of them;
            the keys and values of all tokens before are constants. No prompt runs backward, which
            is cheaper, the more the longer prompts are. With an encoder, its output is the
            constant. Not the gradient of the implicit reward, but near it (docs/method.md).
        last_layers: L, to take the gradient of the trainable parameters in the last L decoder
            layers alone, and in what runs after them (final norm, head; not a head that shares the
            embedding's weight). No backward pass goes below. Default: of all.
        precision: "bf16" computes matrix products in bfloat16 (autocast; the weights are not
            converted), on CPUs and GPUs that support it; None uses the model's own dtype.
        verify: before the first batch, compare the captured per-sample gradients of a few responses
            with autograd's, and determine how responses can be batched (see `Layout`). A model for
            which they differ has its gradients from autograd. Without it prompts are never shared,
            which is slower.
        skip_non_finite: give a response for which the model's numbers are not finite a row of zeros
            and the log-prob NaN, and log a warning that names it, instead of raising.

    Raises:
        UnsupportedParameterError, ActiveDPOError: see `require_supported`, which checks the kind
            of model even without `verify`, and `trainable_parameters`; an option out of range; bf16
            on a CPU that does not support it; `last_layers` that the model does not have.

    Hooks capture the gradients of linear layers. If anything else is trained, all gradients come
    from autograd, one response at a time, which is as exact and slower, and is logged.

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
        gradient: str = "all_tokens",
        last_layers: int | None = None,
        pad_token_id: int = 0,
        max_tokens_per_batch: int | None = None,
        precision: str | None = None,
        verify: bool = True,
        skip_non_finite: bool = False,
    ) -> None:
        if not (fits(beta, float) and 0 < beta < math.inf):
            raise ActiveDPOError(f"beta must be a positive, finite number, not {beta!r}")
        if max_tokens_per_batch is not None and not is_count(max_tokens_per_batch, least=1):
            raise ActiveDPOError(
                f"max_tokens_per_batch must be an integer from 1, not {max_tokens_per_batch!r}"
            )
        if not isinstance(length_normalized, bool):
            raise ActiveDPOError(
                f"length_normalized must be True or False, not {length_normalized!r}"
            )
        if gradient not in GRADIENTS:
            raise ActiveDPOError(
                f"gradient must be one of {', '.join(GRADIENTS)}, not {gradient!r}"
            )
        self.model = as_model_alone(model)
        require_supported(self.model, pad_token_id=pad_token_id)
        _check_last_layers(last_layers, self.model)
        _check_precision(precision, self.model)
        self.sketch = sketch
        self.beta = beta
        self.length_normalized = length_normalized
        self.gradient = gradient
        self.last_layers = last_layers
        self.pad_token_id = pad_token_id
        self.max_tokens_per_batch = max_tokens_per_batch
        self.precision = precision
        self.skip_non_finite = skip_non_finite
        self._layouts = KnownLayouts(
            self.model, pad_token_id=pad_token_id, precision=precision, verify=verify
        )
        self._runner = ModelRunner(pad_token_id, max_tokens_per_batch)

    def copy(self) -> FeatureExtractor:
        """Return one with the same model and settings, and its own findings of the self-check."""
        twin = copy.copy(self)
        twin._layouts, twin._runner = self._layouts.copy(), self._runner.copy()
        return twin

    def of_response_tokens(self, last_layers: int | None = None) -> FeatureExtractor:
        """Return one with the same model, settings and self-check whose rows are the cheap ones.

        Raises:
            ActiveDPOError: `last_layers` that the model does not have.
        """
        _check_last_layers(last_layers, self.model)
        twin = copy.copy(self)
        twin.gradient, twin.last_layers = "response_tokens", last_layers
        return twin

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
        for (rows, part, part_logps), is_relative in self._gradient_parts(
            tokenized, range(count), relative, show_progress
        ):
            if gradients is None:
                gradients = part.new_empty(count, part.shape[1])
            gradients[rows], logps[rows], absolute[rows] = part, part_logps, not is_relative
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
        budget = self._runner.budget(self.model, max_tokens_per_batch)
        for result, _ in self._gradient_parts(
            tokenized, rows, False, show_progress, budget=budget, whole_pool=True
        ):
            asked = wanted[result[0]]
            yield GradientRows(*(part[asked] for part in result))

    def batches(
        self, tokenized: TokenizedPool, rows: Sequence[int], max_tokens_per_batch: int
    ) -> list[list[int]]:
        """Return which of `rows` each batch of `iter_gradients` has, in order; none is empty.

        Several processes that share them out by whole batches give every row the bits that one
        process would.
        """
        wanted = set(rows)
        planned = self._runner.planned(
            tokenized, self.model, self.check(tokenized), max_tokens_per_batch
        )
        asked = ([row for row in batch if row in wanted] for batch in planned)
        return [batch for batch in asked if batch]

    @in_own_modes
    def tokens_per_batch(self, tokenized: TokenizedPool) -> int:
        """Return `max_tokens_per_batch`, or what a first batch shows to be suitable for it."""
        if self.max_tokens_per_batch is not None:
            return self.max_tokens_per_batch
        budget = self._runner.budget(self.model)
        everything = range(len(tokenized.sequences))
        next(self._gradient_parts(tokenized, everything, False, False, budget=budget))
        return budget.tokens

    def identity(self) -> dict[str, Any]:
        """Return JSON values that gradient rows depend on, except for the responses."""
        by_name = self._trained().by_name
        names = fingerprint_weights((name, p.detach().to("meta")) for name, p in by_name.items())
        return {
            "sketch": self.sketch.method,
            "proj_dim": self.sketch.dim,
            "sketch_seed": self.sketch.seed,
            "beta": self.beta,
            "length_normalized": self.length_normalized,
            "gradient": self.gradient,
            "last_layers": self.last_layers,
            "precision": self.precision,
            "weights": fingerprint_weights(self.model.named_parameters()),
            "trained": f"{len(by_name)} parameters, {names[:8]}",
        }

    def _gradient_parts(
        self,
        tokenized: TokenizedPool,
        rows: Sequence[int],
        relative: bool,
        show_progress: bool | None,
        *,
        budget: TokenBudget | None = None,
        whole_pool: bool = False,
    ) -> Iterator[tuple[BatchResult, bool]]:
        """Yield (rows, gradients, logps) by batch, and whether the rows are relative (not all)."""
        self._require_supported(tokenized, gradients=True)
        trained = self._trained()
        plan = SketchPlan(self.sketch, trained.shapes)
        groups = group_rows(tokenized, rows, Layout.WHOLE)
        if relative and any(len(group.rows) == 1 for group in groups):
            raise ActiveDPOError("relative rows need two or more responses of every item")
        layout, by_hooks = self._how_gradients(tokenized, trained)
        # Rows are relative to each other if they can be in one batch, to save a prompt's pass.
        batched = group_rows(tokenized, rows, layout, length_class(self.model))
        relative = relative and len(batched) == len(groups) and layout is not Layout.APART
        run_batch, run_alone = (
            self._gradient_pass(tokenized, trained, plan, by_hooks=by_hooks, relative=of_first)
            for of_first in (relative, False)
        )
        for result in self._runner.run(
            tokenized,
            rows,
            run_batch,
            self.model,
            layout,
            "gradient features",
            show_progress,
            whole_items=relative,
            budget=budget,
            planned=range(len(tokenized.sequences)) if whole_pool else None,
        ):
            finite = finite_rows(result)
            if relative:
                finite = whole_items(finite, result[0], tokenized)
            yield tuple(part[finite] for part in result), relative
            for alone in self._runner.run_alone(
                tokenized,
                result[0][~finite],
                run_alone,
                self.model,
                layout=layout if layout is Layout.APART else Layout.ALONE,
                skip=self.skip_non_finite,
            ):
                yield alone, False

    def _gradient_pass(
        self,
        tokenized: TokenizedPool,
        trained: TrainableParameters,
        plan: SketchPlan,
        *,
        by_hooks: bool,
        relative: bool,
    ) -> RunBatch:
        """Return a function that gives (rows, gradients, logps) of a batch."""

        def run(batch: Batch, shared: bool) -> BatchResult:
            lengths = self.lengths(tokenized, batch.rows.tolist())
            # Parameters are added up in float64, and rounded once.
            if by_hooks:
                logps, sketched = captured_rows(
                    self.model,
                    trained,
                    plan,
                    batch,
                    precision=self.precision,
                    shared=shared,
                    relative=relative,
                    lengths=lengths,
                    through_prompts=self.gradient == "all_tokens",
                )
            else:
                logps, sketched = autograd_rows(
                    self.model, trained, plan, batch, precision=self.precision
                )
            if lengths is not None:
                logps = logps / lengths.to(logps.device)
                sketched /= divisors(batch, lengths, relative).to(sketched.device)[:, None]
            # β last: multiplying the objective would lose bits of small gradients in bf16.
            gradients = sketched.mul_(self.beta).to(trained.row_dtype).cpu()
            return batch.rows, gradients, logps.double().cpu()

        return run

    @in_own_modes
    def check(self, tokenized: TokenizedPool) -> Layout:
        """Return how responses are batched; run the self-check if this is not known yet.

        The check is repeated for a pool with a response longer than all before, because models
        differ in how they treat long responses.

        Raises:
            ActiveDPOError: an unsupported model or tokens (see `require_supported`).
        """
        self._require_supported(tokenized, gradients=True)
        return self._how_gradients(tokenized, self._trained()).layout

    def _trained(self) -> TrainableParameters:
        return trainable_parameters(self.model, self.last_layers)

    def _how_gradients(
        self, tokenized: TokenizedPool, trained: TrainableParameters
    ) -> HowGradients:
        if self.gradient == "response_tokens" and trained.others:
            raise ActiveDPOError(
                "gradient='response_tokens' is for trainable linear layers alone, and the model "
                f"trains {trained.describe_others()}; use gradient='all_tokens'"
            )
        how = self._layouts.for_gradients(tokenized, trained)
        if self.gradient == "all_tokens":
            return how
        if tokenized.has_images:
            raise ActiveDPOError(
                "gradient='response_tokens' is for texts alone, as images do not run apart from "
                "their responses; use gradient='all_tokens', and no preselect"
            )
        if how.layout is not Layout.SHARED:
            raise ActiveDPOError(
                "gradient='response_tokens' needs a model whose prompts can run apart from their "
                "responses, as the self-check finds out (verify=True; its warning says why not); "
                "use gradient='all_tokens', and no preselect"
            )
        return HowGradients(Layout.APART, by_hooks=True)

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

        def run(batch: Batch, shared: bool) -> BatchResult:
            with undisturbed(scored_by, self.precision):
                return batch.rows, logp_pass(scored_by, batch, shared=shared).double().cpu()

        for rows, logps in self._forward(tokenized, run, scored_by, "log-probs", show_progress):
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

        def run(batch: Batch, shared: bool) -> BatchResult:
            with undisturbed(self.model, self.precision):
                return batch.rows, hidden_pass(self.model, batch, shared=shared).float().cpu()

        results = list(self._forward(tokenized, run, self.model, "hidden states", show_progress))
        rows = torch.cat([rows for rows, _ in results])
        return torch.cat([hidden for _, hidden in results])[rows.argsort()]

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
        run_batch: RunBatch,
        model: nn.Module,
        title: str,
        show_progress: bool | None,
    ) -> Iterator[BatchResult]:
        """Run `run_batch` on all responses; all results are finite."""
        layout = self._layouts.for_forward(tokenized, model)
        rows = range(len(tokenized.sequences))
        for result in self._runner.run(
            tokenized, rows, run_batch, model, layout, title, show_progress
        ):
            finite = finite_rows(result)
            yield tuple(part[finite] for part in result)
            yield from self._runner.run_alone(tokenized, result[0][~finite], run_batch, model)


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


def _check_last_layers(last_layers: int | None, model: nn.Module) -> None:
    if last_layers is None:
        return
    if not is_count(last_layers, least=1):
        raise ActiveDPOError(f"last_layers must be an integer from 1, not {last_layers!r}")
    decoder_layers(model, last_layers)


def _check_precision(precision: str | None, model: nn.Module) -> None:
    if precision not in PRECISIONS:
        raise ActiveDPOError(f"precision is {precision!r}, expected 'bf16' or None")
    on_cpu = next(model.parameters()).device.type == "cpu"
    has_bf16 = any(
        present for name, present in torch.cpu.get_capabilities().items() if name.endswith("bf16")
    )
    if precision == "bf16" and on_cpu and not has_bf16:
        raise ActiveDPOError(
            "precision 'bf16' would be slower here: this CPU has no bfloat16 instructions "
            "(AVX512-BF16 or AMX); leave it out"
        )
