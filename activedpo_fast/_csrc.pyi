"""Sketches and selection on the CPU (csrc/bindings/); called through activedpo_fast.ops.

Arrays are addresses of their first number; 0 is a null pointer. Strides count numbers, unless said
otherwise, and keys are below 2^64. ops checks shapes, dtypes and strides and keeps tensors alive.
"""

from typing import Protocol

class RowSource:
    """Rows in memory, `stride` bytes apart, or in open files. See csrc/common/rows.h."""

    def __init__(
        self,
        *,
        base: int,
        stride: int,
        descriptors: int,
        file_of_row: int,
        offset_of_row: int,
        row_bytes: int,
    ) -> None: ...

class Candidates:
    """Pairs and their running scores. See csrc/scores/refresh_bounds.h, like the next two."""

    def __init__(
        self,
        *,
        n: int,
        pairs: int,
        row_divisor: int,
        pair_divisor: int,
        reach: int,
        left: int,
        inverse_cost: int,
        score: int,
        error_bound: int,
        inherited: int,
        version: int,
    ) -> None: ...

class Directions:
    """The directions that lower scores."""

    count: int
    def __init__(
        self, *, unit: int, stride: int, norm: int, error: int, turn: int, count: int
    ) -> None: ...

class Memory:
    """Workspace that is kept from call to call."""

    def __init__(
        self,
        *,
        products: int,
        capacity: int,
        row_version: int,
        place: int,
        margin: float,
        block: int,
    ) -> None: ...

class _RowSketch(Protocol):
    """out += S x for n rows of `length` numbers, `out` k wide. See csrc/sketch/."""

    def __call__(
        self,
        *,
        out: int,
        out_stride: int,
        x: int,
        x_stride: int,
        n: int,
        length: int,
        k: int,
        key: int,
        num_threads: int,
    ) -> None: ...

class _OuterSketch(Protocol):
    """Sketches of sums of outer products over segments of tokens. See csrc/sketch/outer.h."""

    def __call__(
        self,
        *,
        out: int,
        out_stride: int,
        left: int,
        left_stride: int,
        right: int,
        right_stride: int,
        segments: int,
        n_segments: int,
        rows: int,
        columns: int,
        k: int,
        key: int,
        sides: tuple[int, int],
        place: tuple[int, int],
        num_threads: int,
    ) -> None: ...

class _PairNorms(Protocol):
    """Returns -1, or the number of a row that could not be read. See csrc/scores/pair_norms.h."""

    def __call__(
        self,
        *,
        row_norm: int,
        pair_norm: int,
        rows: RowSource,
        k: int,
        pairs: int,
        n_pairs: int,
        by_row: bool,
        num_threads: int,
    ) -> int: ...

class _RefreshBounds(Protocol):
    """Returns how many contenders there are, or -1 - r if row r could not be read."""

    def __call__(
        self,
        *,
        contenders: int,
        touched: int,
        rows: RowSource,
        k: int,
        candidates: Candidates,
        directions: Directions,
        memory: Memory,
        num_threads: int,
    ) -> int: ...

sjlt_float32: _RowSketch
sjlt_float64: _RowSketch
rademacher_float32: _RowSketch
rademacher_float64: _RowSketch

outer_sjlt_float32: _OuterSketch
outer_sjlt_float64: _OuterSketch
outer_sjlt_bfloat16: _OuterSketch
outer_rademacher_float32: _OuterSketch
outer_rademacher_float64: _OuterSketch
outer_rademacher_bfloat16: _OuterSketch
outer_kronecker_float32: _OuterSketch
outer_kronecker_float64: _OuterSketch
outer_kronecker_bfloat16: _OuterSketch

pair_norms_float32: _PairNorms
pair_norms_float64: _PairNorms
pair_norms_bfloat16: _PairNorms
pair_norms_float16: _PairNorms

refresh_bounds_float32: _RefreshBounds
refresh_bounds_float64: _RefreshBounds
refresh_bounds_bfloat16: _RefreshBounds
refresh_bounds_float16: _RefreshBounds
