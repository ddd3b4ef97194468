"""Sketch keys, the plan over parameters, canonical names, and the statistics of the projections."""

from __future__ import annotations

import pytest
import torch

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.sketch import Sketch, SketchPlan, canonical_name

SHAPES = [
    ("q.lora_A.weight", torch.Size([4, 30])),
    ("q.lora_B.weight", torch.Size([25, 4])),
    ("bias", torch.Size([7])),
]
METHODS = ["sjlt", "rademacher", "kronecker", "none"]
PROJECTIONS = METHODS[:3]


def gradients(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES
    }


def rows(plan: SketchPlan, grads: dict[str, torch.Tensor]) -> torch.Tensor:
    """The gradients [n, ...] as sums of outer products: of unit vectors and their own rows."""
    n = len(next(iter(grads.values())))
    out = torch.zeros(n, plan.dim, dtype=torch.float64)
    for name, grad in grads.items():
        if grad.dim() == 2:  # a bias: one token a sample
            left, right = grad, grad.new_ones(n, 1)
        else:
            left = torch.eye(grad.shape[1], dtype=grad.dtype).repeat(n, 1)
            right = grad.flatten(0, 1)
        ends = torch.arange(1, n + 1) * (len(left) // max(n, 1))
        segments = torch.stack([ends - len(left) // max(n, 1), ends, torch.arange(n)], dim=1)
        plan.add(out, [(name, left, right)], segments)
    return out


def test_keys_are_pinned():
    """Stored features stay comparable only while these never change."""
    assert Sketch(seed=0).key("q.lora_A.weight") == 0x73B8C8487DDD60E
    assert Sketch(seed=7).key("q.lora_A.weight") == 0x2211F3EAC5537479
    assert Sketch("rademacher", 4).key("x") == Sketch("sjlt", 8).key("x")


def test_keys_differ_by_seed_and_name():
    keys = [
        Sketch(seed=seed).key(name)
        for seed in (0, 1, 10, 2**63 - 1)
        for name in ("a", "b", "0a", "")
    ]
    assert len(set(keys)) == len(keys) and all(0 <= key < 2**64 for key in keys)


def test_none_concatenates_in_the_given_order():
    grads = gradients(3)
    plan = SketchPlan(Sketch("none"), SHAPES)
    assert plan.sketch.dim is None and plan.dim == plan.total == 4 * 30 + 25 * 4 + 7
    expected = torch.cat([grads[name].flatten(1) for name, _ in SHAPES], dim=1)
    assert torch.equal(rows(plan, dict(reversed(grads.items()))), expected)


@pytest.mark.parametrize("method", METHODS)
def test_rows_do_not_depend_on_batch_order_or_layout(method):
    plan = SketchPlan(Sketch(method, 64, seed=3), SHAPES)
    grads = gradients(6, dtype=torch.float32)
    whole = rows(plan, grads)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    shuffled = rows(plan, {name: grad[order] for name, grad in grads.items()})
    assert torch.equal(shuffled, whole[order])
    singles = [
        rows(plan, {name: grad[i : i + 1] for name, grad in grads.items()}) for i in range(6)
    ]
    assert torch.equal(torch.cat(singles), whole)
    strided = {
        name: grad.transpose(0, -1).contiguous().transpose(0, -1) for name, grad in grads.items()
    }
    assert torch.equal(rows(plan, strided), whole)


@pytest.mark.parametrize("method", PROJECTIONS)
def test_is_linear_and_mixes_names_and_seeds(method):
    grads = gradients(2)
    plan = SketchPlan(Sketch(method, 64), SHAPES)
    parts = sum(rows(plan, {name: grad}) for name, grad in grads.items())
    torch.testing.assert_close(rows(plan, grads), parts)
    torch.testing.assert_close(rows(plan, {n: -3 * g for n, g in grads.items()}), -3 * parts)

    # One vector under two names, two seeds, two methods: different projections.
    x = torch.ones(1, 5000, dtype=torch.float64)
    two = [("a", torch.Size([5000])), ("b", torch.Size([5000]))]
    base = rows(SketchPlan(Sketch(method, 64), two), {"a": x})
    assert not torch.equal(base, rows(SketchPlan(Sketch(method, 64), two), {"b": x}))
    assert not torch.equal(base, rows(SketchPlan(Sketch(method, 64, seed=1), two), {"a": x}))


def products(
    method: str,
    x: torch.Tensor,
    y: torch.Tensor,
    k: int,
    seeds: int,
    names: tuple[str, str] = ("w", "w"),
) -> torch.Tensor:
    """<S x, S y> for many seeds, float64 [seeds]; x and y as gradients of the named parameters."""
    shapes = [(name, x.shape) for name in dict.fromkeys(names)]
    values = []
    for seed in range(seeds):
        plan = SketchPlan(Sketch(method, k, seed), shapes)
        values.append((rows(plan, {names[0]: x[None]}) @ rows(plan, {names[1]: y[None]}).T).item())
    return torch.tensor(values, dtype=torch.float64)


def vectors(kind: str, length: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(length, generator=generator, dtype=torch.float64)
    y = torch.randn(length, generator=generator, dtype=torch.float64)
    if kind == "itself":
        return x, x
    if kind == "heavy":  # few entries carry most of the norm, as gradients have them
        weight = torch.rand(length, generator=generator, dtype=torch.float64) ** 8
        return x * weight, (0.5 * x + y) * weight
    return x, 0.3 * x + y


@pytest.mark.parametrize("kind", ["related", "itself", "heavy"])
@pytest.mark.parametrize("method", ["sjlt", "rademacher"])
def test_inner_products_are_unbiased_and_follow_the_variance_law(method, kind):
    """Mean within 4.5 standard errors; variance within 4.5 of its own (seeds are fixed)."""
    x, y = vectors(kind)
    k, seeds = 64, 500
    values = products(method, x, y, k, seeds)
    variance = float(x @ x * (y @ y) + (x @ y) ** 2 - 2 * (x * x) @ (y * y)) / k
    assert abs(float(values.mean() - x @ y)) < 4.5 * (variance / seeds) ** 0.5
    # Standard error of the sample variance, with the kurtosis as it is seen.
    deviations = (values - x @ y) / variance**0.5
    kurtosis = float((deviations**4).mean())
    error = max(kurtosis - 1, 2.0) ** 0.5 / seeds**0.5
    assert abs(float((deviations**2).mean()) - 1) < 4.5 * error
    assert error < 0.15  # the bound above can fail: it is not wider than this


def test_kronecker_is_unbiased_and_spreads_unevenly():
    """Random entries: about the variance of the others. Sides that are longer than they are
    projected to, and gradients of rank one: more, and that is measured here."""
    generator = torch.Generator().manual_seed(5)
    flat = torch.randn(60, 40, generator=generator, dtype=torch.float64)
    u, v = (torch.randn(n, 1, generator=generator, dtype=torch.float64) for n in (60, 40))
    k, seeds = 64, 500
    ratio = {}
    for kind, x in (("random", flat), ("rank one", u @ v.T)):
        values = products("kronecker", x, x, k, seeds)
        square = float((x * x).sum())
        law = (2 * square**2 - 2 * float((x**4).sum())) / k
        ratio[kind] = float(values.var()) / law
        assert abs(float(values.mean()) - square) < 4.5 * float(values.std()) / seeds**0.5
    assert 0.5 < ratio["random"] < 2
    assert ratio["rank one"] > 3


@pytest.mark.parametrize("method", PROJECTIONS)
def test_names_get_independent_sketches(method):
    """The same vector under two names: products around zero, of variance |x|^2 |y|^2 / k."""
    x, _ = vectors("related")
    values = products(method, x, x, 64, 300, names=("a", "b"))
    standard = float(x @ x) / 64**0.5
    assert abs(float(values.mean())) < 4.5 * standard / 300**0.5
    assert float(values.var()) / standard**2 == pytest.approx(1, abs=4.5 * (2 / 300) ** 0.5)


@pytest.mark.parametrize(
    "name, adapter, expected",
    [
        ("q.lora_A.default.weight", "default", "q.lora_A.weight"),
        ("q.lora_B.mine.weight", "mine", "q.lora_B.weight"),
        ("q.lora_A.other.weight", "default", "q.lora_A.other.weight"),
        ("q.lora_A.default.weight", None, "q.lora_A.default.weight"),
        ("model.default.lora_A.default.weight", "default", "model.default.lora_A.weight"),
        ("module.base_model.q.weight", None, "base_model.q.weight"),
        (
            "_orig_mod.module.base.layers.0._fsdp_wrapped_module.q.lora_A.default.weight",
            "default",
            "base.layers.0.q.lora_A.weight",
        ),
        ("layers.0._checkpoint_wrapped_module.q.weight", None, "layers.0.q.weight"),
        ("my_module.weight", None, "my_module.weight"),
    ],
)
def test_canonical_names(name, adapter, expected):
    assert canonical_name(name, adapter) == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            dict(method="gauss"),
            "unknown sketch method 'gauss'; known: sjlt, rademacher, kronecker, none",
        ),
        (dict(dim=0), "sketch dim is 0"),
        (dict(dim=2**31), "sketch dim is 2147483648"),
        (dict(dim=None), "sketch dim is None"),
        (dict(dim=True), "sketch dim is True"),
        (dict(dim=64.0), "sketch dim is 64.0"),
        (dict(seed=-1), "sketch seed is -1"),
        (dict(seed="0"), "sketch seed is '0'"),
        (dict(seed=2**63), "sketch seed is"),
    ],
)
def test_bad_sketches(arguments, message):
    with pytest.raises(ActiveDPOError) as caught:
        Sketch(**arguments)
    assert str(caught.value).startswith(message)


def test_plan_needs_parameters_with_names_of_their_own():
    with pytest.raises(ActiveDPOError, match="at least one trainable parameter"):
        SketchPlan(Sketch(), [])
    with pytest.raises(ActiveDPOError, match="two parameters have the canonical name 'w'"):
        SketchPlan(Sketch(), [("w", torch.Size([1])), ("w", torch.Size([2]))])


@pytest.mark.parametrize(
    "name, left, out, message",
    [
        ("nobody", torch.zeros(2, 7), (2, 8), "parameter 'nobody' is not in the sketch's"),
        (
            "bias",
            torch.zeros(2, 6),
            (2, 8),
            r"bias: gradients have shape \[6, 1\], expected \[7, 1",
        ),
        ("bias", torch.zeros(2, 7), (2, 9), r"out has shape \(2, 9\), expected \[n"),
        ("bias", torch.zeros(2, 7).int(), (2, 8), "bias: outer_sketch_: left is torch.int32"),
        ("bias", torch.zeros(2, 7), (1, 8), "bias: outer_sketch_: a segment lies outside 2 tok"),
    ],
)
def test_plan_names_the_parameter_at_fault(name, left, out, message):
    segments = torch.tensor([[0, 1, 0], [1, 2, 1]])
    with pytest.raises(ActiveDPOError, match=message):
        SketchPlan(Sketch("sjlt", 8), SHAPES).add(
            torch.zeros(*out, dtype=torch.float64), [(name, left, left.new_ones(2, 1))], segments
        )


def test_nothing_is_added_if_a_later_parameter_does_not_fit():
    plan = SketchPlan(Sketch("sjlt", 8), SHAPES)
    out = torch.zeros(2, 8, dtype=torch.float64)
    good = ("bias", torch.ones(2, 7), torch.ones(2, 1))
    bad = ("bias", torch.ones(3, 7), torch.ones(2, 1))
    segments = torch.tensor([[0, 1, 0], [1, 2, 1]])
    with pytest.raises(ActiveDPOError, match="left has 3 tokens and right 2"):
        plan.add(out, [good, bad], segments)
    assert not out.any()
    plan.add(out, [good], segments)
    assert out.any()


@pytest.mark.parametrize("method", METHODS)
def test_no_samples(method):
    plan = SketchPlan(Sketch(method, 16), SHAPES)
    assert rows(plan, gradients(0)).shape == (0, plan.dim)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_formed_gradients_have_the_rows_of_outer_products(method: str, dtype: torch.dtype):
    shapes = [*SHAPES, ("scalar", torch.Size([])), ("experts", torch.Size([3, 5, 8]))]
    plan = SketchPlan(Sketch(method, None if method == "none" else 48, seed=2), shapes)
    matrices = {name: grad.squeeze(0) for name, grad in gradients(1, 5, dtype).items()}
    as_products = torch.zeros(1, plan.dim, dtype=torch.float64)
    for name, matrix in matrices.items():
        left = matrix.reshape(-1, 1) if matrix.dim() == 1 else matrix
        identity = torch.eye(len(left), dtype=dtype)
        segments = torch.tensor([[0, len(left), 0]])
        plan.add(as_products, [(name, identity, left)], segments)
    out = torch.zeros(3, plan.dim, dtype=torch.float64)
    rows_of = torch.tensor([2, 0])
    plan.add_formed(out, [(name, torch.stack([m, -m])) for name, m in matrices.items()], rows_of)
    rounding = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(out[2:], as_products, rtol=rounding, atol=rounding)
    torch.testing.assert_close(out[:1], -as_products, rtol=rounding, atol=rounding)
    assert not out[1].any()
    before, one = out.clone(), torch.tensor([1])
    plan.add_formed(out, [("scalar", torch.ones(1)), ("experts", torch.ones(1, 3, 5, 8))], one)
    assert float((out - before)[1].norm()) > 0
    for name, gradient in (("scalar", torch.ones(2)), ("none", torch.ones(1))):
        with pytest.raises(ActiveDPOError, match=f"{name}: .*do not fit"):
            plan.add_formed(out, [(name, gradient)], one)
