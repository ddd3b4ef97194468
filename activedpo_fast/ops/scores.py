"""The selection's two operations on all candidates, on the backend that `backends` chooses."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.ops import backends, reference
from activedpo_fast.progress import progress_bar

if TYPE_CHECKING:
    from activedpo_fast import _csrc
    from activedpo_fast.store.rows import StoredRows

_PAD = 16  # directions are zero-padded to a multiple of this: kDotAlign of row_dot_products.h
DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_PAIRS_AT_A_TIME = 2**16  # between two updates of the progress bar
_PRODUCTS_BYTES = 2**30  # up to this size, products of rows and directions are cached

# Error of the product of a row with a direction, over their norms. csrc/scores/row_dot_products.h
# sums 512 products in 16 lanes (8 for float64) and adds these sums in float64: 32 (64) roundings,
# plus a few others.
DOT_ERROR = {torch.float32: 40 * 2.0**-24, torch.float64: 128 * 2.0**-53}


@dataclass
class ScoreState:
    """Running scores of N pairs of rows, and the directions that lower them; used by `advance`.

    With f = phi . w for a pair's feature phi and a direction w, a direction lowers a score by f^2.

    Attributes:
        rows: [R, k], in memory or `StoredRows`.
        pairs: int64 [N, 2]; row_divisor: float64 [R]; pair_divisor: float64 [N]; reach: float64
            [N]; see `PairFeatures`. remaining: bool [N]; inverse_cost: float64 [N] or None; see
            `Eligible`.
        score, error_bound, inherited: float64 [N], and version: int32 [N]; see `RunningScores`. A
            score has seen the first `version` directions.
        unit: [capacity, at least k], directions divided by their norms, then zeros; float64 for
            float64 rows and float32 for others, as are the products with rows.
        norm, error, turn: float64 [capacity]. With e = error * reach, a direction adds
            2 |f| e + e^2 to an error bound; then, with t = turn * sqrt(score + error_bound) after
            that, it adds 2 |f| t + t^2. To `inherited` it adds turn times the upper bound of |f|:
            the smaller of |f| + e and the previous sqrt(score + error_bound).
        count: number of directions so far.
        touched: number of rows that `advance` has read, counting repeats.

    Everything except the rows is contiguous and on the CPU.
    """

    rows: Tensor | StoredRows
    pairs: Tensor
    row_divisor: Tensor
    pair_divisor: Tensor
    reach: Tensor
    remaining: Tensor
    inverse_cost: Tensor | None
    score: Tensor
    error_bound: Tensor
    inherited: Tensor
    version: Tensor
    unit: Tensor
    norm: Tensor
    error: Tensor
    turn: Tensor
    count: int = 0
    touched: int = 0
    cpp: _CppAdvance | None = None  # state that the C++ backend keeps between calls

    @classmethod
    def start(
        cls,
        rows: Tensor | StoredRows,
        pairs: Tensor,
        row_divisor: Tensor,
        pair_divisor: Tensor,
        reach: Tensor,
        remaining: Tensor,
        inverse_cost: Tensor | None,
        score: Tensor,
        error_bound: Tensor,
        capacity: int,
    ) -> ScoreState:
        """Return scores that have seen no direction yet, with room for `capacity` directions."""
        # Avoid a power-of-two stride between directions: they would share few cache lines.
        width = (rows.shape[1] + _PAD - 1) // _PAD * _PAD + _PAD
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        norm, error, turn = torch.zeros(3, capacity, dtype=torch.float64)
        return cls(
            rows,
            pairs,
            row_divisor,
            pair_divisor,
            reach,
            remaining,
            inverse_cost,
            score,
            error_bound,
            torch.zeros_like(score),
            torch.zeros(len(score), dtype=torch.int32),
            torch.zeros(capacity, width, dtype=dtype),
            norm,
            error,
            turn,
        )

    def append(self, w: Tensor, *, error: float, turn: float) -> None:
        """Append a direction w, float64 [k], known to within `error`."""
        norm = float(torch.linalg.vector_norm(w))
        if norm > 0:
            self.unit[self.count, : len(w)] = w / norm
        self.norm[self.count] = norm
        self.error[self.count] = error + DOT_ERROR[self.unit.dtype] * norm
        self.turn[self.count] = turn
        self.count += 1


def advance(state: ScoreState) -> Tensor:
    """Bring scores up to date until every candidate whose value may be the largest is up to date.

    A value is score (times inverse_cost), known to within error_bound (times inverse_cost). The
    backend decides which other candidates to bring up to date as well: the reference does all.

    Returns:
        int64 [m], ascending: the up-to-date remaining candidates whose values may be the largest;
        there is at least one if any candidate remains.

    Raises:
        ActiveDPOError: a row that cannot be read.
    """
    if backends.choose("advance", state.rows.device.type) == "reference":
        return reference.advance(state)
    if state.cpp is None:
        state.cpp = _CppAdvance(state)
    return state.cpp(state)


def pair_lengths(
    rows: Tensor | StoredRows, pairs: Tensor, *, by_row: bool, show_progress: bool | None = False
) -> tuple[Tensor, Tensor]:
    """Return norms of rows, and lengths of the differences of pairs of them.

    Args:
        rows: [R, k], floating, in memory or on disk. pairs: int64 [N, 2] on the CPU.
        by_row: divide each row by its norm (unless zero) before taking the difference.
        show_progress: a bar over the pairs of rows on disk, which are read for the first time here;
            None shows it on a terminal only.

    Returns:
        (float64 [R], zero for rows in no pair; float64 [N]), on the CPU. Sums are float64.

    Raises:
        ActiveDPOError: a row that cannot be read.
    """
    backend = backends.choose("pair_lengths", rows.device.type, rows.dtype)
    if backend == "reference":
        return reference.pair_lengths(rows, pairs, by_row)
    rows = _readable(rows)
    if backend == "cuda":
        from activedpo_fast import _cuda

        assert isinstance(rows, Tensor)
        stream = torch.cuda.current_stream(rows.device)
        return lengths_there(
            rows, pairs, by_row, _cuda, device=stream.device_index, stream=stream.cuda_stream
        )
    from activedpo_fast import _csrc

    norms = torch.zeros(len(rows), dtype=torch.float64)
    lengths = torch.empty(len(pairs), dtype=torch.float64)
    function = getattr(_csrc, f"pair_norms_{DTYPES[rows.dtype]}")
    source = _row_source(rows)
    show = False if isinstance(rows, Tensor) else show_progress
    with progress_bar(show, total=len(pairs), desc="reading rows", unit="pair") as bar:
        done = 0
        for part in pairs.contiguous().split(_pairs_at_a_time(rows)):
            if not isinstance(rows, Tensor):
                rows.verify(part.flatten())
            unread = function(
                row_norm=norms.data_ptr(),
                pair_norm=lengths[done:].data_ptr(),
                rows=source,
                k=rows.shape[1],
                pairs=part.data_ptr(),
                n_pairs=len(part),
                by_row=by_row,
                num_threads=torch.get_num_threads(),
            )
            if unread >= 0:
                raise _unreadable(unread)
            done += len(part)
            bar.update(len(part))
    return norms, lengths


def lengths_there(
    rows: Tensor, pairs: Tensor, by_row: bool, module: ModuleType, **where: int
) -> tuple[Tensor, Tensor]:
    """Return `pair_lengths` of rows with contiguous numbers, by an extension module's function for
    GPUs, called with `where`."""
    pairs = pairs.to(rows.device).contiguous()
    norms = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    lengths = torch.empty(len(pairs), dtype=torch.float64, device=rows.device)
    given = module.PairNorms(
        rows=rows.data_ptr(),
        row_stride=rows.stride(0),
        k=rows.shape[1],
        pairs=pairs.data_ptr(),
        n_pairs=len(pairs),
        by_row=by_row,
        row_norm=norms.data_ptr(),
        pair_norm=lengths.data_ptr(),
    )
    getattr(module, f"pair_norms_{DTYPES[rows.dtype]}")(given, **where)
    return norms.cpu(), lengths.cpu()


class _CppAdvance:
    """The C++ backend's view of a state, with its workspace between calls."""

    def __init__(self, state: ScoreState) -> None:
        from activedpo_fast import _csrc

        self._rows = _readable(state.rows)
        self._source = _row_source(self._rows)
        self._refresh_bounds = getattr(_csrc, f"refresh_bounds_{DTYPES[self._rows.dtype]}")
        self._candidates = _csrc.Candidates(
            n=len(state.pairs),
            pairs=state.pairs.data_ptr(),
            row_divisor=state.row_divisor.data_ptr(),
            pair_divisor=state.pair_divisor.data_ptr(),
            reach=state.reach.data_ptr(),
            left=state.remaining.data_ptr(),
            inverse_cost=0 if state.inverse_cost is None else state.inverse_cost.data_ptr(),
            score=state.score.data_ptr(),
            error_bound=state.error_bound.data_ptr(),
            inherited=state.inherited.data_ptr(),
            version=state.version.data_ptr(),
        )
        self._directions = _csrc.Directions(
            unit=state.unit.data_ptr(),
            stride=state.unit.stride(0),
            norm=state.norm.data_ptr(),
            error=state.error.data_ptr(),
            turn=state.turn.data_ptr(),
            count=0,
        )
        self._place = torch.full((len(self._rows),), -1, dtype=torch.int32)
        self._row_version = torch.zeros(len(self._rows), dtype=torch.int32)
        capacity = len(state.unit)
        fits = len(self._rows) * capacity * state.unit.element_size() <= _PRODUCTS_BYTES
        # Not cleared: pages that are never written use no memory.
        self._products = torch.empty(
            len(self._rows) * capacity if fits else 0, dtype=state.unit.dtype
        )
        self._memory = _csrc.Memory(
            products=self._products.data_ptr() if fits else 0,
            capacity=capacity,
            row_version=self._row_version.data_ptr(),
            place=self._place.data_ptr(),
            margin=0.01,
            block=0,
        )
        self._contenders = torch.empty(len(state.pairs), dtype=torch.int64)
        self._touched = torch.zeros(1, dtype=torch.int64)

    def __call__(self, state: ScoreState) -> Tensor:
        self._directions.count = state.count
        found = self._refresh_bounds(
            contenders=self._contenders.data_ptr(),
            touched=self._touched.data_ptr(),
            rows=self._source,
            k=self._rows.shape[1],
            candidates=self._candidates,
            directions=self._directions,
            memory=self._memory,
            num_threads=torch.get_num_threads(),
        )
        if found < 0:
            raise _unreadable(-1 - found)
        state.touched = int(self._touched)
        return self._contenders[:found].clone()


