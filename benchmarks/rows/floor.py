"""The lower bound on the cost of gradient rows: the passes themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from activedpo_fast.gradients import extractor as extractor_module
from activedpo_fast.gradients import rows as rows_module
from activedpo_fast.gradients.hooks import Capture
from activedpo_fast.gradients.layers import Layer


class OnlyActivations(Capture):
    """Let autograd differentiate the same activations, without capturing anything."""

    def _forward_hook(self, layer: Layer) -> Callable[..., None]:
        def begin_the_graph(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            self.used = True
            if torch.is_grad_enabled() and not output.requires_grad:
                output.requires_grad_()

        return begin_the_graph


def without_capture(gradients: Callable[[], Any]) -> None:
    """Run `gradients`, a call of an extractor, with the same passes over the same batches but no
    capture."""

    def passes_alone(*args: Any, **options: Any) -> Any:
        with patch.object(rows_module, "Capture", OnlyActivations):  # not in the self-check
            return rows_module.captured_rows(*args, **options)

    with patch.object(extractor_module, "captured_rows", passes_alone):
        gradients()
