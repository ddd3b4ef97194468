"""Principal components of features, by which the known-reward tasks are made smaller."""

from __future__ import annotations

import torch
from torch import Tensor


def principal_components(rows: Tensor, dim: int) -> Tensor:
    """Rows [..., n], centered within their prompts, in their first `dim` components; float64."""
    flat = rows.flatten(0, -2)
    axes: Tensor = torch.linalg.eigh((flat.T @ flat).double()).eigenvectors.flip(1)[:, :dim]
    axes = axes * axes.sum(0).sign()  # eigenvectors have no sign of their own
    return rows.double() @ axes
