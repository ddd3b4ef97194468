"""Philox, the reference definitions, the C++ kernels against them, and the choice of backend."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from activedpo_fast import ops
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.ops import backends, reference
from tests.support.native import module_for_tests

KEY = 0x9E3779B97F4A7C15
OPERATIONS = ["sjlt", "rademacher"]

needs_cpp = pytest.mark.skipif(backends._csrc is None, reason="the C++ extension is not built")

# Random123's published known answers for philox4x32-10: (counter, key, block).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def sketch(operation: str, x: torch.Tensor, key: int, k: int) -> torch.Tensor:
    """Through ops, whichever backend is active."""
    out = torch.zeros(x.shape[0], k, dtype=x.dtype)
    (ops.sjlt_ if operation == "sjlt" else ops.rademacher_)(out, x, key)
    return out


def define(operation: str, x: torch.Tensor, key: int, k: int) -> torch.Tensor:
    return (reference.sjlt if operation == "sjlt" else reference.rademacher)(x, key, k)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_reference_gives_the_known_answers(counter, key, expected):
    words = reference.philox4x32(*(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_cpp_gives_the_known_answers(counter, key, expected):
    assert module_for_tests().philox4x32(*counter, key) == expected


@pytest.mark.parametrize(("k", "width"), [(1000, 8), (4096, 16), (999, 1)])
def test_sjlt_definition_by_hand(k, width):
    """Position 166, in runs of gcd(k, 16): its run's word the bucket, bit 6 of a word the sign."""
    position, run, lane = 166, 166 // width, 166 % width
    one = torch.tensor([1])
    words = reference.philox4x32(run // 4 * one, one * 0, one * 0, one * reference.SJLT_STREAM, KEY)
    bucket = (int(words[run % 4]) * k >> 32) ^ lane
    signs = reference.philox4x32(one, one * 0, one * 0, one * (reference.SJLT_STREAM + 16), KEY)
    x = torch.zeros(1, 169, dtype=torch.float64)
    x[0, position] = 2.5
    expected = torch.zeros(1, k, dtype=torch.float64)
    expected[0, bucket] = -2.5 if int(signs[1]) >> 6 & 1 else 2.5
    assert torch.equal(sketch("sjlt", x, KEY, k), expected)


def test_sjlt_runs_land_side_by_side_and_meet_others_evenly():
    """No two positions of a run share a bucket; of positions in different runs, 1/k of the pairs
    do."""
    k, length = 64, 4096
    meetings = 0
    for key in range(20):
        bucket, _ = reference.sjlt_hash(torch.arange(length), key, k)
        runs = bucket.view(-1, 16)
        assert torch.equal(runs.sort(dim=1).values, (runs[:, :1] // 16 * 16) + torch.arange(16))
        counts = torch.bincount(bucket, minlength=k).double()
        meetings += float((counts * (counts - 1)).sum())
    expected = 20 * length * (length - 16) / k
    # Runs land on 4 groups of 16 buckets: 256 runs, of which each pair meets or not.
    standard_error = 16 * (20 * 256 * 255 * 2 * (1 / 4) * (3 / 4)) ** 0.5
    assert abs(meetings - expected) < 4.5 * standard_error


def test_rademacher_definition_by_hand():
    """Entry (5, 2*128 + 3*32 + 7): bit 7 of word 3 of block 5 of column block 2."""
    one = torch.tensor([1])
    words = reference.philox4x32(5 * one, 0 * one, 2 * one, one * reference.RADEMACHER_STREAM, KEY)
    j, k = 2 * 128 + 3 * 32 + 7, 400
    x = torch.zeros(1, 9, dtype=torch.float64)
    x[0, 5] = 2.5
    sign = -1 if int(words[3]) >> 7 & 1 else 1
    assert float(sketch("rademacher", x, KEY, k)[0, j]) == pytest.approx(sign * 2.5 / 20, rel=1e-15)


@needs_cpp
@pytest.mark.parametrize("k", [1, 5, 131, 1000, 8192])
def test_bits_are_those_of_the_reference(k, monkeypatch):
    """Unit vectors show every position's bucket and sign (or row of signs)."""
    monkeypatch.setenv("ACTIVEDPO_BACKEND", "cpp")
    eye = torch.eye(203)
    bucket, sign = reference.sjlt_hash(torch.arange(203), KEY, k)
    expected = torch.zeros(203, k)
    expected[torch.arange(203), bucket] = sign.float()
    assert torch.equal(sketch("sjlt", eye, KEY, k), expected)

    signs = reference.rademacher_signs(torch.arange(203), torch.arange(k), KEY)
    assert torch.equal(sketch("rademacher", eye, KEY, k).sign(), signs.float())


@needs_cpp
@pytest.mark.parametrize("key", [0, 1, 2**32, 2**64 - 1])
def test_bits_agree_far_into_a_parameter(key, monkeypatch):
    """The last positions of a long row, across chunks and segments, under extreme keys."""
    monkeypatch.setenv("ACTIVEDPO_BACKEND", "cpp")
    length = (1 << 17) + 4099
    at = torch.tensor([0, 63, 64, 4095, 4096, 65535, 65536, 131072, length - 1])
    x = torch.zeros(1, length, dtype=torch.float64)
    x[0, at] = 2.0 ** torch.arange(len(at), dtype=torch.float64)
    for operation in OPERATIONS:
        for k in (4, 16):
            assert torch.equal(sketch(operation, x, key, k) * 4, define(operation, x, key, k) * 4)


@needs_cpp
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "n, length, k",
    [
        (1, 1, 1),
        (1, 3, 5),
        (7, 3, 8192),
        (7, 4097, 1),
        (1, 4097, 5),
        (7, 4097, 130),
        (3, 4097, 8192),
        (2, 70001, 257),
    ],
)
def test_cpp_equals_reference(operation, n, length, k, monkeypatch):
    monkeypatch.setenv("ACTIVEDPO_BACKEND", "cpp")
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        x = random(n, length, dtype=dtype, seed=length + k)
        got, expected = sketch(operation, x, KEY, k), define(operation, x, KEY, k)
        assert got.dtype == expected.dtype == dtype
        assert (got - expected).norm() <= tolerance * expected.norm()


@needs_cpp
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_result_does_not_depend_on_the_number_of_threads(operation, dtype, monkeypatch):
    monkeypatch.setenv("ACTIVEDPO_BACKEND", "cpp")
    x = random(2, 300_001, dtype=dtype)
    results = []
    for number in (1, 2, 3):
        with threads(number):
            results.append(sketch(operation, x, KEY, 300))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", [pytest.param("cpp", marks=needs_cpp), "reference"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_small_entries_keep_their_relative_accuracy(operation, backend, monkeypatch):
    monkeypatch.setenv("ACTIVEDPO_BACKEND", backend)
    x = random(2, 20_001, dtype=torch.float32)
    expected = sketch(operation, x.double(), KEY, 64)
    for scale in (1e-8, 1e-30):
        got = sketch(operation, x * scale, KEY, 64).double() / scale
        assert (got - expected).norm() <= 1e-6 * expected.norm()


@needs_cpp
@pytest.mark.parametrize("operation", OPERATIONS)
def test_float32_rounding_does_not_grow_with_the_length(operation, monkeypatch):
    """A million numbers enter one sum: a single running sum in float32 would be inaccurate."""
    monkeypatch.setenv("ACTIVEDPO_BACKEND", "cpp")
    x = random(1, 1_000_000, dtype=torch.float32).abs() + 1
    signs = (
        reference.sjlt_hash(torch.arange(x.shape[1]), KEY, 1)[1]
        if operation == "sjlt"
        else reference.rademacher_signs(torch.arange(x.shape[1]), torch.arange(1), KEY)[:, 0]
    )
    got = sketch(operation, x * signs, KEY, 1)  # every term positive: the sum is about 1.8 million
    assert float(got) == pytest.approx(float(x.double().sum()), rel=2e-7)


@pytest.mark.parametrize("backend", [pytest.param("cpp", marks=needs_cpp), "reference"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_adds_in_place_and_takes_any_strides(operation, backend, monkeypatch):
    monkeypatch.setenv("ACTIVEDPO_BACKEND", backend)
    function = ops.sjlt_ if operation == "sjlt" else ops.rademacher_
    x, start = random(5, 301), random(5, 7, seed=1)
    expected = start + define(operation, x, KEY, 7)
    wide = torch.full((5, 20), 9.0, dtype=torch.float64)
    outs = [start.clone(), start.t().contiguous().t(), wide[:, 3:10]]
    outs[2].copy_(start)
    for out, given in zip(
        outs, [x.t().contiguous().t(), x, torch.cat([x, x], 1)[:, :301]], strict=True
    ):
        function(out, given, KEY)
        torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    assert bool((wide[:, :3] == 9).all()) and bool((wide[:, 10:] == 9).all())


@pytest.mark.parametrize("backend", [pytest.param("cpp", marks=needs_cpp), "reference"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_to_add(operation, backend, monkeypatch):
    monkeypatch.setenv("ACTIVEDPO_BACKEND", backend)
    assert sketch(operation, torch.zeros(0, 5), KEY, 3).shape == (0, 3)
    assert torch.equal(sketch(operation, torch.zeros(4, 0), KEY, 3), torch.zeros(4, 3))


def test_reference_is_the_same_in_chunks(monkeypatch):
    x = random(3, 1001)
    whole = [define(operation, x, KEY, 130) for operation in OPERATIONS]
    monkeypatch.setattr(reference, "_TILE", 130 * 37)
    for operation, expected in zip(OPERATIONS, whole, strict=True):
        torch.testing.assert_close(define(operation, x, KEY, 130), expected, rtol=1e-12, atol=1e-12)


GOOD = dict(out=torch.zeros(2, 3), x=torch.zeros(2, 4), key=KEY)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(4)), "x has shape (4,), expected two dimensions"),
        (dict(out=torch.zeros(2, 3, 1)), "out has shape (2, 3, 1), expected two dimensions"),
        (dict(x=torch.zeros(2, 4, dtype=torch.bfloat16)), "x is torch.bfloat16, expected torch."),
        (
            dict(x=torch.zeros(2, 4, dtype=torch.float64)),
            "out is torch.float32 and x is torch.float64",
        ),
        (dict(x=torch.zeros(2, 4, device="meta")), "out is on cpu and x on meta"),
        (dict(x=torch.zeros(3, 4)), "out has 2 rows and x has 3"),
        (dict(out=torch.zeros(2, 0)), "out has 0 columns"),
        (dict(out=torch.zeros(1).expand(2, 2**31)), "out has 2147483648 columns"),
        (dict(x=torch.zeros(2, 4, requires_grad=True)), "x requires grad"),
        (dict(x=torch.zeros(2, 4).to_sparse()), "x is sparse"),
        (dict(x=[[0.0]]), "x is a list, not a tensor"),
        (dict(key=-1), "key is -1"),
        (dict(key=2**64), "key is 18446744073709551616"),
        (dict(key=1.0), "key is 1.0"),
        (dict(key=True), "key is True"),
    ],
)
@pytest.mark.parametrize("function", [ops.sjlt_, ops.rademacher_])
def test_bad_arguments_are_one_clear_error(function, change, message):
    with pytest.raises(ActiveDPOError) as caught:
        function(**{**GOOD, **change})
    assert str(caught.value).startswith(f"{function.__name__}: {message}")


def test_unknown_backend_is_an_error(monkeypatch):
    monkeypatch.setenv("ACTIVEDPO_BACKEND", "fortran")
    for attempt in (backends.backends, lambda: sketch("sjlt", torch.zeros(1, 1), KEY, 1)):
        with pytest.raises(ActiveDPOError, match="'fortran'; known: auto, cuda, triton, cpp, ref"):
            attempt()


def test_forced_backend_that_is_missing_is_an_error(monkeypatch):
    monkeypatch.setenv("ACTIVEDPO_BACKEND", "cpp")
    monkeypatch.setattr(backends, "_csrc", None)
    monkeypatch.setattr(backends, "_WHY_NO_CPP", "it was left out")
    with pytest.raises(ActiveDPOError, match="^ACTIVEDPO_BACKEND=cpp on a cpu tensor: it was left"):
        sketch("sjlt", torch.zeros(1, 1), KEY, 1)
    cpu = backends.backends()["sjlt"]["cpu"]
    assert (cpu["cpp"], cpu["reference"]) == ("it was left out", "ACTIVEDPO_BACKEND=cpp")


def test_reference_stands_in_with_one_warning(monkeypatch, caplog):
    monkeypatch.delenv("ACTIVEDPO_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_csrc", None)
    monkeypatch.setattr(backends, "_WHY_NO_CPP", "it was left out; run this")
    monkeypatch.setattr(backends, "_warned", set())
    x = random(2, 40)
    with caplog.at_level(logging.WARNING, logger="activedpo_fast.ops.backends"):
        for operation in OPERATIONS:
            torch.testing.assert_close(sketch(operation, x, KEY, 5), define(operation, x, KEY, 5))
    assert [record.getMessage() for record in caplog.records] == [
        "using the slower PyTorch reference: it was left out; run this"
    ]


@needs_cpp
def test_backends_tells_what_is_active(monkeypatch):
    monkeypatch.delenv("ACTIVEDPO_BACKEND", raising=False)
    found = backends.backends()["rademacher"]
    assert found["cpu"]["cpp"] == "active"
    assert found["cpu"]["reference"] == "a faster backend is active"
    assert found["cpu"]["triton"] != "active"
    assert found["cuda"]["cpp"] == "serves CPU tensors only"
    assert "cuda" not in found["cuda"]  # it has no such operation
    monkeypatch.setenv("ACTIVEDPO_BACKEND", "reference")
    found = backends.backends()["sjlt"]["cpu"]
    assert (found["cpp"], found["reference"]) == ("ACTIVEDPO_BACKEND=reference", "active")


def test_a_forced_backend_leaves_other_operations_alone(monkeypatch):
    monkeypatch.setenv("ACTIVEDPO_BACKEND", "triton")
    assert backends.choose("advance", "cpu") in ("cpp", "reference")
    monkeypatch.setenv("ACTIVEDPO_BACKEND", "cuda")
    assert backends.choose("sjlt", "cpu") in ("cpp", "reference")
    with pytest.raises(ActiveDPOError, match="ACTIVEDPO_BACKEND=cuda on a cpu tensor: serves CUDA"):
        backends.choose("greedy_select", "cpu")


def test_float64_is_not_for_triton(monkeypatch):
    monkeypatch.delenv("ACTIVEDPO_BACKEND", raising=False)
    assert backends.choose("sjlt", "cuda", torch.float64) == "reference"
    monkeypatch.setenv("ACTIVEDPO_BACKEND", "triton")
    with pytest.raises(ActiveDPOError, match="ACTIVEDPO_BACKEND=triton on a cuda tensor: has no"):
        backends.choose("sjlt", "cuda", torch.float64)


@pytest.mark.parametrize(
    ("value", "expected"), [(None, None), ("", None), ("1", True), ("0", False)]
)
@pytest.mark.parametrize("of_torch", [False, True])
def test_deterministic_follows_torch_by_default(value, expected, of_torch, monkeypatch):
    monkeypatch.delenv("ACTIVEDPO_DETERMINISTIC", raising=False)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: of_torch)
    if value is not None:
        monkeypatch.setenv("ACTIVEDPO_DETERMINISTIC", value)
    assert backends.deterministic() is (of_torch if expected is None else expected)


def test_deterministic_must_be_yes_or_no(monkeypatch):
    monkeypatch.setenv("ACTIVEDPO_DETERMINISTIC", "maybe")
    with pytest.raises(ActiveDPOError, match="ACTIVEDPO_DETERMINISTIC is 'maybe', expected 0 or 1"):
        backends.deterministic()


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS)
def test_reference_is_the_same_on_a_gpu(operation):
    x = random(3, 4097)
    torch.testing.assert_close(
        define(operation, x.cuda(), KEY, 130).cpu(),
        define(operation, x, KEY, 130),
        rtol=1e-12,
        atol=1e-12,
    )
