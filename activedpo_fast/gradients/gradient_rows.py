"""What extraction gives. A store reads and writes it without the libraries of models."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
