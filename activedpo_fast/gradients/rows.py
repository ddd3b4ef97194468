"""The gradient rows of a batch: captured by hooks, or taken from autograd for one response.

Hooks take whole batches, but only the layers that there are rules for. Autograd takes any
parameter, one response at a time. A model that trains anything else has all of its gradients from
autograd: the pass through the whole model that the others need yields those of these layers, too,
at less cost than another pass with hooks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.batches import Batch
from activedpo_fast.gradients.dora import constant_dora_norms
from activedpo_fast.gradients.hooks import Capture
from activedpo_fast.gradients.passes import gradient_pass, whole_model_logps
from activedpo_fast.gradients.sketch import RowPlan
from activedpo_fast.gradients.sketching import RowsOnDevices, Sketching
from activedpo_fast.gradients.trainable import TrainableParameters
from activedpo_fast.models.undisturbed import undisturbed


def captured_rows(
    model: nn.Module,
    trained: TrainableParameters,
    plan: RowPlan,
    batch: Batch,
    *,
    precision: str | None,
    shared: bool,
    relative: bool = False,
    lengths: torch.Tensor | None = None,
    through_prompts: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log π(y|x) [B], and the rows, float64 [B, plan.dim], that `gradient_pass` gives."""
    device = batch.input_ids.device
    rows = torch.zeros(len(batch.rows), plan.dim, dtype=torch.float64, device=device)
    with (
        undisturbed(model, precision),
        constant_dora_norms(model),
        Capture(trained.layers, Sketching(plan, rows)) as capture,
    ):
        logps = gradient_pass(
            model,
            batch,
            capture,
            shared=shared,
            relative=relative,
            lengths=lengths,
            through_prompts=through_prompts,
        )
    return logps, rows


def autograd_rows(
    model: nn.Module,
    trained: TrainableParameters,
    plan: RowPlan,
    batch: Batch,
    *,
    precision: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log π(y|x) [1], and the row of ∇ log π(y|x), float64 [1, plan.dim].

    batch: one response, with its prompt.
    """
    logps, gradients = autograd_gradients(model, trained.by_name, batch, precision)
    rows = torch.zeros(1, plan.dim, dtype=torch.float64, device=batch.input_ids.device)
    rows_of = RowsOnDevices(rows)
    for name, gradient in gradients.items():
        plan.add_formed(rows_of.on(gradient.device), [(name, gradient[None])], torch.tensor([0]))
    rows_of.add_up()
    return logps, rows


def autograd_gradients(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Batch, precision: str | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return log π(y|x) [1], and its gradients by name, each in its parameter's shape and dtype.

    A parameter that takes no part, such as one of an expert that no token is routed to, is left
    out: its gradient is zero.

    Args:
        batch: one response, with its prompt.

    Raises:
        ActiveDPOError: none of the parameters takes part.
    """
    with undisturbed(model, precision):
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        logps = whole_model_logps(model, batch)
        if not logps.requires_grad:
            raise ActiveDPOError(
                "no trainable parameter took part in the model's forward pass (first of them: "
                f"{next(iter(parameters))!r})"
            )
        gradients = torch.autograd.grad(logps.sum(), list(parameters.values()), allow_unused=True)
    return logps.detach(), {
        name: gradient.to_dense() if gradient.is_sparse else gradient
        for name, gradient in zip(parameters, gradients, strict=True)
        if gradient is not None
    }
