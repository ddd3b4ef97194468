"""What tests alone call (csrc/testing/): the GPU's arithmetic on the CPU, and the random bits.

Arrays are addresses of their first number, as in `_csrc`. Wheels do not have this module.
"""

from typing import Protocol

def philox4x32(c0: int, c1: int, c2: int, c3: int, key: int) -> tuple[int, int, int, int]:
    """The four words of one Philox4x32-10 block."""

def rank_update(
    *, v: int, v_stride: int, points: int, points_stride: int, k: int, m: int, alpha: float
) -> None:
    """The arithmetic of activedpo_fast._cuda.rank_update."""

class GreedyProblem:
    """A greedy selection, as addresses and numbers. See csrc/greedy/problem.h."""

    def __init__(
        self,
        *,
        n_candidates: int,
        dim: int,
        rows: int,
        row_stride: int,
        pairs: int,
        row_divisor: int,
        pair_divisor: int,
        reach: int,
        size: int,
        score: int,
        error_bound: int,
        left: int,
        inverse_cost: int,
        prompt: int,
        prompt_room: int,
        group: int,
        group_room: int,
        min_score: float,
        forced: int,
        n_forced: int,
        root_norm: float,
        root_error: float,
        base: int,
        directions: int,
        pulled: int,
        n_before: int,
        rounds: bool,
        n_picks: int,
        picks: int,
        scores: int,
        touched: int,
        count: int,
    ) -> None: ...

class PairNorms:
    """Pairs of rows whose norms are taken. See csrc/cuda/pair_norms.h."""

    def __init__(
        self,
        *,
        rows: int,
        row_stride: int,
        k: int,
        pairs: int,
        n_pairs: int,
        by_row: bool,
        row_norm: int,
        pair_norm: int,
    ) -> None: ...

class _GreedyBytes(Protocol):
    """The size of the selection's workspace in bytes."""

    def __call__(self, problem: GreedyProblem) -> int: ...

class _GreedySelect(Protocol):
    """By CPU threads: a block is one of them or, if wide, two groups of four."""

    def __call__(
        self, problem: GreedyProblem, *, room: int, begin: int, end: int, blocks: int, wide: bool
    ) -> None: ...

class _PairNormsOf(Protocol):
    """The arithmetic of activedpo_fast._cuda's function."""

    def __call__(self, given: PairNorms) -> None: ...

greedy_bytes_float32: _GreedyBytes
greedy_bytes_float64: _GreedyBytes
greedy_bytes_bfloat16: _GreedyBytes
greedy_bytes_float16: _GreedyBytes

greedy_select_float32: _GreedySelect
greedy_select_float64: _GreedySelect
greedy_select_bfloat16: _GreedySelect
greedy_select_float16: _GreedySelect

pair_norms_float32: _PairNormsOf
pair_norms_float64: _PairNormsOf
pair_norms_bfloat16: _PairNormsOf
pair_norms_float16: _PairNormsOf
