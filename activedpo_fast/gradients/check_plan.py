"""Rows for the self-check: each parameter's gradient in a block of its own, if large a sketch.

The self-check compares parameters one by one, for several responses at a time. Whole gradients of
an embedding or a head, of hundreds of millions of numbers, would not fit beside the model. A sketch
keeps the norm of a difference to within a few percent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from activedpo_fast.gradients.sketch import Sketch, SketchPlan
from activedpo_fast.ops import OneHotSum

_LARGE = 1 << 16  # numbers of a gradient that is sketched
_BLOCK = 1 << 12  # numbers of its sketch


class CheckPlan:
    """A `SketchPlan` of each parameter, in adjacent blocks of a row.

    parameters: (canonical name, shape) of every trainable parameter.
    """

    def __init__(self, parameters: Sequence[tuple[str, torch.Size]]) -> None:
        self._plans: dict[str, SketchPlan] = {}
        self._begins: dict[str, int] = {}
        self._dim = 0
        for name, shape in parameters:
            sketch = Sketch("sjlt", _BLOCK) if shape.numel() > _LARGE else Sketch("none")
            self._plans[name] = SketchPlan(sketch, [(name, shape)])
            self._begins[name] = self._dim
            self._dim += self._plans[name].dim

    @property
    def dim(self) -> int:
        """The length of a row."""
        return self._dim

    @property
    def blocks(self) -> list[tuple[str, torch.Size]]:
        """The parameters and the shapes of their blocks, in order."""
        return [(name, torch.Size([plan.dim])) for name, plan in self._plans.items()]

    def of(self, gradients: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Return the blocks, float64 on `device`, of one response's gradients on any device."""
        found: dict[str, Tensor] = {}
        for name, gradient in gradients.items():
            block = gradient.new_zeros(1, self._plans[name].dim, dtype=torch.float64)
            self._plans[name].add_formed(block, [(name, gradient[None])], torch.tensor([0]))
            found[name] = block[0].to(device)
        return found

    def add(
        self, out: Tensor, gradients: Sequence[tuple[str, Tensor, Tensor]], segments: Tensor
    ) -> None:
        """As `SketchPlan.add`."""
        for name, left, right in gradients:
            part = self._part(out, name)
            self._plans[name].add(part, [(name, left, right)], segments)
            self._add_part(out, name, part)

    def add_one_hot(self, out: Tensor, name: str, of: OneHotSum, segments: Tensor) -> None:
        """As `SketchPlan.add_one_hot`."""
        part = self._part(out, name)
        self._plans[name].add_one_hot(part, name, of, segments)
        self._add_part(out, name, part)

    def add_formed(
        self, out: Tensor, gradients: Iterable[tuple[str, Tensor]], rows: Tensor
    ) -> None:
        """As `SketchPlan.add_formed`."""
        for name, gradient in gradients:
            part = self._part(out, name)
            self._plans[name].add_formed(part, [(name, gradient)], rows)
            self._add_part(out, name, part)

    def _part(self, out: Tensor, name: str) -> Tensor:
        return out.new_zeros(len(out), self._plans[name].dim)

    def _add_part(self, out: Tensor, name: str, part: Tensor) -> None:
        out[:, self._begins[name] :][:, : part.shape[1]] += part
