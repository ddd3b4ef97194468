"""The definition of every operation in plain PyTorch; each backend is tested against it.

Random bits come from Philox4x32-10 (J. K. Salmon et al., "Parallel Random Numbers: As Easy as 1, 2,
3", SC 2011). The counter is (block, low word; block, high word; column block; stream) and the key
has 64 bits: every bit is a pure function of where it is used. Integers are int64 tensors that hold
unsigned 32-bit values.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

SJLT_STREAM = 1
RADEMACHER_STREAM = 2
KRONECKER_STREAMS = (3, 4, 5)  # left side, right side, places
SIGNS = 16  # added to the stream of a hash's buckets: the stream of its signs
RUN = 16  # consecutive positions that share a draw of the bucket, if the buckets allow it

_MASK = 0xFFFFFFFF
# Memory limits, with no effect on values: numbers in a chunk's largest tensor, and in the gradients
# formed at a time.
_TILE = 1 << 20
_GRADIENTS = 1 << 26
_V_ROWS = 512


def philox4x32(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return random words of counters (c0, c1, c2, c3): int64 of one shape, values below 2^32."""
    key_lo, key_hi = key & _MASK, key >> 32
    for _ in range(10):
        a_hi, a_lo = _multiply(c0, 0xD2511F53)
        b_hi, b_lo = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = b_hi ^ c1 ^ key_lo, b_lo, a_hi ^ c3 ^ key_hi, a_lo
        key_lo, key_hi = (key_lo + 0x9E3779B9) & _MASK, (key_hi + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def sjlt_hash(
    positions: Tensor, key: int, k: int, stream: int = SJLT_STREAM
) -> tuple[Tensor, Tensor]:
    """Return bucket (0..k-1) and sign (+1, -1) of each position, both int64.

    Positions come in runs of W = gcd(k, 16). Position p = W r + l has the bucket u xor l, where
    u = floor(word k / 2^32) with word r mod 4 of Philox block r // 4; its sign is bit p mod 32
    (set: -1) of word (p // 32) mod 4 of block p // 128 of the stream of signs. So a run covers W
    adjacent buckets, one position in each, and two positions of different runs collide with
    probability 1/k.
    """
    width = math.gcd(k, RUN)
    run = positions // width
    word = _word(run >> 2, run & 3, stream, key)
    sign_word = _word(positions >> 7, (positions >> 5) & 3, stream + SIGNS, key)
    return ((word * k) >> 32) ^ (positions % width), 1 - 2 * ((sign_word >> (positions & 31)) & 1)


def sjlt_hash_of_rows(rows: Tensor, columns: int, key: int, k: int) -> tuple[Tensor, Tensor]:
    """Return `sjlt_hash` of all positions in some rows of a matrix, [rows, columns] each.

    rows: int64. The position of (r, c) is r columns + c. Words are drawn once for all the adjacent
    positions that use them.
    """
    width = math.gcd(k, RUN)
    positions = rows[:, None] * columns + torch.arange(columns, device=rows.device)
    word = _words_along(positions, width, SJLT_STREAM, key)
    sign_word = _words_along(positions, 32, SJLT_STREAM + SIGNS, key)
    return ((word * k) >> 32) ^ (positions % width), 1 - 2 * ((sign_word >> (positions & 31)) & 1)


def rademacher_signs(positions: Tensor, columns: Tensor, key: int) -> Tensor:
    """Return signs (+1, -1), int64 [positions, columns], of the projection matrix of `rademacher`.

    Entry (p, j) is bit j mod 32 (set: -1) of word (j // 32) mod 4 of Philox block p of column block
    j // 128.
    """
    blocks, block_of_column = torch.unique(columns >> 7, return_inverse=True)
    p, b = torch.broadcast_tensors(positions[:, None], blocks[None, :])
    words = torch.stack(_words(p, b, RADEMACHER_STREAM, key), dim=-1)
    word = words[:, block_of_column, (columns >> 5) & 3]
    return 1 - 2 * ((word >> (columns & 31)) & 1)


def sjlt(x: Tensor, key: int, k: int) -> Tensor:
    """Sparse Johnson-Lindenstrauss sketch, one non-zero per column (CountSketch): [n, D] -> [n, k].

    out[i, j] = sum of sign(p) x[i, p] over the positions p with bucket(p) = j, so that
    E<Sx, Sy> = <x, y>. With independent signs, the variance depends only on how often two positions
    collide: with probability 1/k, or never within a run, so it is CountSketch's or slightly less.
    Summed in float64, returned in x's dtype. Source: Charikar, Chen, Farach-Colton, "Finding
    frequent items in data streams" (ICALP 2002); Kane and Nelson, "Sparser Johnson-Lindenstrauss
    transforms" (JACM 2014). Keeping runs together, for memory locality, is in the spirit of
    FlashSketch's block permutations (arXiv 2602.06071).
    """
    n, length = x.shape
    out = torch.zeros(n, k, dtype=torch.float64, device=x.device)
    step = max(1, _TILE // max(n, 4))
    for begin in range(0, length, step):
        positions = torch.arange(begin, min(begin + step, length), device=x.device)
        bucket, sign = sjlt_hash(positions, key, k)
        out.index_add_(1, bucket, x[:, begin : begin + step].double() * sign)
    return out.to(x.dtype)


def rademacher(x: Tensor, key: int, k: int) -> Tensor:
    """Dense projection by random signs over sqrt(k): [n, D] -> [n, k].

    Summed in float64, returned in x's dtype. Source: Achlioptas, "Database-friendly random
    projections" (JCSS 2003).
    """
    n, length = x.shape
    out = torch.zeros(n, k, dtype=torch.float64, device=x.device)
    width = 4096
    for first in range(0, k, width):
        columns = torch.arange(first, min(first + width, k), device=x.device)
        step = max(1, _TILE // len(columns))
        for begin in range(0, length, step):
            positions = torch.arange(begin, min(begin + step, length), device=x.device)
            signs = rademacher_signs(positions, columns, key)
            out[:, first : first + width] += x[:, begin : begin + step].double() @ signs.double()
    scale: float = k**0.5
    return (out / scale).to(x.dtype)


def kronecker_sides(rows: int, columns: int, k: int) -> tuple[int, int]:
    """Return sizes a and b, a b <= k, to project the sides of a [rows, columns] gradient to.

    A side no longer than sqrt(k) keeps its length; both sides do if rows * columns <= k.
    """
    if rows * columns <= k:
        return rows, columns
    side = math.isqrt(k)
    if rows <= side:
        return rows, k // rows
    if columns <= side:
        return k // columns, columns
    return side, side


@lru_cache(4096)
def kronecker_place(key: int, k: int) -> tuple[int, int]:
    """Return (first, stride), which place a matrix's runs among the k / W runs of buckets.

    A run has W = gcd(k, 16) buckets. Run r goes to (first + r stride) mod (k / W). With words w_0,
    w_1, ... of the blocks 0, 1, ... of the stream of places, first = floor(w_0 k / W / 2^32), and
    stride is the first of the same multiples of w_1, w_2, ... that is coprime to k / W. So no two
    runs of a matrix collide, and collisions between the runs of two matrices are scattered, not
    one long overlap or none.
    """
    runs = k // math.gcd(k, RUN)
    block = 0
    drawn: list[int] = []
    while len(drawn) < 2 or math.gcd(drawn[-1], runs) > 1:
        words = _words(torch.tensor([block]), 0, KRONECKER_STREAMS[2], key)
        for word in words:
            drawn.append(int(word) * runs >> 32)
            if len(drawn) > 1 and math.gcd(drawn[-1], runs) == 1:
                break
        block += 1
    return drawn[0], drawn[-1]


def kronecker(x: Tensor, key: int, k: int) -> Tensor:
    """Sketch both sides of a gradient separately: [n, rows, columns] -> [n, k].

    With (a, b) = kronecker_sides(rows, columns, k), entry (p, q) is added, with the product of two
    signs, to place left(p) b + right(q) of a matrix of a b numbers, whose runs `kronecker_place`
    maps to the buckets. left and right are the hashes of `sjlt_hash` into a and b buckets, or the
    position itself on a side that keeps its length. A gradient is a sum of outer products g hᵀ, so
    g and h can be projected before they are multiplied.
    Summed in float64, returned in x's dtype. Source of the idea: LoGra, Choe et al.,
    arXiv 2405.13954; here with sparse projections.
    """
    n, rows, columns = x.shape
    a, b = kronecker_sides(rows, columns, k)
    left, right, _ = KRONECKER_STREAMS
    device = x.device
    row_bucket, row_sign = kronecker_hash(torch.arange(rows, device=device), rows, a, key, left)
    column_bucket, column_sign = kronecker_hash(
        torch.arange(columns, device=device), columns, b, key, right
    )
    # One side after the other, a few rows at a time: [rows, columns] more numbers would not fit.
    both = torch.zeros(n, a, b, dtype=torch.float64, device=device)
    step = max(1, _TILE // (max(n, 1) * columns))
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        signed = x[:, part].double() * (row_sign[part, None] * column_sign)
        narrow = both.new_zeros(n, signed.shape[1], b).index_add_(2, column_bucket, signed)
        both.index_add_(1, row_bucket[part], narrow)
    return kronecker_placed(both.flatten(1), key, k).to(x.dtype)


def kronecker_placed(both: Tensor, key: int, k: int) -> Tensor:
    """Place projections to a b numbers, [n, a b], among k buckets: [n, k]."""
    width = math.gcd(k, RUN)
    first, stride = kronecker_place(key, k)
    place = torch.arange(both.shape[1], device=both.device)
    bucket = (first + place // width * stride) % (k // width) * width + place % width
    return both.new_zeros(len(both), k).index_add_(1, bucket, both)


def kronecker_hash(
    positions: Tensor, length: int, buckets: int, key: int, stream: int
) -> tuple[Tensor, Tensor]:
    """Return bucket and sign of positions on a side of `length`, both int64; see `kronecker`."""
    bucket, sign = sjlt_hash(positions, key, buckets, stream)
    return (positions if buckets == length else bucket), sign


def outer_sketch(
    left: Tensor, right: Tensor, segments: Tensor, key: int, k: int, n: int, method: str
) -> Tensor:
    """Return sketches of the gradients sum_t left_t right_tᵀ of runs of tokens: float64 [n, k].

    Args:
        left: [N, rows], right: [N, columns]. segments: int64 [S, 3] of (start, end, row): the
            tokens start..end-1 add their gradient, flattened row-major, to that row of the result.
        method: "sjlt", "rademacher" or "kronecker".

    Products are formed in float32 (float64 for float64 tensors).
    """
    dtype = sum_dtype(left.dtype)
    out = torch.zeros(n, k, dtype=torch.float64, device=left.device)
    for part in segments.split(max(1, _GRADIENTS // (left.shape[1] * right.shape[1]))):
        gradients = torch.stack(
            [
                left[start:end].to(dtype).T @ right[start:end].to(dtype)
                for start, end, _ in part.tolist()
            ]
        ).double()
        if method == "kronecker":
            sketched = kronecker(gradients, key, k)
        else:
            sketched = (sjlt if method == "sjlt" else rademacher)(gradients.flatten(1), key, k)
        out.index_add_(0, part[:, 2].to(out.device), sketched)
    return out


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Return the high and low words of the 64-bit product, by halves of b (int64 has 63 bits)."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def _word(block: Tensor, index: Tensor, stream: int, key: int) -> Tensor:
    """Return word `index` (0..3) of each block of a stream."""
    words = torch.stack(_words(block, 0, stream, key))
    return words.gather(0, index.unsqueeze(0)).squeeze(0)


def _words_along(positions: Tensor, width: int, stream: int, key: int) -> Tensor:
    """Return word p // width of a stream for each p of `positions`, whose rows are adjacent."""
    number = positions // width
    first = number[:, :1] >> 2
    count = (positions.shape[1] + width - 2) // width // 4 + 2  # blocks that a row may touch
    blocks = first + torch.arange(count, device=positions.device)
    words = torch.stack(_words(blocks, 0, stream, key), dim=-1).flatten(1)
    return words.gather(1, number - 4 * first)


def _words(
    block: Tensor, column: Tensor | int, stream: int, key: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return philox4x32(
        block & _MASK,
        block >> 32,
        torch.zeros_like(block) + column,
        torch.full_like(block, stream),
        key,
    )


def response_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target], [..., V] and [...] -> [...], float32 (float64 for float64)."""
    logits = logits.to(sum_dtype(logits.dtype))
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def response_logp_grad(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.response_logp_grad`."""
    widened = logits.to(sum_dtype(logits.dtype))
    normalizer = widened.logsumexp(dim=1, keepdim=True)
    logps = (widened.gather(1, targets[:, None]) - normalizer)[:, 0]
    gradient = (widened - normalizer).exp_().mul_(-weights[:, None])
    gradient.scatter_add_(1, targets[:, None], weights[:, None])
    return logps, gradient.to(logits.dtype)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a floating dtype is summed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def rank_update_(v: Tensor, points: Tensor, alpha: float) -> None:
    """See `ops.rank_update_`. Works on some rows of V at a time; the CPU uses this too."""
    # More rows would go further above the diagonal; fewer make products slower.
    for end in range(_V_ROWS, len(v) + _V_ROWS, _V_ROWS):
        rows = slice(end - _V_ROWS, end)
        v[rows, :end].addmm_(points[:, rows].T, points[:, :end], alpha=alpha)


def pair_lengths(rows: Any, pairs: Tensor, by_row: bool) -> tuple[Tensor, Tensor]:
    """See `ops.scores.pair_lengths`."""
    norms = torch.zeros(len(rows), dtype=torch.float64)
    used = pairs.unique()
    for part in used.split(_rows_at_a_time(rows)):
        norms[part] = torch.linalg.vector_norm(_widened(rows, part), dim=1).cpu()
    divisor = torch.where(norms > 0, norms, 1.0) if by_row else torch.ones_like(norms)
    lengths = norms.new_empty(len(pairs))
    for part in torch.arange(len(pairs)).split(_rows_at_a_time(rows)):
        a, b = (
            (_widened(rows, side) / divisor[side, None].to(rows.device))
            for side in pairs[part].unbind(1)
        )
        lengths[part] = torch.linalg.vector_norm(a - b, dim=1).cpu()
    return norms, lengths


def advance(state: Any) -> Tensor:
    """See `ops.scores.advance`: every remaining candidate sees every direction."""
    stale = (state.remaining & (state.version < state.count)).nonzero().flatten()
    used = state.pairs[stale].unique()
    start = int(state.version[stale].min()) if len(stale) else state.count
    new = state.unit[start : state.count, : state.rows.shape[1]].to(
        state.rows.device, torch.float64
    )
    dots = torch.zeros(len(state.rows), state.count - start, dtype=torch.float64)
    for part in used.split(_rows_at_a_time(state.rows)):
        dots[part] = (_widened(state.rows, part) @ new.T).cpu() / state.row_divisor[part, None]
    state.touched += len(used)

    first, second = state.pairs[stale].unbind(1)
    score, error_bound, inherited = (
        x[stale] for x in (state.score, state.error_bound, state.inherited)
    )
    for s in range(start, state.count):
        unseen = (state.version[stale] <= s).double()
        f = (dots[first, s - start] - dots[second, s - start]) / state.pair_divisor[stale]
        f = f.abs() * state.norm[s] * unseen
        error = state.error[s] * state.reach[stale] * unseen
        most = torch.minimum(f + error, (score + error_bound).sqrt())
        score = (score - f.square()).clamp(min=0)
        error_bound = error_bound + 2 * f * error + error.square()
        turned = state.turn[s] * (score + error_bound).sqrt() * unseen
        error_bound = error_bound + 2 * f * turned + turned.square()
        inherited = inherited + state.turn[s] * most * unseen
    state.score[stale], state.error_bound[stale], state.inherited[stale] = (
        score,
        error_bound,
        inherited,
    )
    state.version[stale] = state.count

    remaining = state.remaining.nonzero().flatten()
    scale = 1.0 if state.inverse_cost is None else state.inverse_cost[remaining]
    lower = (state.score[remaining] - state.error_bound[remaining]) * scale
    upper = (state.score[remaining] + state.error_bound[remaining]) * scale
    contenders: Tensor = remaining[upper >= lower.max()] if len(remaining) else remaining
    return contenders


def _widened(rows: Any, numbers: Tensor) -> Tensor:
    found = rows[numbers.to(rows.device)] if isinstance(rows, Tensor) else rows.take(numbers)
    return found.to(torch.float64)


def _rows_at_a_time(rows: Any) -> int:
    width: int = rows.shape[1]
    return max(1, (1 << 23) // max(1, width))  # 64 MiB of float64