def _pairs_at_a_time(rows: Tensor | StoredRows) -> int:
    if isinstance(rows, Tensor):
        return _PAIRS_AT_A_TIME
    # Rows are verified, then read again: by then the system must not have dropped them.
    return min(_PAIRS_AT_A_TIME, max(1024, 2**26 // rows.row_bytes))


def _readable(rows: Tensor | StoredRows) -> Tensor | StoredRows:
    """Return rows in a layout that C++ can read: the numbers of a row are contiguous."""
    if isinstance(rows, Tensor) and rows.stride(1) != 1:
        return rows.contiguous()
    return rows


def _row_source(rows: Tensor | StoredRows) -> _csrc.RowSource:
    from activedpo_fast import _csrc

    if isinstance(rows, Tensor):
        size = rows.element_size()
        return _csrc.RowSource(
            base=rows.data_ptr(),
            stride=rows.stride(0) * size,
            descriptors=0,
            file_of_row=0,
            offset_of_row=0,
            row_bytes=rows.shape[1] * size,
        )
    return _csrc.RowSource(
        base=0,
        stride=0,
        descriptors=rows.descriptors.data_ptr(),
        file_of_row=rows.file_of_row.data_ptr(),
        offset_of_row=rows.offset_of_row.data_ptr(),
        row_bytes=rows.row_bytes,
    )


def _unreadable(row: int) -> ActiveDPOError:
    return ActiveDPOError(
        f"row {row} of the gradient rows on disk cannot be read: was a file of the feature store "
        "changed or cut short?"
    )
