"""Operations on NVIDIA GPUs (csrc/cuda/); called through activedpo_fast.ops.

Arrays are addresses of their first number on the device, as in `_csrc`. `device` is a device's
number and `stream` the address of a CUDA stream of it; work is started there and not waited for.
Calls of CUDA that fail are a RuntimeError.
"""

from typing import Protocol

architectures: str
runtime_version: str

def device_count() -> int:
    """How many devices can be used; 0 without a driver."""

def serves(major: int, minor: int) -> bool:
    """Whether there is code for a compute capability."""

def problem() -> str:
    """Why no device can be used; empty where one can."""

def rank_update(
    *,
    v: int,
    v_stride: int,
    points: int,
    points_stride: int,
    k: int,
    m: int,
    alpha: float,
    device: int,
    stream: int,
) -> None:
    """V += alpha * sum of p p^T, on and below the diagonal. See csrc/cuda/rank_update.h."""

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
    """Make the picks begin..end-1, of which earlier calls have made those before.

    room: memory of the size that greedy_bytes returns, with any content before the first call.
    """

    def __call__(
        self, problem: GreedyProblem, *, room: int, begin: int, end: int, device: int, stream: int
    ) -> None: ...

class _PairNormsOf(Protocol):
    """Writes row_norm and pair_norm."""

    def __call__(self, given: PairNorms, *, device: int, stream: int) -> None: ...

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
