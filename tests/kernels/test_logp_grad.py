"""The log-prob kernel against float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from activedpo_fast.kernels.response_logp_grad import response_logp_grad  # noqa: E402

# Logits that are NaN cause warnings in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The tolerance for a gradient, by its dtype. The interpreter truncates to bfloat16 and does not
# round.
ROUNDING = {
    torch.float32: 0.0,
    torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7,
    torch.float16: 2**-11,
}
DTYPES = list(ROUNDING)
INFINITY = float("inf")


def batch(n: int, vocabulary: int, dtype: torch.dtype, spread: float = 3.0):
    generator = torch.Generator().manual_seed(3)
    logits = spread * torch.randn(n, vocabulary, generator=generator)
    targets = torch.randint(0, vocabulary, (n,), generator=generator)
    weights = torch.randn(n, generator=generator)
    return logits.to(DEVICE, dtype), targets.to(DEVICE), weights.to(DEVICE)


def expected(logits, targets, weights):
    exact = logits.double().requires_grad_()
    logps = exact.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (grad,) = torch.autograd.grad((logps * weights).sum(), exact)
    return logps.detach(), grad


def check(logits, targets, weights):
    before = logits.clone()
    logps, grad = response_logp_grad(logits, targets, weights)
    right_logps, right_grad = expected(logits, targets, weights)
    assert logps.dtype == torch.float32 and grad.dtype == logits.dtype
    assert ((logps - right_logps).abs() <= 1e-6 * (1 + right_logps.abs())).all()
    least = 2**-24 if logits.dtype == torch.float16 else 1e-38
    allowed = (
        ROUNDING[logits.dtype] * right_grad.abs()
        + 3e-6 * right_grad.abs()
        + 1e-7 * weights.abs()[:, None]
        + least
    )
    assert ((grad.double() - right_grad).abs() <= allowed).all()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, vocabulary", [(2, 1), (3, 7), (5, 1001), (2, 4096), (3, 8200)])
def test_against_autograd(dtype, n, vocabulary):
    check(*batch(n, vocabulary, dtype))


@pytest.mark.parametrize("spread", [0.0, 1e-3, 40.0])
def test_even_and_peaked_logits(spread):
    check(*batch(3, 5000, torch.float32, spread))


def test_as_accurate_as_torch_far_from_zero():
    logits, targets, weights = batch(20, 3000, torch.float32, 5.0)
    logits += 300.0
    logps, _ = response_logp_grad(logits, targets, weights)
    right = expected(logits, targets, weights)[0]
    of_torch = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
    assert (logps - right).abs().max() <= (of_torch - right).abs().max()


def test_without_weights():
    logits, targets, weights = batch(4, 100, torch.bfloat16)
    logps, grad = response_logp_grad(logits, targets, None)
    assert grad is None
    assert torch.equal(logps, response_logp_grad(logits, targets, weights)[0])


def test_logits_of_minus_infinity():
    logits, targets, weights = batch(3, 5000, torch.float32)
    logits[:, 1:4200] = -INFINITY
    targets[:] = torch.tensor([0, 4999, 2])
    logps, grad = response_logp_grad(logits, targets, weights)
    right_logps, right_grad = expected(logits, targets, weights)
    assert logps[2] == -INFINITY
    assert torch.allclose(logps.double(), right_logps, rtol=1e-6)
    assert torch.allclose(grad[:2].double(), right_grad[:2], rtol=1e-5, atol=1e-7)
    assert (grad[:2, 1:4200] == 0).all()


def test_nan_logits_give_nan():
    logits, targets, weights = batch(3, 50, torch.float32)
    logits[1, 7] = float("nan")
    logits[2] = -INFINITY
    logps, grad = response_logp_grad(logits, targets, weights)
    assert logps.isnan().tolist() == [False, True, True]
    assert grad[0].isfinite().all() and grad[1:].isnan().all()


def test_parts_of_other_tensors():
    """Logits whose rows are not adjacent and start at any address; targets and weights with
    strides."""
    wide, targets, weights = batch(4, 1030, torch.bfloat16)
    logits = wide[:, 3:1020]
    targets = torch.stack([targets % 1017, targets], 1)[:, 0]
    check(logits, targets, torch.stack([weights, weights], 1)[:, 0])
    check(wide[:, 8:1024], targets % 1016, weights)


def test_no_tokens():
    logits, targets, weights = batch(0, 10, torch.float16)
    logps, grad = response_logp_grad(logits, targets, weights)
    assert logps.shape == (0,) and grad.shape == (0, 10)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, vocabulary", [(700, 50257), (300, 128256), (100, 151936)])
def test_large_vocabularies(dtype, n, vocabulary):
    logits, targets, weights = batch(n, vocabulary, dtype)
    scratch = torch.full((1 << 27,), float("nan"), device=DEVICE)
    del scratch  # the gradient is written to its memory
    check(logits, targets, weights)
    first = response_logp_grad(logits, targets, weights)
    for _ in range(10):
        again = response_logp_grad(logits, targets, weights)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    n, vocabulary = 17_000, 128_256  # 2.2 billion logits
    logits = torch.zeros(n, vocabulary, dtype=torch.bfloat16, device=DEVICE)
    last, targets, weights = batch(3, vocabulary, torch.bfloat16)
    logits[-3:] = last
    all_targets = torch.zeros(n, dtype=torch.int64, device=DEVICE)
    all_weights = torch.zeros(n, device=DEVICE)
    all_targets[-3:], all_weights[-3:] = targets, weights
    logps, grad = response_logp_grad(logits, all_targets, all_weights)
    right_logps, right_grad = expected(last, targets, weights)
    assert torch.allclose(logps[-3:].double(), right_logps, rtol=1e-6, atol=1e-6)
    assert torch.allclose(grad[-3:].double(), right_grad, rtol=2**-8, atol=1e-6)
    assert (grad[:-3] == 0).all()
