"""Sketching captured gradients: at once on the CPU, those of many layers together on a GPU.

A kernel launch for every weight would take longer than its work, so on a GPU what the hooks capture
is put aside, up to a bound on memory, and then sketched with a few launches.

In a model that is split over devices, each layer's part is sketched where the layer is, and the
parts are added up at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from activedpo_fast.gradients.hooks import Consumer
from activedpo_fast.gradients.sketch import RowPlan
from activedpo_fast.gradients.terms import OneHot, Outer, Term

# Bytes of h and g that are kept from layer to layer. More would save launches of which the GPU
# sees few already: this much keeps it busy for longer than launching the next sketches takes.
_ASIDE = 1 << 30


@contextmanager
def sketch_into(plan: RowPlan, out: Tensor) -> Iterator[Consumer]:
    """Give a consumer that adds the gradients of each layer's parameters to the rows `out`.

    out: [n, plan.dim]. It has all of them once the context ends without an error.
    """
    with rows_on_devices(out) as rows_on:
        sketching = _Sketching(plan, rows_on, _ASIDE if out.is_cuda else 0)
        yield sketching.add
        sketching.finish()


@contextmanager
def rows_on_devices(out: Tensor) -> Iterator[Callable[[torch.device], Tensor]]:
    """Give a function that returns the rows, like `out`, to add to on a device.

    Once the context ends without an error, `out` is the sum of those of all devices.
    """
    rows = {out.device: out}

    def rows_on(device: torch.device) -> Tensor:
        if device not in rows:
            rows[device] = torch.zeros_like(out, device=device)
        return rows[device]

    yield rows_on
    for device, part in rows.items():
        if device != out.device:
            out += part.to(out.device)


@dataclass
class _Captured:
    """What was captured with the same segments, on the same device and stream."""

    segments: Tensor
    rows: Tensor
    stream: Any
    gradients: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)


class _Sketching:
    def __init__(self, plan: RowPlan, rows_on: Callable[[torch.device], Tensor], most: int) -> None:
        self._plan, self._rows_on, self._most = plan, rows_on, most
        self._aside: dict[tuple[int, torch.device, Any], _Captured] = {}
        self._addresses: set[int] = set()  # layers share inputs
        self._bytes = 0

    def add(self, terms: Sequence[Term], segments: Tensor) -> None:
        for term in terms:
            if isinstance(term, Outer):
                self._put_aside(term, segments)
            elif isinstance(term, OneHot):
                rows = self._rows_on(term.of.values.device)
                self._plan.add_one_hot(rows, term.name, term.of, segments)
            else:
                rows = self._rows_on(term.gradients.device)
                self._plan.add_formed(rows, [(term.name, term.gradients)], term.rows)
        if self._bytes > self._most:
            self.finish()

    def _put_aside(self, term: Outer, segments: Tensor) -> None:
        device = term.left.device
        stream = torch.cuda.current_stream(device) if term.left.is_cuda else None
        key = id(segments), device, stream
        if key not in self._aside:
            self._aside[key] = _Captured(segments, self._rows_on(device), stream)
        self._aside[key].gradients.append((term.name, term.left, term.right))
        for tensor in (term.left, term.right):
            if tensor.data_ptr() not in self._addresses:
                self._addresses.add(tensor.data_ptr())
                self._bytes += tensor.nbytes

    def finish(self) -> None:
        """Sketch what was put aside."""
        for captured in self._aside.values():
            with torch.cuda.stream(captured.stream):  # None: no stream
                self._plan.add(captured.rows, captured.gradients, captured.segments)
        self._aside.clear()
        self._addresses.clear()
        self._bytes = 0
