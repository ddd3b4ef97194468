"""The operations as registered with PyTorch: opcheck, torch.compile, FakeTensors."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from activedpo_fast import ops
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.ops import reference
from tests.ops.test_ops import KEY, random

SEGMENTS = torch.tensor([[0, 4, 1], [4, 9, 0]])
SIGNED = KEY - 2**64


def outer(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return (
        torch.zeros(2, 7, dtype=torch.float64),
        random(9, 5).to(dtype),
        random(9, 60, seed=1).to(dtype),
        SEGMENTS,
    )


def logits(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    sums = reference.sum_dtype(dtype)
    return (
        random(5, 11).to(dtype),
        torch.tensor([0, 10, 3, 3, 1]),
        random(1, 5, seed=2)[0].to(sums),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["sjlt_", "rademacher_"])
def test_opcheck_of_ready_rows(name, dtype):
    op = getattr(torch.ops.activedpo, name).default
    torch.library.opcheck(op, (torch.zeros(3, 7, dtype=dtype), random(3, 40).to(dtype), SIGNED))


@pytest.mark.parametrize("method", ops.METHODS)
def test_opcheck_of_outer_sketches(method):
    torch.library.opcheck(torch.ops.activedpo.outer_sketch_.default, (*outer(), SIGNED, method))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck_of_log_probs(dtype):
    torch.library.opcheck(torch.ops.activedpo.response_logp_grad.default, logits(dtype))
    torch.library.opcheck(torch.ops.activedpo.response_logps.default, logits(dtype)[:2])


def test_compiled_without_a_break():
    def both(out, left, right, segments, scores, targets, weights):
        ops.outer_sketch_(out, left * 2, right, segments, KEY, "sjlt")
        logps, gradient = ops.response_logp_grad(scores + 1, targets, weights)
        return out * 3, logps.sum() + gradient.square().sum()

    arguments = (*outer(), *logits())
    expected = both(*(x.clone() for x in arguments))
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*(x.clone() for x in arguments)), expected)


def test_fake_tensors_know_shapes_and_dtypes():
    with FakeTensorMode():
        logps, gradient = ops.response_logp_grad(
            torch.empty(4, 9, dtype=torch.bfloat16),
            torch.empty(4, dtype=torch.int64),
            torch.empty(4),
        )
        assert (logps.shape, logps.dtype) == ((4,), torch.float32)
        assert (gradient.shape, gradient.dtype) == ((4, 9), torch.bfloat16)
        out = torch.zeros(2, 7, dtype=torch.float64)
        ops.outer_sketch_(
            out,
            torch.empty(9, 5),
            torch.empty(9, 6),
            torch.empty(3, 3, dtype=torch.int64),
            KEY,
            "rademacher",
        )
        assert out.shape == (2, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_log_probs_and_their_gradient_are_autograds(dtype):
    scores, targets, weights = logits(dtype)
    exact = scores.double().clone().requires_grad_()
    expected = exact.log_softmax(dim=1)[torch.arange(5), targets]
    (expected * weights.double()).sum().backward()
    logps, gradient = ops.response_logp_grad(scores, targets, weights)
    assert logps.dtype == weights.dtype and gradient.dtype == dtype
    assert torch.equal(ops.response_logps(scores, targets), logps)
    torch.testing.assert_close(logps.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(scores=torch.zeros(5, 11, 1)), "logits are torch.float32 (5, 11, 1)"),
        (dict(scores=torch.zeros(5, 11, dtype=torch.int64)), "logits are torch.int64"),
        (dict(targets=torch.zeros(4, dtype=torch.int64)), "targets are (4,) on cpu, expected (5,)"),
        (dict(targets=torch.zeros(5)), "targets are torch.float32"),
        (dict(weights=torch.zeros(5, device="meta")), "weights are (5,) on meta"),
    ],
)
def test_bad_logits_are_one_clear_error(change, message):
    scores, targets, weights = logits()
    given = {"scores": scores, "targets": targets, "weights": weights, **change}
    with pytest.raises(ActiveDPOError) as caught:
        ops.response_logp_grad(*given.values())
    assert message in str(caught.value)


def test_opcheck_of_rank_updates():
    v = random(6, 6)
    torch.library.opcheck(torch.ops.activedpo.rank_update_.default, (v, random(3, 6, seed=1), -0.5))
