"""From tokenized responses to gradient rows, log-probs and hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from activedpo_fast._modes import in_own_modes
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.features.batching import (
    Batch,
    collate,
    group_rows,
    padded_tokens,
    plan_batches,
)
from activedpo_fast.features.budget import TokenBudget, is_out_of_memory
from activedpo_fast.features.capture import Capture, row_dtype, sketch_into, undisturbed
from activedpo_fast.features.parameters import trainable_linears
from activedpo_fast.features.passes import gradient_pass, hidden_pass, logp_pass
from activedpo_fast.features.sketch import Sketch, SketchPlan
from activedpo_fast.features.supported import require_supported
from activedpo_fast.features.verify import choose_layout, shared_logps_agree
from activedpo_fast.tokenization import TokenizedPool

PRECISIONS = (None, "bf16")
Result = TypeVar("Result")


@dataclass(frozen=True)
class GradientRows:
    """What one pass over some responses gives.

    Attributes:
        rows: int64 [n], which responses of the tokenized pool.
        gradients: [n, k], β ∇θ log π(y|x), sketched; float32 (float64 for a float64 model). If they
            are relative, less the row of the item's first response, whose own is then zero.
        logps: float64 [n], log π(y|x).
    """

    rows: torch.Tensor
    gradients: torch.Tensor
    logps: torch.Tensor


class FeatureExtractor:
    """Takes per-response features of one model at its current weights.

    The model is left as it was found: train or eval mode, `requires_grad` flags, hooks, `forward`
    and `.grad`, also after an exception. Features are taken in eval mode, without dropout, in the
    model's own precision: autocast, inference mode and no_grad around a call change nothing, nor
    does the autocast that a trainer with bf16=True has put around the model's `forward`.

    Args:
        model: a causal LM of transformers, or a PEFT model around one. The gradient is taken for
            every parameter that requires one (of the active adapter).
        sketch: the random projection of the gradients; its `dim` is k.
        beta: β of the implicit reward r = β log(π/π_ref); the rows are multiplied by it.
        pad_token_id: fills padded positions; it never influences a result.
        max_tokens_per_batch: padded tokens in one forward and backward pass; None finds what suits
            the model and the memory (see `TokenBudget`). Halved, with a warning, when memory does
            not suffice.
        precision: "bf16" computes matrix products in bfloat16 (autocast; the weights stay as they
            are), for CPUs and GPUs that have it; None in the model's own dtype.
        verify: before the first batch, compare the captured per-sample gradients of a few responses
            with those of autograd, refuse a model for which they differ, and find out whether
            responses can share their prompt's pass. Without it they never do, which is slower.

    Raises:
        UnsupportedParameterError, ActiveDPOError: see `require_supported`, which looks at the kind
            of model whatever `verify` is, `trainable_linears` and `choose_layout`; an option out of
            range; bf16 asked of a CPU that has none.

    Source: the gradient of the implicit reward as the feature of a response is ActiveDPO's, Lin et
    al., arXiv 2505.19241.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        sketch: Sketch,
        *,
        beta: float = 0.1,
        pad_token_id: int = 0,
        max_tokens_per_batch: int | None = None,
        precision: str | None = None,
        verify: bool = True,
    ) -> None:
        if not beta > 0:
            raise ActiveDPOError(f"beta must be positive, not {beta}")
        if max_tokens_per_batch is not None and max_tokens_per_batch < 1:
            raise ActiveDPOError(f"max_tokens_per_batch must be ≥ 1, not {max_tokens_per_batch}")
        require_supported(model, pad_token_id=pad_token_id)
        _check_precision(precision, model)
        self.model = model
        self.sketch = sketch
        self.beta = beta
        self.pad_token_id = pad_token_id
        self.max_tokens_per_batch = max_tokens_per_batch
        self.precision = precision
        self._verify = verify
        # Whether responses share their prompt's pass, once known: for gradients by whether the pool
        # that was looked at had prompts to share, for log-probs and hidden states by model.
        self._gradient_layout: dict[bool, bool] = {}
        self._forward_layout: dict[int, bool] = {}

    @in_own_modes
    def gradients(
        self,
        tokenized: TokenizedPool,
        *,
        relative: bool = False,
        show_progress: bool | None = None,
    ) -> GradientRows:
        """The gradient rows of all R responses, in pool order.

        Args:
            relative: rows less the row of the item's first response. Differences of an item's rows
                are the same, so that pair features φ without normalisation, or with "pair", are
                too; each prompt costs one backward pass less.

        Raises:
            ActiveDPOError: no responses; not enough memory for a single item.
        """
        count = len(tokenized.sequences)
        logps = torch.empty(count, dtype=torch.float64)
        gradients: torch.Tensor | None = None
        parts = self.iter_gradients(
            tokenized, range(count), relative=relative, show_progress=show_progress)
        for part in parts:
            if gradients is None:
                gradients = part.gradients.new_empty(count, part.gradients.shape[1])
            gradients[part.rows] = part.gradients
            logps[part.rows] = part.logps
        if gradients is None:
            raise ActiveDPOError("there is no response to take gradients of")
        return GradientRows(torch.arange(count), gradients, logps)

    @in_own_modes
    def iter_gradients(
        self,
        tokenized: TokenizedPool,
        rows: Sequence[int],
        *,
        relative: bool = False,
        show_progress: bool | None = None,
    ) -> Iterator[GradientRows]:
        """Gradient rows batch by batch, longest sequences first, for the given `rows`.

        With `relative`, `rows` must have all responses of an item or none.
        """
        self._require_supported(tokenized, gradients=True)
        linears = trainable_linears(self.model)
        plan = SketchPlan(self.sketch, [shape for linear in linears for shape in linear.shapes()])
        dtype = row_dtype(linears)

        def take(batch: Batch, shared: bool) -> GradientRows:
            # Sums over layers in float64, rounded once.
            sketched = torch.zeros(len(batch.rows), plan.dim, dtype=torch.float64,
                                   device=batch.input_ids.device)
            with (
                undisturbed(self.model, self.precision),
                Capture(linears, sketch_into(plan, sketched)) as capture,
            ):
                logps = gradient_pass(
                    self.model, batch, capture, shared=shared, relative=relative)
            # β last: multiplying the objective would only lose bits of small gradients in bf16.
            gradients = sketched.mul_(self.beta).to(dtype).cpu()
            return GradientRows(batch.rows, gradients, logps.double().cpu())

        if relative and any(
            len(group.rows) == 1 for group in group_rows(tokenized, rows, share=False)
        ):
            raise ActiveDPOError("relative rows need two or more responses of every item")
        yield from self._run(tokenized, rows, take, self.model, self.check(tokenized),
                             "gradient features", show_progress, whole_items=relative)

    @in_own_modes
    def check(self, tokenized: TokenizedPool) -> bool:
        """Whether responses share their prompt's pass; the self-check, where that is not known yet.

        Raises:
            UnsupportedParameterError: captured gradients differ from autograd's.
            ActiveDPOError: a model or tokens that cannot be handled (see `require_supported`).
        """
        self._require_supported(tokenized, gradients=True)
        if not self._verify:
            return False
        rows = range(len(tokenized.sequences))
        has_prompts = any(group.shared for group in group_rows(tokenized, rows, share=True))
        if has_prompts not in self._gradient_layout:
            self._gradient_layout[has_prompts] = choose_layout(
                self.model, trainable_linears(self.model), tokenized, self.pad_token_id,
                self.precision)
        return self._gradient_layout[has_prompts]

    @in_own_modes
    def logps(
        self,
        tokenized: TokenizedPool,
        *,
        model: PreTrainedModel | None = None,
        show_progress: bool | None = None,
    ) -> torch.Tensor:
        """log π(y|x), float64 [R], in pool order; under `model` where one is given (π_ref)."""
        scored_by = model if model is not None else self.model
        self._require_supported(tokenized, scored_by)
        result = torch.empty(len(tokenized.sequences), dtype=torch.float64)

        def take(batch: Batch, shared: bool) -> tuple[torch.Tensor, torch.Tensor]:
            with undisturbed(scored_by, self.precision):
                return batch.rows, logp_pass(scored_by, batch, shared=shared)

        for rows, logps in self._run(
            tokenized, range(len(result)), take, scored_by,
            self._forward_shares(tokenized, scored_by), "log-probs", show_progress,
        ):
            result[rows] = logps.double().cpu()
        return result

    @in_own_modes
    def hidden(
        self, tokenized: TokenizedPool, *, show_progress: bool | None = None
    ) -> torch.Tensor:
        """The last layer's hidden state at the last response token, float32 [R, h], pool order."""
        self._require_supported(tokenized)

        def take(batch: Batch, shared: bool) -> tuple[torch.Tensor, torch.Tensor]:
            with undisturbed(self.model, self.precision):
                return batch.rows, hidden_pass(self.model, batch, shared=shared)

        parts, rows = [], []
        for batch_rows, hidden in self._run(
            tokenized, range(len(tokenized.sequences)), take, self.model,
            self._forward_shares(tokenized, self.model), "hidden states", show_progress,
        ):
            parts.append(hidden.float().cpu())
            rows.append(batch_rows)
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def _require_supported(self, tokenized: TokenizedPool, model: nn.Module | None = None, *,
                           gradients: bool = False) -> None:
        require_supported(self.model if model is None else model, tokenized,
                          pad_token_id=self.pad_token_id, gradients=gradients)

    def _forward_shares(self, tokenized: TokenizedPool, model: nn.Module) -> bool:
        if not self._verify:
            return False
        if id(model) not in self._forward_layout:
            self._forward_layout[id(model)] = shared_logps_agree(
                model, tokenized, self.pad_token_id, self.precision)
        return self._forward_layout[id(model)]

    def _run(
        self,
        tokenized: TokenizedPool,
        rows: Sequence[int],
        take: Callable[[Batch, bool], Result],
        model: nn.Module,
        shared: bool,
        title: str,
        show_progress: bool | None,
        whole_items: bool = False,
    ) -> Iterator[Result]:
        """`take` of every batch, planned anew with half the tokens when memory does not suffice."""
        budget = TokenBudget(self.max_tokens_per_batch, next(model.parameters()).device)
        pending = list(rows)
        disable = None if show_progress is None else not show_progress
        with tqdm(total=len(rows), desc=title, unit="response", disable=disable) as progress:
            while pending:
                groups = group_rows(tokenized, pending, share=shared)
                done: set[int] = set()
                tokens = budget.tokens
                for members in plan_batches(groups, tokens, split=not whole_items):
                    try:
                        with budget.batch(padded_tokens(members)):
                            batch = collate(
                                tokenized.sequences, members, pad_token_id=self.pad_token_id)
                            result = take(batch.to(budget.device), shared)
                    except (RuntimeError, MemoryError) as error:
                        if not is_out_of_memory(error):
                            raise
                        if len(members) == 1 and (whole_items or len(members[0].rows) == 1):
                            raise ActiveDPOError(
                                f"out of memory for {len(members[0].rows)} responses of one prompt "
                                f"({padded_tokens(members)} tokens); use a smaller max_length or "
                                "a device with more memory") from error
                    else:
                        done.update(batch.rows.tolist())
                        progress.update(len(batch.rows))
                        yield result
                        if budget.tokens != tokens:
                            break
                        continue
                    # Outside of the handler, whose traceback holds the batch's tensors.
                    budget.halve(padded_tokens(members))
                    break
                pending = [row for row in pending if row not in done]


def _check_precision(precision: str | None, model: nn.Module) -> None:
    if precision not in PRECISIONS:
        raise ActiveDPOError(f"precision is {precision!r}, expected 'bf16' or None")
    on_cpu = next(model.parameters()).device.type == "cpu"
    has_bf16 = any(present for name, present in torch.cpu.get_capabilities().items()
                   if name.endswith("bf16"))
    if precision == "bf16" and on_cpu and not has_bf16:
        raise ActiveDPOError("precision 'bf16' would be slower here: this CPU has no bfloat16 "
                             "instructions (AVX512-BF16 or AMX); leave it out")
