"""InformationMatrix over many updates: its primitives and its drift."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.selection.information.dense import DenseBase
from activedpo_fast.selection.information.matrix import InformationMatrix
from tests.selection.test_information import FORMS, exact_scores, unit_rows

EPS = torch.finfo(torch.float64).eps


def state(information):
    """All results of a matrix, as one tensor."""
    probes = unit_rows(5, information.dim, seed=99)
    return torch.cat(
        [
            information.whiten(probes).flatten(),
            information.pull_back(probes).flatten(),
            torch.tensor([information.logdet(), information.count], dtype=torch.float64),
        ]
    )


def worst_error(information, left, queries):
    """The largest relative error of the scores, against rational arithmetic."""
    exact = exact_scores(left, queries, Fraction(information.lam) / Fraction(information.kappa))
    return max(
        float(abs(Fraction(float(got)) - want) / want)
        for got, want in zip(information.score(queries), exact, strict=True)
    )


# --- the primitives ---


@pytest.mark.parametrize("form", FORMS)
def test_whiten_and_pull_back_are_the_halves_of_the_inverse(form):
    information = InformationMatrix(7, lam=0.3, kappa=2.0, form=form)
    points, queries = unit_rows(6, 7), unit_rows(4, 7, seed=1)
    for phi in points:
        information.add(phi)
    u = information.whiten(queries)
    torch.testing.assert_close(u.square().sum(1), information.score(queries))
    v = 0.15 * torch.eye(7, dtype=torch.float64) + points.T @ points
    torch.testing.assert_close(information.pull_back(u), torch.linalg.solve(v, queries.T).T)


def test_adding_a_point_does_not_copy_the_earlier_ones():
    information = InformationMatrix(400, form="low_rank")
    places = set()
    for phi in unit_rows(200, 400):
        information.add(phi)
        kept = (
            information._latest.directions,
            information._latest.triangle,
            information._points.values,
        )
        places.add(tuple(tensor.data_ptr() for tensor in kept))
    assert len(places) <= 6  # storage for 8, 16, 32, 64, 128 and 256 rows


@pytest.mark.parametrize("form", FORMS)
def test_many_tiny_features_add_up(form):
    information = InformationMatrix(4, form=form)
    phi = 1e-7 * unit_rows(1, 4)
    for _ in range(1000):
        information.add_many(phi)
    assert float(information.score(1e7 * phi)) == pytest.approx(1 / (1 + 1e-11), rel=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_features_that_are_not_finite_are_refused_and_change_nothing(form):
    information = InformationMatrix(3, form=form)
    information.add(torch.ones(3))
    before = state(information)
    for bad in (float("nan"), float("inf"), -float("inf"), 1e300):
        phi = torch.tensor([0.0, bad, 1.0], dtype=torch.float64)
        with pytest.raises(ActiveDPOError, match="finite"):
            information.add(phi)
        if bad != 1e300:
            with pytest.raises(ActiveDPOError, match="finite"):
                information.add_many(torch.stack([torch.ones(3, dtype=torch.float64), phi]))
    assert torch.equal(state(information), before)


# --- the drift of the explicit form ---


def test_the_drift_is_measured_and_small():
    information = InformationMatrix(24, lam=0.1, form="explicit")
    assert information.drift is None
    information.add_many(unit_rows(1000, 24))
    assert information.drift is None
    for phi in unit_rows(64, 24, seed=1):
        information.add(phi)
    assert 0 < information.drift < 1e-12
    assert InformationMatrix(24).drift is None


def test_a_root_that_has_drifted_is_built_again():
    points, queries = unit_rows(1500, 24), unit_rows(6, 24, seed=2)
    information = InformationMatrix(24, lam=0.1, form="explicit")
    information.add_many(points[:400])
    information._base.root[3] *= 1 + 1e-6
    information.add_many(points[400:])
    fresh = InformationMatrix(24, lam=0.1)
    fresh.add_many(points)
    assert information.drift < 1e-12
    torch.testing.assert_close(information.score(queries), fresh.score(queries), rtol=1e-11, atol=0)
    assert information.logdet() == pytest.approx(fresh.logdet(), rel=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_a_refresh_that_would_not_be_better_is_not_made(seed):
    # V = 1e-6 I + 1100 points in 4 of 6 dimensions: V's rounding is 1e-7 of its smallest values.
    points = unit_rows(4, 6, seed)
    queries = torch.cat([points, unit_rows(3, 6, seed + 100)])
    information = InformationMatrix(6, lam=1e-6, form="explicit")
    added = points.repeat(275, 1)
    information.add_many(added)
    assert information.drift is not None
    assert worst_error(information, added, queries) < 1e-11
    rebuilt = information._base.rebuilt().root  # the error that a refresh would have caused
    scores = (queries @ rebuilt.T).square().sum(1)
    assert (scores / information.score(queries) - 1).abs().max() > 1e-10


def test_a_refresh_is_kept_only_when_it_measures_better():
    # V far below its ridge, so that the bound is low, and two roots that are equally good.
    kept = []
    for seed in range(30):
        basis = torch.linalg.qr(unit_rows(8, 8, seed))[0]
        values = torch.logspace(-9, 0, 8, dtype=torch.float64)
        root = values.rsqrt()[:, None] * basis.T
        information = InformationMatrix(8, form="explicit")
        information._base = DenseBase(root, basis * values @ basis.T, 1.0)
        before = information._base.drift()
        information._watch(information._base)
        kept.append(information._base.root is root)
        assert (information.drift == before) if kept[-1] else (information.drift < before)
    assert True in kept and False in kept


def test_a_refresh_that_fails_leaves_the_root():
    information = InformationMatrix(24, lam=0.1, form="explicit")
    points = unit_rows(1500, 24)
    information.add_many(points[:400])
    information._base.v.diagonal()[0] = -1e9  # no Cholesky factor
    information.add_many(points[400:])
    assert information.drift > 1
    fresh = InformationMatrix(24, lam=0.1)
    fresh.add_many(points)
    torch.testing.assert_close(
        information.score(points[:5]), fresh.score(points[:5]), rtol=1e-11, atol=0
    )
