"""The Triton sketches of gradients and ready rows against their definitions in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from activedpo_fast import ops  # noqa: E402
from activedpo_fast.kernels.lora_grad_sketch import lora_grad_sketches  # noqa: E402
from activedpo_fast.kernels.sjlt_rows import sjlt_rows  # noqa: E402
from activedpo_fast.ops import reference  # noqa: E402
from tests.ops.test_ops import KEY, random  # noqa: E402
from tests.support.quick import slow_except  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METHODS = ["sjlt", "kronecker"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
both_modes = pytest.mark.parametrize("deterministic", [True, False])
both_methods = pytest.mark.parametrize("method", METHODS)
# The interpreter is slow, so each shape is tested with two of the four combinations, which have
# both methods and both modes, and one of the two only in `make test-slow`. On a GPU,
# test_large_gradients_equal_the_cpus tests all of them.
IN_TURN = [[("sjlt", True), ("kronecker", False)], [("sjlt", False), ("kronecker", True)]]
two_of_four = pytest.mark.parametrize(
    ("method", "deterministic"),
    [*IN_TURN[0], *(pytest.param(*how, marks=pytest.mark.slow) for how in IN_TURN[1])],
)
# Empty, of one token, overlapping, two of one row, and out of order.
SEGMENTS = torch.tensor([[11, 40, 2], [0, 10, 0], [10, 11, 3], [10, 10, 1], [3, 36, 2]])


def sketch(
    left, right, segments, k: int, n: int, method: str, deterministic: bool, key: int = KEY
) -> torch.Tensor:
    out = torch.zeros(n, k, dtype=torch.float64, device=DEVICE)
    lora_grad_sketches(
        out, [(left.to(DEVICE), right.to(DEVICE), key)], segments, method, deterministic
    )
    return out.cpu()


def define(left, right, segments, k: int, n: int, method: str, key: int = KEY) -> torch.Tensor:
    return reference.outer_sketch(left.double(), right.double(), segments, key, k, n, method)


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    assert bool(((found - expected).norm(dim=1) <= tolerance * expected.norm(dim=1)).all())


def one_segment(tokens: int) -> torch.Tensor:
    return torch.tensor([[0, tokens, 0]])


SHAPES = [
    (1, 1, 1, DTYPES[0]),
    (1, 100, 64, DTYPES[1]),
    (100, 1, 48, DTYPES[2]),
    (3, 17, 5, DTYPES[0]),
    (16, 300, 128, DTYPES[1]),
    (300, 17, 100, DTYPES[1]),
    (150, 4, 8, DTYPES[0]),
    (30, 150, 4096, DTYPES[2]),
    (70, 70, 7, DTYPES[1]),
    (65, 136, 256, DTYPES[0]),
]


@pytest.mark.parametrize(
    ("rows", "columns", "k", "dtype", "method", "deterministic"),
    [
        pytest.param(*shape, *how, marks=[pytest.mark.slow] if i % 2 == n else [])
        for i, shape in enumerate(SHAPES)
        for n, how in enumerate(IN_TURN[i // 2 % 2])
    ],
)
def test_equals_the_sketch_of_the_gradient(rows, columns, k, dtype, method, deterministic):
    left, right = random(40, rows).to(dtype), random(40, columns, seed=1).to(dtype)
    found = sketch(left, right, SEGMENTS, k, 5, method, deterministic)
    assert_near(found, define(left, right, SEGMENTS, k, 5, method))
    assert not found[1].any() and not found[4].any()


@two_of_four
@pytest.mark.parametrize(
    ("rows", "columns", "k", "key"),
    [(5, 290, 64, 2**64 - 1), (140, 20, 999, KEY), (33, 70, 4096, 5), (40, 40, 24, 2**64 - 1)],
)
def test_buckets_and_signs_are_those_of_the_definition(
    rows, columns, k, key, method, deterministic
):
    """Every position has its own number, small enough that nothing is rounded."""
    left = torch.eye(rows)
    right = torch.randint(-99, 99, (rows, columns), generator=torch.Generator().manual_seed(2))
    found = sketch(left, right.float(), one_segment(rows), k, 1, method, deterministic, key)
    assert torch.equal(found, define(left, right, one_segment(rows), k, 1, method, key))


@both_methods
def test_a_row_has_the_same_bits_with_any_other_rows(method):
    left, right = random(60, 5).float(), random(60, 150, seed=1).float()
    segments = torch.tensor(
        [[0, 9, 1], [9, 20, 3], [20, 43, 0], [43, 60, 1], [5, 30, 3], [50, 60, 3]]
    )
    whole = sketch(left, right, segments, 64, 4, method, True)
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    assert torch.equal(sketch(left, right, segments[order], 64, 4, method, True), whole)
    for row in (0, 1, 3):
        alone = sketch(left, right, segments[segments[:, 2] == row], 64, 4, method, True)
        assert torch.equal(alone[row], whole[row])
    moved = segments + torch.tensor([7, 7, 0])
    pad = torch.full((7, 1), float("nan"))
    shifted = sketch(
        torch.cat([pad.expand(7, 5), left]),
        torch.cat([pad.expand(7, 150), right]),
        moved,
        64,
        4,
        method,
        True,
    )
    assert torch.equal(shifted, whole)


@pytest.mark.filterwarnings("ignore:.* encountered in matmul:RuntimeWarning")
@both_modes
@both_methods
@pytest.mark.parametrize("bad", ["nan", "inf", "overflow"])
def test_values_that_are_not_finite_show_in_their_own_row_only(bad, method, deterministic):
    left, right = random(30, 4).float(), random(30, 40, seed=1).float()
    segments = torch.tensor([[0, 10, 0], [10, 20, 1], [20, 30, 2]])
    expected = define(left, right, segments, 64, 3, method)
    left[12, 3] = 1e30 if bad == "overflow" else float(bad)
    right[12] *= 1e20 if bad == "overflow" else 1.0
    found = sketch(left, right, segments, 64, 3, method, deterministic)
    assert not bool(found[1].isfinite().all())
    if deterministic:
        assert bool(found[1].isnan().all())
    assert_near(found[[0, 2]], expected[[0, 2]])


@both_modes
def test_small_and_large_rows_keep_their_accuracy(deterministic):
    left, right = random(80, 8).float(), random(80, 50, seed=1).float()
    segments = torch.stack([torch.arange(8) * 10, torch.arange(8) * 10 + 10, torch.arange(8)], 1)
    for row, scale in enumerate((1.0, 1e-8, 1e-30, 1e30, 0.0, 1e-4, 1e4)):
        left[row * 10 : row * 10 + 10] *= scale
    left[70:, 1:] *= 1e-8  # and small numbers next to large ones in one gradient
    found = sketch(left, right, segments, 64, 8, "sjlt", deterministic)
    assert_near(found, define(left, right, segments, 64, 8, "sjlt"))
    assert not found[4].any()


def test_powers_of_two_scale_the_result_exactly():
    left, right = random(40, 6).float(), random(40, 50, seed=1).float()
    whole = sketch(left, right, SEGMENTS, 64, 4, "sjlt", True)
    for one, other in ((40, 0), (-33, 20), (-80, -5)):
        scaled = sketch(left * 2.0**one, right * 2.0**other, SEGMENTS, 64, 4, "sjlt", True)
        assert torch.equal(scaled, whole * 2.0 ** (one + other))


@two_of_four
def test_adds_in_place_and_takes_any_strides(method, deterministic):
    left, right = random(40, 5).float(), random(40, 60, seed=1).float()
    start = random(5, 48, seed=2)
    expected = start + define(left, right, SEGMENTS, 48, 5, method)
    for offset in (0, 1, 4):
        wide = torch.full((5, 60), 9.0, dtype=torch.float64, device=DEVICE)
        wide[:, 7:55] = start
        lefts, rights = (
            torch.full((40, x.shape[1] + 11), float("nan"), device=DEVICE) for x in (left, right)
        )
        lefts[:, offset : offset + 5], rights[:, offset : offset + 60] = left, right
        weights = [(lefts[:, offset : offset + 5], rights[:, offset : offset + 60], KEY)]
        lora_grad_sketches(wide[:, 7:55], weights, SEGMENTS, method, deterministic)
        assert_near(wide[:, 7:55].cpu(), expected)
        assert bool((wide[:, :7] == 9).all()) and bool((wide[:, 55:] == 9).all())


@two_of_four
def test_many_weights_are_the_sum_of_each(method, deterministic):
    """Weights for all tiles and dtypes: some of the same shape, some that share an operand, one
    twice."""
    shapes = [(16, 40), (40, 16), (16, 40), (20, 50), (50, 20), (70, 70), (1, 30), (30, 1)]
    weights = [
        (random(40, rows, seed=i).to(dtype), random(40, columns, seed=i % 3).to(dtype), KEY + i)
        for dtype, some in ((torch.float32, shapes), (torch.bfloat16, shapes[:3]))
        for i, (rows, columns) in enumerate(some)
    ]
    weights.append(weights[3])
    out = torch.zeros(5, 96, dtype=torch.float64, device=DEVICE)
    there = [(left.to(DEVICE), right.to(DEVICE), key) for left, right, key in weights]
    lora_grad_sketches(out, there, SEGMENTS, method, deterministic)
    expected = sum(
        define(left, right, SEGMENTS, 96, 5, method, key) for left, right, key in weights
    )
    assert_near(out.cpu(), expected)


@both_modes
def test_launches_do_not_grow_with_the_weights(deterministic, monkeypatch):
    """One launch for all hashes, and one for the sketches of each tile. Deterministic sums need two
    more of each tile for bounds, and a last one."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    launched = []
    for kind in (JITFunction, InterpretedFunction):
        monkeypatch.setattr(kind, "run", lambda self, *args, **options: launched.append(self))
    weights = [
        (torch.ones(9, rows), torch.ones(9, columns), i)
        for i in range(64)
        for rows, columns in ((16, 64), (64, 16))
    ]
    out = torch.zeros(2, 96, dtype=torch.float64)
    lora_grad_sketches(out, weights, torch.tensor([[0, 4, 0], [4, 9, 1]]), "sjlt", deterministic)
    assert len(launched) == (8 if deterministic else 3)


