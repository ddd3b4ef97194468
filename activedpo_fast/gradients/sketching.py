"""Sketching captured gradients: at once on the CPU, those of many layers together on a GPU.

A kernel launch for every weight would take longer than its work, so on a GPU what the hooks capture
is put aside, up to a bound on memory, and then sketched with a few launches.

In a model that is split over devices, each layer's part is sketched where the layer is, and the
parts are added up afterwards.
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


class RowsOnDevices:
    """Rows like `out` to add to on any device. `out` has their sum after `add_up`."""

    def __init__(self, out: Tensor) -> None:
        self._out = out
        self._elsewhere: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        if device == self._out.device:
            return self._out
        if device not in self._elsewhere:
            self._elsewhere[device] = torch.zeros_like(self._out, device=device)
        return self._elsewhere[device]

    def add_up(self) -> None:
        for part in self._elsewhere.values():
            self._out += part.to(self._out.device)
        self._elsewhere.clear()


@dataclass
class _Captured:
    """What was captured with the same segments, on the same device and stream."""

    segments: Tensor
    rows: Tensor
    stream: Any
    gradients: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)


class Sketching:
    """Adds the gradients of each layer's parameters to rows; see `hooks.Consumer`.

    out: [n, plan.dim]. It has all of a backward pass once that is finished. most: bytes to put
        aside; default: `ASIDE` on a GPU, none on the CPU.
    """

    def __init__(self, plan: RowPlan, out: Tensor, most: int | None = None) -> None:
        self._plan, self._rows = plan, RowsOnDevices(out)
        self._most = (ASIDE if out.is_cuda else 0) if most is None else most
        self._aside: dict[tuple[int, torch.device, Any], _Captured] = {}
        self._bytes = 0

    def add(self, terms: Sequence[Term], segments: Tensor) -> None:
        for term in terms:
            if isinstance(term, Outer):
                self._put_aside(term, segments)
            elif isinstance(term, OneHot):
                rows = self._rows.on(term.of.values.device)
                self._plan.add_one_hot(rows, term.name, term.of, segments)
            else:
                rows = self._rows.on(term.gradients.device)
                self._plan.add_formed(rows, [(term.name, term.gradients)], term.rows)
        if self._bytes > self._most:
            self.finish()

    def _put_aside(self, term: Outer, segments: Tensor) -> None:
        name, left, right, kept = term
        device = left.device
        stream = torch.cuda.current_stream(device) if left.is_cuda else None
        key = id(segments), device, stream
        captured = self._aside.get(key)
        if captured is None:
            captured = self._aside[key] = _Captured(segments, self._rows.on(device), stream)
        captured.gradients.append((name, left, right))
        self._bytes += kept

    def finish(self) -> None:
        """Sketch what was put aside."""
        for captured in self._aside.values():
            with torch.cuda.stream(captured.stream):  # None: no stream
                self._plan.add(captured.rows, captured.gradients, captured.segments)
        self._aside.clear()
        self._bytes = 0
        self._rows.add_up()
