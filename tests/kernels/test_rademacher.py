"""The Rademacher kernels against their float64 definition, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from activedpo_fast.ops import reference

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from activedpo_fast.kernels import lora_grad_rademacher as module  # noqa: E402
from activedpo_fast.kernels.lora_grad_rademacher import lora_grad_rademacher, rademacher_rows  # noqa: E402
from activedpo_fast.kernels.slabs import TILES, parts, tile_for  # noqa: E402
from tests.support.quick import slow_except  # noqa: E402

# The interpreter also computes with the rows that pad a block, whose memory holds arbitrary values.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEY = 2**64 - 12345
# Two bfloat16 pieces: 2^-17 where they are rounded, 2^-16 in the interpreter, which truncates.
BOUND = {
    torch.float32: 1e-6,
    torch.bfloat16: 1e-5 if DEVICE == "cuda" else 2**-16,
    torch.float16: 1e-5 if DEVICE == "cuda" else 2**-16,
}
DTYPES = list(BOUND)
SEGMENTS = torch.tensor([[0, 9, 3], [20, 41, 0], [5, 5, 1], [5, 30, 3], [9, 10, 2], [0, 3, 0]])


def rows_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def sketched(
    left: torch.Tensor, right: torch.Tensor, segments: torch.Tensor, n: int, k: int
) -> torch.Tensor:
    out = torch.zeros(n, k, dtype=torch.float64, device=DEVICE)
    lora_grad_rademacher(out, left, right, segments, KEY)
    return out


def error_of_rows(found: torch.Tensor, expected: torch.Tensor) -> float:
    scale = expected.norm(dim=1).clamp(min=1e-300)
    return float(((found - expected).norm(dim=1) / scale).max())


@pytest.mark.parametrize("k", slow_except([257], [1, 64, 257]))
def test_signs_are_those_of_the_reference(k):
    x = torch.eye(131, device=DEVICE)
    out = torch.zeros(131, k, device=DEVICE)
    rademacher_rows(out, x, KEY)
    signs = reference.rademacher_signs(torch.arange(131), torch.arange(k), KEY).to(DEVICE)
    assert torch.equal(out.sign().long(), signs)
    assert torch.allclose(out.abs() * k**0.5, torch.ones_like(out), rtol=1e-6)


@triton.jit
def write_signs_kernel(
    out, first: tl.int64, column_block: tl.int32, key: tl.int64, P: tl.constexpr
):
    i = tl.arange(0, P)
    signs = module._signs(first.to(tl.int64) + i, column_block, key.to(tl.int64), P)
    tl.store(out + tl.arange(0, 128)[:, None] * P + i[None, :], signs.to(tl.float32))


@pytest.mark.parametrize("first", [0, 2**32 - 7, 2**40])
@pytest.mark.parametrize("key", [0, 1, 2**63 + 5])
def test_signs_at_far_positions(first, key):
    out = torch.zeros(128, 16, device=DEVICE)
    write_signs_kernel[(1,)](out, first, 3, key - 2**64 if key >= 2**63 else key, P=16)
    columns = torch.arange(3 * 128, 4 * 128)
    signs = reference.rademacher_signs(torch.arange(first, first + 16), columns, key)
    assert torch.equal(out.cpu().long(), signs.T)


@pytest.mark.parametrize(
    "n, length, k",
    [(1, 1, 1), (2, 1, 200), (3, 301, 65), (33, 130, 128), (65, 7, 64), (130, 37, 129)],
)
def test_rows(n, length, k):
    x = rows_of(n, length + 2)[:, 1:-1]  # a part of another tensor
    around = torch.full((n, k + 4), 7.0, device=DEVICE)
    out = around[:, 2:-2]
    out.fill_(1.0)
    rademacher_rows(out, x, KEY)
    assert error_of_rows(out - 1.0, reference.rademacher(x.double(), KEY, k)) < 3e-6
    assert (around[:, :2] == 7).all() and (around[:, -2:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns", [(1, 1), (4, 33), (131, 3), (20, 35), (3, 130)])
def test_gradients(dtype, rows, columns):
    left, right = rows_of(41, rows).to(dtype), rows_of(41, columns).to(dtype)
    out = torch.full((5, 140), 3.0, dtype=torch.float64, device=DEVICE)
    lora_grad_rademacher(out, left, right, SEGMENTS, KEY)
    expected = reference.outer_sketch(
        left.double(), right.double(), SEGMENTS, KEY, 140, 5, "rademacher"
    )
    assert error_of_rows(out[[0, 2, 3]] - 3, expected[[0, 2, 3]]) < BOUND[dtype]
    assert (out[[1, 4]] == 3).all()  # an empty segment, and none


@pytest.mark.parametrize(
    "rows, columns", [(3, 1500), pytest.param(300, 30, marks=pytest.mark.slow), (17, 200)]
)
def test_many_slabs_with_poisoned_scratch(rows, columns, monkeypatch):
    """Slabs of whole rows and of parts of rows; earlier contents of their memory are not used."""
    empty = torch.empty
    monkeypatch.setattr(module, "_SLAB_BYTES", 2 * 2 * 32 * 2048)  # 2048 numbers of a gradient
    monkeypatch.setattr(
        torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan"))
    )
    left, right = rows_of(6, rows).bfloat16(), rows_of(6, columns).bfloat16()
    segments = torch.tensor([[0, 4, 1], [4, 6, 0]])
    expected = reference.outer_sketch(
        left.double(), right.double(), segments, KEY, 40, 2, "rademacher"
    )
    found = sketched(left, right, segments, 2, 40)
    assert error_of_rows(found, expected) < BOUND[torch.bfloat16]


def test_many_slabs_of_ready_rows(monkeypatch):
    monkeypatch.setattr(module, "_SLAB_BYTES", 2 * 3 * 32 * 256)
    monkeypatch.setattr(module, "_ROWS", 2)
    x, out = rows_of(5, 1000), torch.zeros(5, 70, device=DEVICE)
    rademacher_rows(out, x, KEY)
    assert error_of_rows(out, reference.rademacher(x.double(), KEY, 70)) < 1e-6


@pytest.mark.parametrize(
    "rows, columns",
    [
        (1, 1),
        (1, 5000),
        (16, 4096),
        (256, 900),
        (7, 300),
        (3000, 16),
        (3000, 2),
        (500, 517),
        (2000, 1),
    ],
)
@pytest.mark.parametrize("positions", [2048, 2176, 65536])
def test_parts_cover_a_gradient_once(rows, columns, positions):
    seen = torch.zeros(rows, columns, dtype=torch.int64)
    for part in parts(rows, columns, positions, 128):
        assert part.top % 16 == 0 and part.begin % 16 == 0
        assert part.whole or part.width % 128 == 0
        assert part.height * part.width <= positions
        assert part.top + part.height <= rows
        seen[part.top : part.top + part.height, part.begin : part.begin + part.width] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("scale", [1e-8, 1e-30])
def test_small_rows_beside_large_ones(scale):
    x = rows_of(2, 200)
    x[1] *= scale
    out = torch.zeros(2, 100, device=DEVICE)
    rademacher_rows(out, x, KEY)
    assert error_of_rows(out, reference.rademacher(x.double(), KEY, 100)) < 1e-6

    left, right = rows_of(8, 3), rows_of(8, 50)
    left[4:] *= scale
    segments = torch.tensor([[0, 4, 0], [4, 8, 1]])
    expected = reference.outer_sketch(
        left.double(), right.double(), segments, KEY, 100, 2, "rademacher"
    )
    assert error_of_rows(sketched(left, right, segments, 2, 100), expected) < 1e-6


def test_numbers_that_are_not_finite():
    x = torch.ones(3, 5, device=DEVICE)
    x[0, 2], x[1, 3] = float("inf"), float("nan")
    out = torch.zeros(3, 20, device=DEVICE)
    rademacher_rows(out, x, KEY)
    assert out[0].isinf().all() and out[1].isnan().all() and out[2].isfinite().all()


def test_same_bits_again_and_in_any_order_of_rows():
    left, right = rows_of(41, 5).bfloat16(), rows_of(41, 40).bfloat16()
    first = sketched(left, right, SEGMENTS, 4, 90)
    assert torch.equal(first, sketched(left, right, SEGMENTS, 4, 90))
    order = [4, 1, 0, 5, 2, 3]  # segments of one row keep their order
    assert torch.equal(first, sketched(left, right, SEGMENTS[order], 4, 90))


def test_nothing_to_add():
    left, right = rows_of(4, 3), rows_of(4, 5)
    for segments in (torch.zeros(0, 3, dtype=torch.int64), torch.tensor([[2, 2, 0]])):
        assert (sketched(left, right, segments, 2, 10) == 0).all()
    rademacher_rows(torch.zeros(0, 4, device=DEVICE), torch.zeros(0, 9, device=DEVICE), KEY)
    rademacher_rows(torch.zeros(3, 4, device=DEVICE), torch.zeros(3, 0, device=DEVICE), KEY)


def test_a_tile_fits_the_gpu():
    for pieces in TILES:
        for rows in (1, 32, 33, 64, 65, 500):
            small, large = (tile_for(rows, pieces, shared) for shared in (101376, 232448))
            assert small.shared(pieces) <= 101376
            assert small.rows == min(large.rows, 64) and large.rows >= min(rows, 128)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "n, length, k", [(1, 300_007, 1000), (130, 100_003, 1029), (64, 4097, 8192)]
)
def test_large_rows(n, length, k):
    x, around = rows_of(n, length), torch.full((n, k + 64), 7.0, device=DEVICE)
    out = around[:, 32:-32]
    out.zero_()
    scratch = torch.full((1 << 27,), float("nan"), device=DEVICE)
    del scratch  # the kernels are given its memory
    rademacher_rows(out, x, KEY)
    assert error_of_rows(out, reference.rademacher(x.double(), KEY, k)) < 1e-6
    assert (around[:, :32] == 7).all() and (around[:, -32:] == 7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns", [(16, 4097), (5121, 16), (128, 1100), (1000, 513)])
def test_large_gradients_keep_their_bits(dtype, rows, columns):
    tokens, n, k = 3000, 70, 1500
    left, right = rows_of(tokens, rows).to(dtype), rows_of(tokens, columns).to(dtype)
    starts = torch.randint(0, tokens - 200, (2 * n,), generator=torch.Generator().manual_seed(2))
    segments = torch.stack([starts, starts + torch.arange(2 * n), torch.arange(2 * n) % n], 1)
    expected = reference.outer_sketch(
        left.double(), right.double(), segments, KEY, k, n, "rademacher"
    )
    scratch = torch.full((1 << 27,), float("nan"), device=DEVICE)
    del scratch
    found = sketched(left, right, segments, n, k)
    assert error_of_rows(found, expected) < BOUND[dtype]
    for _ in range(10):
        assert torch.equal(found, sketched(left, right, segments, n, k))


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    memory = torch.zeros(2**31 + 1000, device=DEVICE)
    x = memory.as_strided((2, 1000), (2**31, 1))
    x.copy_(rows_of(2, 1000))
    out = torch.zeros(2, 500, device=DEVICE)
    rademacher_rows(out, x, KEY)
    assert error_of_rows(out, reference.rademacher(x.double(), KEY, 500)) < 1e-6