@both_modes
def test_nothing_to_add(deterministic):
    none = torch.zeros(0, 3, dtype=torch.int64)
    left, right = random(4, 3).float(), random(4, 5, seed=1).float()
    assert not sketch(left, right, none, 8, 2, "sjlt", deterministic).any()
    assert not sketch(
        left[:0], right[:0], torch.tensor([[0, 0, 1]]), 8, 2, "sjlt", deterministic
    ).any()
    assert not sketch(left, right, torch.tensor([[2, 2, 1]]), 8, 2, "sjlt", deterministic).any()
    for shape in ((0, 4), (2, 0)):
        out = torch.zeros(shape[0], 8, device=DEVICE)
        sjlt_rows(out, torch.zeros(shape, device=DEVICE), KEY, deterministic)
        assert not out.any()


def ready(x: torch.Tensor, k: int, deterministic: bool) -> torch.Tensor:
    out = torch.zeros(len(x), k, device=DEVICE)
    sjlt_rows(out, x.to(DEVICE), KEY, deterministic)
    return out.cpu()


@pytest.mark.parametrize(
    ("n", "length", "k", "deterministic"),
    slow_except(
        [
            *((1, 1, 1, mode) for mode in (True, False)),
            *((3, 2500, 64, mode) for mode in (True, False)),
            *((9, 1024, 7, False), (1, 66000, 48, False), (5, 130, 4096, True)),
        ],
        [
            (*shape, mode)
            for shape in ((1, 1, 1), (3, 2500, 64), (9, 1024, 7), (1, 66000, 48), (5, 130, 4096))
            for mode in (True, False)
        ],
    ),
)
def test_ready_rows(n, length, k, deterministic):
    x = random(n, length).float()
    x[0] *= 1e-30
    found = ready(x, k, deterministic)
    assert_near(found.double(), reference.sjlt(x.double(), KEY, k), 1e-7)
    whole = torch.randint(-99, 99, x.shape, generator=torch.Generator().manual_seed(2)).float()
    assert torch.equal(ready(whole, k, deterministic), reference.sjlt(whole, KEY, k))


