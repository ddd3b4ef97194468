"""InformationMatrix against exact rational arithmetic and torch.linalg."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.selection.information.matrix import InformationMatrix
from tests.support.examples import examples

FORMS = ("auto", "low_rank", "explicit")


def unit_rows(n, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, k, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1)


def exact_scores(added, queries, ratio):
    """q^T (ratio I + sum of a a^T)^-1 q by Gauss-Jordan elimination over the rationals."""
    k = queries.shape[1]
    added = [[Fraction(v) for v in row] for row in added.tolist()]
    queries = [[Fraction(v) for v in row] for row in queries.tolist()]
    table = [
        [sum(a[i] * a[j] for a in added) + (ratio if i == j else 0) for j in range(k)]
        + [q[i] for q in queries]
        for i in range(k)
    ]
    for i in range(k):  # positive definite: no pivoting is needed in exact arithmetic
        table[i] = [v / table[i][i] for v in table[i]]
        for j in range(k):
            if j != i and table[j][i]:
                factor = table[j][i]
                table[j] = [x - factor * y for x, y in zip(table[j], table[i], strict=True)]
    return [sum(q[i] * table[i][k + n] for i in range(k)) for n, q in enumerate(queries)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("lam", [1e-6, 1e-3, 1.0, 1e3])
def test_scores_of_unit_features_hold_to_1e_11_of_exact_arithmetic(form, many, lam):
    points = unit_rows(4, 6)
    added = torch.cat([points, points[:2], points[:1]])  # exact duplicates
    near = torch.nn.functional.normalize(points[:2] + 1e-5 * unit_rows(2, 6, seed=1), dim=1)
    spanned = torch.nn.functional.normalize(unit_rows(2, 4, seed=2) @ points, dim=1)
    queries = torch.cat([points, near, spanned, unit_rows(2, 6, seed=3)])
    information = InformationMatrix(6, lam=lam, form=form)
    if many:
        information.add_many(added)
    else:
        for phi in added:
            information.add(phi)
    exact = exact_scores(added, queries, Fraction(lam))
    errors = [
        abs(Fraction(float(got)) - want) / want
        for got, want in zip(information.score(queries), exact, strict=True)
    ]
    assert max(errors) < 1e-11


@given(
    k=st.integers(1, 24),
    t=st.integers(0, 30),
    form=st.sampled_from(FORMS),
    log_lam=st.floats(-3, 3),
    log_kappa=st.floats(-1, 1),
    log_norm=st.floats(-6, 0),
    split=st.integers(0, 30),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=examples(80), deadline=None)
def test_it_matches_torch_linalg(k, t, form, log_lam, log_kappa, log_norm, split, seed):
    lam, kappa = 10**log_lam, 10**log_kappa
    phi = unit_rows(t, k, seed) * 10**log_norm
    queries = unit_rows(7, k, seed + 1)
    information = InformationMatrix(k, lam=lam, kappa=kappa, form=form)
    information.add_many(phi[:split])
    v = lam / kappa * torch.eye(k, dtype=torch.float64) + phi[:split].T @ phi[:split]
    for row in phi[split:]:
        solved = torch.linalg.solve(v, row)
        before = information.score(queries)
        w = information.add(row)
        torch.testing.assert_close(
            w, solved / torch.sqrt(1 + row @ solved), rtol=1e-8, atol=1e-9 * float(w.norm())
        )
        torch.testing.assert_close(
            information.score(queries),
            before - (queries @ w).square(),
            rtol=1e-9,
            atol=1e-9 * float(before.max()),
        )
        v += torch.outer(row, row)
    solved = torch.linalg.solve(v, queries.T).T
    size = float(solved.abs().max())
    torch.testing.assert_close(information.solve(queries), solved, rtol=1e-8, atol=1e-9 * size)
    torch.testing.assert_close(
        information.solve(queries[0]), solved[0], rtol=1e-8, atol=1e-9 * size
    )
    torch.testing.assert_close(
        information.score(queries), (queries * solved).sum(1), rtol=1e-8, atol=0.0
    )
    assert information.logdet() == pytest.approx(
        float(torch.linalg.slogdet(v)[1]), rel=1e-9, abs=1e-9
    )
    assert information.count == t


def test_auto_becomes_explicit_when_more_than_half_of_k_directions_are_kept():
    information = InformationMatrix(10)
    rows = unit_rows(6, 10)
    information.add_many(rows[:5])
    assert information._base is None
    information.add(rows[5])
    assert information._base is not None
    low = InformationMatrix(10, form="low_rank")
    low.add_many(rows)
    assert low._base is None
    torch.testing.assert_close(information.score(rows), low.score(rows), rtol=1e-13, atol=0)
    assert InformationMatrix(10, form="explicit")._base is not None


def test_zero_features_and_empty_blocks_change_nothing_but_the_count():
    for form in FORMS:
        information = InformationMatrix(4, lam=2.0, form=form)
        before = information.logdet()
        assert information.add(torch.zeros(4)).tolist() == [0.0] * 4
        information.add_many(torch.zeros(3, 4))
        information.add_many(torch.zeros(0, 4))
        assert information.count == 4
        assert information.logdet() == before
        assert information.score(torch.eye(4)).tolist() == pytest.approx([0.5] * 4)
        assert information.score(torch.zeros(0, 4)).shape == (0,)


def test_state_is_float64_for_float32_and_bfloat16_features():
    information = InformationMatrix(5)
    for dtype in (torch.float32, torch.bfloat16):
        assert information.add(unit_rows(1, 5)[0].to(dtype)).dtype == torch.float64
        assert information.score(unit_rows(2, 5).to(dtype)).dtype == torch.float64


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(dim=0), "dim"),
        (dict(dim=3, lam=0.0), "lam"),
        (dict(dim=3, kappa=-1.0), "kappa"),
        (dict(dim=3, lam=float("nan")), "lam"),
        (dict(dim=3, lam="1"), "lam"),
        (dict(dim=3, form="dense"), "form"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ActiveDPOError, match=message):
        InformationMatrix(**arguments)


def test_features_of_another_width():
    information = InformationMatrix(3)
    for call in (information.score, information.add_many):
        with pytest.raises(ActiveDPOError, match=r"\[N, 3\]"):
            call(torch.ones(2, 4))
    with pytest.raises(ActiveDPOError, match=r"\[3\]"):
        information.add(torch.ones(1, 3))
