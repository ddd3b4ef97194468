"""What a captured layer adds to gradient rows, in the forms in which layers have it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from activedpo_fast.ops import OneHotSum


class Outer(NamedTuple):
    """Σ_t left_t right_tᵀ over the tokens of a pass.

    name: the parameter's canonical name, here and below. left: [N, rows], right: [N, columns] of a
    weight; [N, 1] for a bias. kept: bytes of both that would be freed without this term; the graph
    of a pass keeps the inputs of its layers until it ends.
    """

    name: str
    left: Tensor
    right: Tensor
    kept: int


class OneHot(NamedTuple):
    """A sum over the tokens of a pass, each of which adds in one row or column of a weight."""

    name: str
    of: OneHotSum


class Formed(NamedTuple):
    """Gradients that are formed already: gradients [m, *shape] of the rows `rows`, int64 [m]."""

    name: str
    gradients: Tensor
    rows: Tensor


Term = Outer | OneHot | Formed
