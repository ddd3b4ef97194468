"""Sketching captured gradients: at once on the CPU, those of many layers together on a GPU.

A kernel launch for every weight would take longer than its work, so on a GPU what the hooks capture
is put aside, up to a bound on memory, and then sketched with a few launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from activedpo_fast.gradients.sketch import RowPlan
from activedpo_fast.gradients.terms import OneHot, Outer, Term

# Bytes that are kept from layer to layer. More would save launches of which the GPU sees few
# already: this much keeps it busy for longer than launching the next sketches takes.
ASIDE = 1 << 30


@dataclass
class _Captured:
    """What was captured with the same segments, on the same stream."""

    segments: Tensor
    stream: Any
    gradients: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)


class Sketching:
    """Adds the gradients of each layer's parameters to rows; see `hooks.Consumer`.

    out: [n, plan.dim]. It has all of a backward pass once that is finished. most: bytes to put
        aside; default: `ASIDE` on a GPU, none on the CPU.
    """

    def __init__(self, plan: RowPlan, out: Tensor, most: int | None = None) -> None:
        self._plan, self._out = plan, out
        self._most = (ASIDE if out.is_cuda else 0) if most is None else most
        self._aside: dict[tuple[int, Any], _Captured] = {}
        self._bytes = 0

    def add(self, terms: Sequence[Term], segments: Tensor) -> None:
        for term in terms:
            if isinstance(term, Outer):
                self._put_aside(term, segments)
            elif isinstance(term, OneHot):
                self._plan.add_one_hot(self._out, term.name, term.of, segments)
            else:
                self._plan.add_formed(self._out, [(term.name, term.gradients)], term.rows)
        if self._bytes > self._most:
            self.finish()

    def _put_aside(self, term: Outer, segments: Tensor) -> None:
        name, left, right, kept = term
        stream = torch.cuda.current_stream(left.device) if left.is_cuda else None
        captured = self._aside.get((id(segments), stream))
        if captured is None:
            captured = self._aside[id(segments), stream] = _Captured(segments, stream)
        captured.gradients.append((name, left, right))
        self._bytes += kept

    def finish(self) -> None:
        """Sketch what was put aside."""
        for captured in self._aside.values():
            with torch.cuda.stream(captured.stream):  # None: no stream
                self._plan.add(self._out, captured.gradients, captured.segments)
        self._aside.clear()
        self._bytes = 0
