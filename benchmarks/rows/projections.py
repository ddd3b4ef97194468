"""Peers' random projections of whole gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.rows.quiet_bergson import import_bergson

Project = Callable[[Tensor], Tensor]  # float32 [n, D] -> [n, k]


def torch_count_sketch(dim: int, k: int) -> Project:
    """One non-zero per column in plain torch, with random numbers that are drawn once."""
    generator = torch.Generator().manual_seed(0)
    buckets = torch.randint(k, (dim,), generator=generator)
    signs = torch.randint(2, (dim,), generator=generator).float() * 2 - 1

    def project(x: Tensor) -> Tensor:
        return torch.zeros(len(x), k).scatter_add_(1, buckets.expand(len(x), dim), x * signs)

    return project


def trak_projection(dim: int, k: int) -> Project:
    """TRAK's projector for the CPU, its block of columns drawn again at every call; unscaled."""
    from trak.projectors import BasicProjector, ProjectionType

    projector = BasicProjector(
        grad_dim=dim,
        proj_dim=k,
        seed=0,
        proj_type=ProjectionType.rademacher,
        device=torch.device("cpu"),
    )
    return lambda x: projector.project(x, model_id=0) * k**-0.5


def dattri_projection(dim: int, k: int, kind: str) -> Project:
    """dattri's `random_project`; on the CPU it is TRAK's algorithm, scaled by 1 / sqrt(k).

    "random_mask" is k of the D numbers, not sums of them, and unscaled: its error depends on how
    even the gradient is.
    """
    from dattri.func.projection import random_project

    # The sample tells it the length and the dtype; expanded, it takes no memory.
    project = random_project(
        torch.zeros(1).expand(1, dim),
        1,
        k,
        proj_max_batch_size=32,
        proj_seed=0,
        proj_type=kind,
        device="cpu",
    )
    return project if kind != "random_mask" else lambda x: project(x) * math.sqrt(dim / k)


def bergson_dense(dim: int, k: int) -> Project:
    """bergson's dense projection of one matrix, its Philox signs drawn at every call."""
    project_global = import_bergson("collector.collector").project_global

    def project(x: Tensor) -> Tensor:
        return project_global("gradient/single", x, k, "rademacher", "jl")

    return project
