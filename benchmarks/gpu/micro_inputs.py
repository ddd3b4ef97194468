"""The inputs that the kernels are timed on, their floors, and the correct results."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from activedpo_fast.ops import reference

_MOST_SIGNS = 1 << 30  # of a dense projection whose result is checked


class Tokens(NamedTuple):
    """The operands of a layer's gradients, for runs of tokens; results are added to `out`."""

    out: Tensor  # float64 [n, k]
    left: Tensor  # bfloat16 [N, rows]
    right: Tensor  # bfloat16 [N, columns]
    segments: Tensor  # int64 [n, 3] on the CPU
    key: int
    method: str

    def padded(self) -> tuple[Tensor, Tensor]:
        """left [n, rows, T] and right [n, T, columns], zeros behind the shorter runs."""
        starts = self.segments[:, 0].tolist()
        pad = torch.nn.utils.rnn.pad_sequence
        sides = [
            pad(list(side.tensor_split(starts[1:])), batch_first=True)
            for side in (self.left, self.right)
        ]
        return sides[0].transpose(1, 2).contiguous(), sides[1]


@dataclass(frozen=True)
class Gradients:
    """A LoRA matrix's gradients: `count` responses of about `tokens` tokens.

    side: "A" for [rank, d] weights, "B" for [d, rank]. method: as for `ops.outer_sketch_`.
    """

    side: str
    rank: int
    d: int
    k: int
    count: int
    tokens: int
    key: int
    method: str = "sjlt"

    def of(self, method: str) -> Gradients:
        return replace(self, method=method)

    def shape(self) -> str:
        return f"{self.side}, r = {self.rank}, d = {self.d:,}, n = {self.count}"

    def make(self, device: str, seed: int) -> Tokens:
        generator = torch.Generator(device).manual_seed(seed)
        lengths = self._lengths()
        ends = lengths.cumsum(0)
        segments = torch.stack([ends - lengths, ends, torch.arange(self.count)], dim=1)
        rows, columns = (self.rank, self.d) if self.side == "A" else (self.d, self.rank)
        left, right = (
            torch.randn(int(ends[-1]), width, device=device, generator=generator).bfloat16()
            for width in (rows, columns)
        )
        out = torch.zeros(self.count, self.k, dtype=torch.float64, device=device)
        return Tokens(out, left, right, segments, self.key, self.method)

    def bytes(self) -> int:
        """Both sides read once in bfloat16, the sketches read and written once in float64."""
        return 2 * self._total() * (self.rank + self.d) + 2 * 8 * self.count * self.k

    def flops(self) -> int:
        """Of the gradients and, where it is dense, of the projection."""
        if self.method == "kronecker":
            a, b = reference.kronecker_sides(self.rank, self.d, self.k)
            return 2 * self._total() * a * b
        formed = 2 * self._total() * self.rank * self.d
        if self.method == "sjlt":
            return formed
        return formed + 2 * self.count * self.rank * self.d * self.k

    def error(self, inputs: Tokens, result: Tensor) -> float | None:
        """|result - definition| / |definition|, over all numbers; None if that would take long."""
        if self.method == "rademacher" and self.rank * self.d * self.k > _MOST_SIGNS:
            return None
        expected = reference.outer_sketch(
            inputs.left, inputs.right, inputs.segments, self.key, self.k, self.count, self.method
        )
        return relative(result, expected)

    def _lengths(self) -> Tensor:
        """The same for every seed, from 2/3 to 4/3 of `tokens`."""
        generator = torch.Generator().manual_seed(0)
        spread = torch.rand(self.count, generator=generator) * 2 / 3 + 2 / 3
        return (self.tokens * spread).long().clamp(min=1)

    def _total(self) -> int:
        return int(self._lengths().sum())


class Scored(NamedTuple):
    """Logits bfloat16 [n, V], targets int64 [n] and weights float32 [n]."""

    logits: Tensor
    targets: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Logits:
    """`count` scored tokens with their logits."""

    count: int
    vocabulary: int

    def shape(self) -> str:
        return f"{self.count} × {self.vocabulary:,}"

    def make(self, device: str, seed: int) -> Scored:
        generator = torch.Generator(device).manual_seed(seed)
        logits = torch.randn(self.count, self.vocabulary, device=device, generator=generator)
        targets = torch.randint(self.vocabulary, (self.count,), device=device, generator=generator)
        weights = torch.randn(self.count, device=device, generator=generator)
        return Scored(logits.mul_(3).bfloat16(), targets, weights)

    def bytes(self) -> int:
        """Logits read once and their gradient written once, in bfloat16."""
        return 2 * 2 * self.count * self.vocabulary

    def flops(self) -> int:
        return 0

    def error(self, inputs: Scored, result: tuple[Tensor, Tensor]) -> float:
        """The larger of the relative errors of log-probs and gradient."""
        logps = inputs.logits.double().log_softmax(1)
        taken = logps.gather(1, inputs.targets[:, None]).squeeze(1)
        gradient = logps.exp_().neg_()
        gradient.scatter_add_(1, inputs.targets[:, None], torch.ones_like(taken)[:, None])
        gradient.mul_(inputs.weights[:, None])
        return max(relative(result[0], taken), relative(result[1], gradient))


class Update(NamedTuple):
    """A symmetric matrix float64 [k, k], and rows float64 [m, k] whose products are subtracted from
    it."""

    matrix: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Matrix:
    """An update of rank m of a k x k matrix, as selection makes of an explicit inverse."""

    k: int
    m: int

    def shape(self) -> str:
        return f"k = {self.k:,}, rank {self.m}"

    def make(self, device: str, seed: int) -> Update:
        generator = torch.Generator(device).manual_seed(seed)
        rows = torch.randn(self.m, self.k, device=device, generator=generator, dtype=torch.float64)
        return Update(torch.eye(self.k, device=device, dtype=torch.float64), rows / self.k)

    def bytes(self) -> int:
        """One triangle read and written once, in float64, and the rows."""
        return 8 * (self.k * (self.k + 1) + self.m * self.k)

    def flops(self) -> int:
        return 0  # float64 arithmetic has another rate than the one measured

    def error(self, inputs: Update, result: Tensor) -> float:
        """Of the lower triangle."""
        expected = torch.eye(self.k, device=result.device, dtype=torch.float64)
        expected -= inputs.rows.T @ inputs.rows
        return relative(result.tril(), expected.tril())


def relative(result: Tensor, expected: Tensor) -> float:
    """|result - expected| / |expected|, in float64; not a number is never small."""
    return float((result.double() - expected).norm() / expected.norm())
