"""Sketches: random projections of gradients, laid over a model's parameters.

A sketch is a pure function of (seed, parameter name, position in the parameter). Batch size, order,
thread count, device and adapter name do not change the rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from activedpo_fast import ops
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.ops import reference

METHODS = (*ops.METHODS, "none")

# Components that wrappers put into parameter names: DDP, torch.compile, FSDP, checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# How the components begin that PEFT puts before an adapter's name.
_BEFORE_ADAPTER = (
    *("lora_", "hada_", "lokr_", "vera_", "ia3_", "oft_", "boft_", "hra_", "randlora_", "road_"),
    *("modules_to_save", "trainable_tokens_delta", "ln_tuning_layers", "prompt_encoder"),
)


@dataclass(frozen=True)
class Sketch:
    """A projection of the gradient of all trainable parameters to `dim` numbers.

    Args:
        method: "sjlt" (one nonzero per column: as many operations as the gradient has entries),
            "rademacher" (dense signs over sqrt(dim): dim times as many), "kronecker" (projects the
            sides of each gradient separately, `reference.kronecker`: the cheapest for large
            weights) or "none" (the gradient itself).
        dim: 1 to 2^31 - 1; always None for "none".
        seed: 0 to 2^63 - 1.

    `E<Sx, Sy> = <x, y>` for the three projections. For the first two,
    `Var<Sx, Sy> = (|x|^2 |y|^2 + <x, y>^2 - 2 sum x_i^2 y_i^2) / dim`. For "sjlt" it can be
    slightly less: adjacent entries never meet. For "kronecker" it is not spread evenly: two entries
    of a gradient that share a row or column meet in a bucket about 1 / sqrt(dim) of the time, so
    sides longer than they are projected to weigh more.

    Raises:
        ActiveDPOError: any other value.

    Examples:
        >>> from activedpo_fast import FeatureExtractor, Sketch
        >>> Sketch()
        Sketch(method='sjlt', dim=8192, seed=0)
        >>> extractor = FeatureExtractor(model, Sketch("rademacher", dim=512, seed=1))
        >>> extractor.gradients(selector.tokenize(pool)).gradients.shape
        torch.Size([10, 512])
    """

    method: str = "sjlt"
    dim: int | None = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ActiveDPOError(
                f"unknown sketch method {self.method!r}; known: {', '.join(METHODS)}"
            )
        if self.method == "none":
            object.__setattr__(self, "dim", None)
        elif not _is_int(self.dim) or not 1 <= self.dim < 2**31:  # type: ignore[operator]
            raise ActiveDPOError(
                f"sketch dim is {self.dim!r}, expected an integer from 1 to 2^31 - 1"
            )
        if not _is_int(self.seed) or not 0 <= self.seed < 2**63:
            raise ActiveDPOError(
                f"sketch seed is {self.seed!r}, expected an integer from 0 to 2^63 - 1"
            )

    def key(self, name: str) -> int:
        """The 64-bit Philox key of a parameter, from the seed and its canonical name."""
        digest = hashlib.blake2b(
            f"{self.seed}\0{name}".encode(), digest_size=8, person=b"activedpo/sketch"
        ).digest()
        return int.from_bytes(digest, "little")


class RowPlan(Protocol):
    """How gradients of parameters become rows of `dim` numbers; see `SketchPlan`."""

    @property
    def dim(self) -> int: ...

    def add(
        self, out: Tensor, gradients: Sequence[tuple[str, Tensor, Tensor]], segments: Tensor
    ) -> None: ...

    def add_one_hot(self, out: Tensor, name: str, of: ops.OneHotSum, segments: Tensor) -> None: ...

    def add_formed(
        self, out: Tensor, gradients: Iterable[tuple[str, Tensor]], rows: Tensor
    ) -> None: ...


class SketchPlan:
    """A sketch applied to a model's parameters.

    parameters: (canonical name, shape) of every trainable parameter. With method "none" a row is
        their gradients, flattened row-major and concatenated in this order; otherwise the order
        has no effect.

    Raises ActiveDPOError if there are no parameters or two have the same name.
    """

    def __init__(self, sketch: Sketch, parameters: Sequence[tuple[str, torch.Size]]) -> None:
        if not parameters:
            raise ActiveDPOError("a sketch needs at least one trainable parameter")
        self.sketch = sketch
        self._shapes: dict[str, torch.Size] = {}
        self._matrices: dict[str, tuple[int, int]] = {}
        self._offsets: dict[str, int] = {}
        self._keys: dict[str, int] = {}
        self.total = 0  # numbers in one gradient
        for name, shape in parameters:
            if name in self._shapes:
                raise ActiveDPOError(f"two parameters have the canonical name {name!r}")
            self._shapes[name] = torch.Size(shape)
            self._matrices[name] = matrix_shape(shape)
            self._offsets[name] = self.total
            self._keys[name] = sketch.key(name)
            self.total += math.prod(shape)

    @property
    def dim(self) -> int:
        """The length of a row: the sketch's dim, or that of the whole gradient for "none"."""
        return self.total if self.sketch.dim is None else self.sketch.dim

    def add(
        self, out: Tensor, gradients: Sequence[tuple[str, Tensor, Tensor]], segments: Tensor
    ) -> None:
        """Add parameters' gradients, sums of left_t right_tᵀ over runs of tokens, to rows.

        Args:
            out: [n, dim], float64; any floating dtype with method "none".
            gradients: (canonical name that the plan was made with, left, right) of each parameter.
                left: [N, rows], right: [N, columns] of a [rows, columns] weight; right is [N, 1]
                for a bias. float32, float64 or bfloat16, on out's device. A name may be there more
                than once.
            segments: int64 [S, 3] on the CPU, of (start, end, row): the tokens start..end-1 add to
                that row of `out`.

        Raises ActiveDPOError, naming the parameter at fault, on anything that does not fit.
        """
        if out.dim() != 2 or out.shape[1] != self.dim:
            raise ActiveDPOError(f"out has shape {tuple(out.shape)}, expected [n, {self.dim}]")
        for name, left, right in gradients:
            self._require_shape(name, left, right)
        if self.sketch.method == "none":
            self._add_whole(out, gradients, segments)
            return
        weights = [
            ops.OuterSum(name, left, right, self._keys[name]) for name, left, right in gradients
        ]
        ops.outer_sketches_(out, weights, segments, self.sketch.method)

    def add_one_hot(self, out: Tensor, name: str, of: ops.OneHotSum, segments: Tensor) -> None:
        """Add a parameter's gradients to which each token adds in one row or column.

        out, segments: as in `add`. name: canonical name that the plan was made with.

        Raises ActiveDPOError if the parameter does not fit.
        """
        if self._shapes.get(name) != torch.Size(of.shape):
            raise ActiveDPOError(f"{name}: gradients of shape {of.shape} do not fit the plan")
        if self.sketch.method != "none":
            ops.one_hot_sketch_(out, of, segments, self._keys[name], self.sketch.method)
            return
        rows, places, values = of.tokens(segments)
        block = slice(self._offsets[name], self._offsets[name] + math.prod(of.shape))
        for row in rows.unique().tolist():
            here = rows == row
            of.add_to(out[row, block].view(of.shape), places[here], values[here])

    def add_formed(
        self, out: Tensor, gradients: Iterable[tuple[str, Tensor]], rows: Tensor
    ) -> None:
        """Add gradients that are formed already.

        Args:
            out: as in `add`.
            gradients: (canonical name that the plan was made with, gradients [m, *shape]) of each
                parameter, of its shape, in any floating dtype, on out's device. For "kronecker", a
                parameter of more than two dimensions is a matrix of rows of its last one.
            rows: int64 [m], the row of `out` that each is added to, each row once.

        What is added is what `add` gives for outer products with these sums.

        Raises ActiveDPOError if a gradient does not fit.
        """
        for name, gradient in gradients:
            shape = self._shapes.get(name)
            if shape is None or gradient.shape != (len(rows), *shape):
                raise ActiveDPOError(
                    f"{name}: gradients of shape {list(gradient.shape)} do not fit the plan"
                )
            if gradient.numel() == 0:
                continue
            to = rows.to(out.device)
            if self.sketch.method == "none":
                block = slice(self._offsets[name], self._offsets[name] + shape.numel())
                out[:, block].index_add_(0, to, gradient.reshape(len(rows), -1).to(out.dtype))
                continue
            # Numbers of half precision are summed in float32.
            gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            matrices = gradient.reshape(len(rows), *matrix_shape(shape))
            out.index_add_(0, to, self._sketches_of(matrices, self._keys[name]).to(out.dtype))

    def _sketches_of(self, matrices: Tensor, key: int) -> Tensor:
        if self.sketch.method == "kronecker":
            return reference.kronecker(matrices, key, self.dim)
        add = ops.sjlt_ if self.sketch.method == "sjlt" else ops.rademacher_
        found = matrices.new_zeros(len(matrices), self.dim)
        add(found, matrices.flatten(1), key)
        return found

    def _add_whole(
        self, out: Tensor, gradients: Sequence[tuple[str, Tensor, Tensor]], segments: Tensor
    ) -> None:
        runs = segments.tolist()
        for name, left, right in gradients:
            block = slice(self._offsets[name], self._offsets[name] + math.prod(self._shapes[name]))
            dtype = torch.promote_types(left.dtype, torch.float32)
            for start, end, row in runs:
                gradient = left[start:end].to(dtype).T @ right[start:end].to(dtype)
                out[row, block] += gradient.flatten()

    def _require_shape(self, name: str, left: Tensor, right: Tensor) -> None:
        """Check what only the plan knows; tensors that do not fit are the operation's errors."""
        expected = self._matrices.get(name)
        if expected is None:
            raise ActiveDPOError(f"parameter {name!r} is not in the sketch's plan")
        if (left.shape[1], right.shape[1]) != expected:
            raise ActiveDPOError(
                f"{name}: gradients have shape {[left.shape[1], right.shape[1]]}, expected "
                f"{list(expected)}"
            )


def canonical_name(name: str, adapter: str | None) -> str:
    """Return the parameter's name without the components of wrappers and the adapter's name.

    "module.base_model.model.q_proj.lora_A.default.weight" with adapter "default" gives
    "base_model.model.q_proj.lora_A.weight", so that sketches of one gradient agree under DDP,
    FSDP and torch.compile, and for any adapter name.
    """
    kept: list[str] = []
    for part in name.split("."):
        if part in _WRAPPERS:
            continue
        if part == adapter and kept and kept[-1].startswith(_BEFORE_ADAPTER):
            continue
        kept.append(part)
    return ".".join(kept)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return a parameter's shape as a matrix: all but the last dimension are rows; a vector is one
    column."""
    if len(shape) < 2:
        return math.prod(shape), 1
    return math.prod(shape[:-1]), shape[-1]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
