"""From tokenized responses to gradient rows, log-probs and hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.features.batching import Batch, collate, plan_batches
from activedpo_fast.features.capture import capture, row_dtype, sample_gradients, undisturbed
from activedpo_fast.features.logprobs import last_hidden, response_logps
from activedpo_fast.features.parameters import TrainableLinear, trainable_linears
from activedpo_fast.features.sketch import Sketch, SketchPlan
from activedpo_fast.features.verify import verify_capture
from activedpo_fast.tokenization import TokenizedPool

DEFAULT_MAX_TOKENS = 4096


@dataclass(frozen=True)
class GradientRows:
    """What one pass over some responses gives.

    Attributes:
        rows: int64 [n], which responses of the tokenized pool.
        gradients: [n, k], β ∇θ log π(y|x), sketched; float32 (float64 for a float64 model).
        logps: float64 [n], log π(y|x).
    """

    rows: torch.Tensor
    gradients: torch.Tensor
    logps: torch.Tensor


class FeatureExtractor:
    """Takes per-response features of one model at its current weights.

    The model is left as it was found: train or eval mode, `requires_grad` flags, hooks and `.grad`,
    also after an exception. Features are taken in eval mode, without dropout.

    Args:
        model: a causal LM of transformers, or a PEFT model around one. The gradient is taken for
            every parameter that requires one (of the active adapter).
        sketch: the random projection of the gradients; its `dim` is k.
        beta: β of the implicit reward r = β log(π/π_ref); the rows are multiplied by it.
        pad_token_id: fills padded positions; it never influences a result.
        max_tokens_per_batch: padded tokens in one forward and backward pass.
        padding_side: "right", as DPOTrainer pads, or "left".
        verify: before the first batch, compare the captured per-sample gradients of two responses
            with those of autograd, and refuse a model for which they differ.

    Raises:
        UnsupportedParameterError, ActiveDPOError: see `trainable_linears` and `verify_capture`.

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
        max_tokens_per_batch: int = DEFAULT_MAX_TOKENS,
        padding_side: str = "right",
        verify: bool = True,
    ) -> None:
        if not beta > 0:
            raise ActiveDPOError(f"beta must be positive, not {beta}")
        if max_tokens_per_batch < 1:
            raise ActiveDPOError(f"max_tokens_per_batch must be ≥ 1, not {max_tokens_per_batch}")
        self.model = model
        self.sketch = sketch
        self.beta = beta
        self.pad_token_id = pad_token_id
        self.max_tokens_per_batch = max_tokens_per_batch
        self.padding_side = padding_side
        self._verify = verify

    def gradients(
        self, tokenized: TokenizedPool, *, show_progress: bool | None = None
    ) -> GradientRows:
        """The gradient rows of all R responses, in pool order."""
        count = len(tokenized.sequences)
        logps = torch.empty(count, dtype=torch.float64)
        gradients: torch.Tensor | None = None
        for part in self.iter_gradients(tokenized, range(count), show_progress=show_progress):
            if gradients is None:
                gradients = part.gradients.new_empty(count, part.gradients.shape[1])
            gradients[part.rows] = part.gradients
            logps[part.rows] = part.logps
        if gradients is None:
            raise ActiveDPOError("there is no response to take gradients of")
        return GradientRows(torch.arange(count), gradients, logps)

    def iter_gradients(
        self,
        tokenized: TokenizedPool,
        rows: Sequence[int],
        *,
        show_progress: bool | None = None,
    ) -> Iterator[GradientRows]:
        """Gradient rows batch by batch, longest responses first, for the given `rows`."""
        linears = trainable_linears(self.model)
        plan = SketchPlan(self.sketch, [shape for linear in linears for shape in linear.shapes()])
        if self._verify:
            verify_capture(self.model, linears, tokenized.sequences, self.pad_token_id)
            self._verify = False
        for batch in self._batches(tokenized, rows, "gradient features", show_progress):
            gradients, logps = self._batch_gradients(batch, linears, plan)
            yield GradientRows(batch.rows, gradients.cpu(), logps.double().cpu())

    def logps(
        self,
        tokenized: TokenizedPool,
        *,
        model: PreTrainedModel | None = None,
        show_progress: bool | None = None,
    ) -> torch.Tensor:
        """log π(y|x), float64 [R], in pool order; under `model` where one is given (π_ref)."""
        scored_by = model if model is not None else self.model
        count = len(tokenized.sequences)
        result = torch.empty(count, dtype=torch.float64)
        with undisturbed(scored_by), torch.no_grad():
            for batch in self._batches(tokenized, range(count), "log-probs", show_progress):
                result[batch.rows] = response_logps(scored_by, batch).double().cpu()
        return result

    def hidden(
        self, tokenized: TokenizedPool, *, show_progress: bool | None = None
    ) -> torch.Tensor:
        """The last layer's hidden state at the last response token, float32 [R, h], pool order."""
        count = len(tokenized.sequences)
        parts, rows = [], []
        with undisturbed(self.model), torch.no_grad():
            for batch in self._batches(tokenized, range(count), "hidden states", show_progress):
                parts.append(last_hidden(self.model, batch).float().cpu())
                rows.append(batch.rows)
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def _batches(
        self,
        tokenized: TokenizedPool,
        rows: Sequence[int],
        title: str,
        show_progress: bool | None,
    ) -> Iterator[Batch]:
        device = next(self.model.parameters()).device
        lengths = [len(tokenized.sequences[row].input_ids) for row in rows]
        disable = None if show_progress is None else not show_progress
        with tqdm(total=len(rows), desc=title, unit="response", disable=disable) as progress:
            for members in plan_batches(lengths, self.max_tokens_per_batch):
                batch = collate(
                    tokenized.sequences,
                    [rows[member] for member in members],
                    pad_token_id=self.pad_token_id,
                    padding_side=self.padding_side,
                )
                yield batch.to(device)
                progress.update(len(members))

    def _batch_gradients(
        self, batch: Batch, linears: Sequence[TrainableLinear], plan: SketchPlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = row_dtype(linears)
        shape = (batch.input_ids.shape[0], batch.input_ids.shape[1])
        sketched = torch.zeros(shape[0], plan.dim, dtype=dtype, device=batch.input_ids.device)

        def consume(linear: TrainableLinear, h: torch.Tensor, g: torch.Tensor) -> None:
            for name, gradient in sample_gradients(linear, h.to(dtype), g.to(dtype)):
                plan.add(sketched, name, gradient)

        with undisturbed(self.model), capture(linears, shape, consume):
            logps = response_logps(self.model, batch)
            if not logps.requires_grad:
                raise ActiveDPOError(
                    "no trainable layer took part in the model's forward pass "
                    f"(first of them: {linears[0].label!r})"
                )
            logps.sum().backward()
        # β last: multiplying the objective would only lose bits of small gradients in bf16.
        return sketched.mul_(self.beta), logps.detach()