def test_ready_rows_do_not_depend_on_other_rows_and_are_added_in_place():
    x = random(10, 1500).float()
    x[3], x[6, 77] = 0, float("inf")
    found = ready(x, 64, True)
    assert not found[3].any() and bool(found[6].isnan().all())
    others = [0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert bool(found[others].isfinite().all())
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ready(x[order], 64, True)[:, :64].nan_to_num(7), found[order].nan_to_num(7))
    wide = torch.full((9, 80), 2.0, device=DEVICE)
    sjlt_rows(wide[:, 5:69], torch.cat([x, x], 1)[others].to(DEVICE)[:, :1500], KEY, True)
    assert torch.equal(wide[:, 5:69].cpu(), found[others] + 2)
    assert bool((wide[:, :5] == 2).all()) and bool((wide[:, 69:] == 2).all())


@pytest.mark.gpu
@both_modes
@both_methods
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "k"),
    [
        (16, 4096, 8192),
        (4096, 16, 8192),
        (4, 11008, 8192),
        (128, 4096, 8192),
        (4096, 256, 4096),
        (1000, 1000, 8191),
        (4097, 1, 8192),
        (31, 5000, 1000),
        (4096, 4096, 8192),
    ],
)
def test_large_gradients_equal_the_cpus(rows, columns, k, dtype, method, deterministic):
    left, right = random(700, rows).to(dtype), random(700, columns, seed=1).to(dtype)
    segments = torch.tensor([[300, 700, 2], [0, 130, 0], [130, 131, 3], [200, 520, 2]])
    expected = torch.zeros(5, k, dtype=torch.float64)
    ops.outer_sketch_(expected, left.float(), right.float(), segments, KEY, method)
    assert_near(sketch(left, right, segments, k, 5, method, deterministic), expected, 5e-6)


@pytest.mark.gpu
@both_methods
def test_the_same_bits_over_twenty_runs(method):
    left, right = random(4096, 16).bfloat16(), random(4096, 4096, seed=1).bfloat16()
    segments = torch.stack([torch.arange(64) * 64, torch.arange(64) * 64 + 64, torch.arange(64)], 1)
    first = sketch(left, right, segments, 8192, 64, method, True)
    for _ in range(20):
        poison = torch.full((1 << 24,), float("nan"), device=DEVICE)
        del poison  # the next run is given its memory
        assert torch.equal(sketch(left, right, segments, 8192, 64, method, True), first)
    x = random(20, 1 << 20).float()
    rows = ready(x, 8192, True)
    assert all(torch.equal(ready(x, 8192, True), rows) for _ in range(20))


@pytest.mark.gpu
def test_segments_that_change_are_copied_again():
    left, right = random(40, 8).float(), random(40, 64, seed=1).float()
    segments = torch.tensor([[0, 20, 0], [20, 40, 1]])
    for end in (40, 30):
        segments[1, 1] = end
        assert_near(
            sketch(left, right, segments, 64, 2, "sjlt", True),
            define(left, right, segments, 64, 2, "sjlt"),
        )
