"""InformationMatrix over a project's life: its primitives, removals, drift and files."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, safe_open, save_file

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.selection.information.dense import DenseBase
from activedpo_fast.selection.information.matrix import InformationMatrix
from tests.unit.test_information import FORMS, exact_scores, unit_rows

EPS = torch.finfo(torch.float64).eps


def state(information):
    """Everything a matrix answers with, as one tensor."""
    probes = unit_rows(5, information.dim, seed=99)
    return torch.cat([information.whiten(probes).flatten(), information.pull_back(probes).flatten(),
                      torch.tensor([information.logdet(), information.count],
                                   dtype=torch.float64)])


def worst_error(information, left, queries):
    """The largest relative error of the scores, against rational arithmetic."""
    exact = exact_scores(left, queries, Fraction(information.lam) / Fraction(information.kappa))
    return max(float(abs(Fraction(float(got)) - want) / want)
               for got, want in zip(information.score(queries), exact, strict=True))


def removal_error(lam, left):
    """What the explicit form promises after a removal, with room for the probe's luck."""
    return 1e-11 + 32 * EPS * (lam + len(left)) / lam


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
        kept = (information._latest.directions, information._latest.triangle,
                information._points.values)
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
            with pytest.raises(ActiveDPOError, match="finite"):
                information.remove(phi)
    assert torch.equal(state(information), before)


# --- remove ---


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lam", [1e-6, 1e-3, 1.0, 1e3])
def test_removal_against_exact_arithmetic(form, lam):
    points = unit_rows(4, 6)
    added = torch.cat([points, points[:2], points[:1]])  # exact duplicates
    queries = torch.cat([points, unit_rows(3, 6, seed=3)])
    information = InformationMatrix(6, lam=lam, form=form)
    information.add_many(added)
    left = added
    for gone in (0, 1, 3, 0, 1):  # one of three equal points, one of two, the only one, ...
        information.remove(left[gone])
        left = torch.cat([left[:gone], left[gone + 1:]])
        bound = removal_error(lam, left) if information.is_explicit else 1e-11
        assert worst_error(information, left, queries) < bound
        assert information.count == len(left)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lam", [1e-6, 1.0, 1e3])
def test_a_matrix_from_which_all_was_removed_is_a_fresh_one(form, lam):
    points = torch.cat([unit_rows(5, 8), unit_rows(2, 8), torch.zeros(1, 8)])
    information, fresh = (InformationMatrix(8, lam=lam, form=form) for _ in range(2))
    information.add_many(points)
    for phi in points.flip(0):
        information.remove(-phi)  # (-phi) (-phi)^T is the same
    assert torch.equal(state(information), state(fresh))
    assert information.is_explicit == fresh.is_explicit
    information.add(points[0])
    fresh.add(points[0])
    assert torch.equal(state(information), state(fresh))


@given(
    k=st.integers(1, 12), form=st.sampled_from(FORMS), log_lam=st.floats(-6, 3),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=40),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=80, deadline=None)
def test_interleaved_adds_and_removes_match_torch_linalg(k, form, log_lam, steps, seed):
    lam = 10**log_lam
    points, queries = unit_rows(8, k, seed), unit_rows(5, k, seed + 1)
    information = InformationMatrix(k, lam=lam, form=form)
    held = []
    for remove, which in steps:
        if remove and held:
            information.remove(points[held.pop(which % len(held))])
        else:
            information.add(points[which])
            held.append(which)
    fresh = InformationMatrix(k, lam=lam, form="low_rank")
    fresh.add_many(points[held])
    assert information.count == len(held)
    rtol = 1e-10 + 40 * removal_error(lam, points[held])
    torch.testing.assert_close(information.score(queries), fresh.score(queries), rtol=rtol, atol=0)
    v = lam * torch.eye(k, dtype=torch.float64) + points[held].T @ points[held]
    assert information.logdet() == pytest.approx(float(torch.linalg.slogdet(v)[1]), rel=rtol,
                                                 abs=rtol * k)


def test_removals_do_not_make_the_low_rank_form_grow():
    information = InformationMatrix(64, lam=1e-3, form="low_rank")
    points = unit_rows(4, 64)
    information.add_many(points.repeat(2, 1))
    for turn in range(100):
        information.remove(points[turn % 4])  # its twin stays: a downdate
        information.add(points[turn % 4])
    assert len(information._latest) <= 2 * information.count + 1
    fresh = InformationMatrix(64, lam=1e-3)
    fresh.add_many(points.repeat(2, 1))
    torch.testing.assert_close(information.score(points), fresh.score(points), rtol=1e-11, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lam", [1e-6, 1.0, 1e3])
def test_a_point_that_was_never_added_cannot_be_removed(form, lam):
    points, other = unit_rows(3, 8), unit_rows(1, 8, seed=5)[0]
    information = InformationMatrix(8, lam=lam, form=form)
    with pytest.raises(ActiveDPOError, match="no point"):
        information.remove(other)
    information.add_many(points)
    before = state(information)
    for phi in (other, 2 * points[0]):
        with pytest.raises(ActiveDPOError, match="not added"):
            information.remove(phi)
    with pytest.raises(ActiveDPOError, match=r"\[8\]"):
        information.remove(points)
    torch.testing.assert_close(state(information), before, rtol=1e-14, atol=1e-15 * lam**-0.5)
    for phi in points[:2]:
        information.remove(phi)
    with pytest.raises(ActiveDPOError, match="not added|not the one that is left"):
        information.remove(0.5 * points[2])
    information.remove(points[2])


def test_a_feature_computed_again_in_float32_is_known():
    information = InformationMatrix(12, lam=1e-3)
    points = unit_rows(5, 12)
    left = torch.cat([points, points])
    information.add_many(left)
    for gone in (8, 3):  # a downdate first, as the twin stays
        information.remove(left[gone].float())
        left = torch.cat([left[:gone], left[gone + 1:]])
        assert worst_error(information, left, points) < 1e-11


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
def test_a_refresh_that_only_looks_better_is_not_made(seed):
    # V = 1e-6 I + 1100 points in 4 of 6 dimensions: V's rounding is 1e-7 of its smallest values.
    points = unit_rows(4, 6, seed)
    queries = torch.cat([points, unit_rows(3, 6, seed + 100)])
    information = InformationMatrix(6, lam=1e-6, form="explicit")
    added = points.repeat(275, 1)
    information.add_many(added)
    assert information.drift is not None
    assert worst_error(information, added, queries) < 1e-11
    rebuilt = information._base.rebuilt().root  # what a refresh would have cost
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
    torch.testing.assert_close(information.score(points[:5]), fresh.score(points[:5]), rtol=1e-11,
                               atol=0)


# --- files ---


@pytest.mark.parametrize("form, t", [("low_rank", 5), ("auto", 3), ("auto", 70), ("explicit", 0),
                                     ("explicit", 130)])
def test_a_loaded_matrix_continues_bit_for_bit(tmp_path, form, t):
    points = unit_rows(200, 11)
    information = InformationMatrix(11, lam=0.3, kappa=2.0, form=form)
    for phi in points[:t]:
        information.add(phi)
    if t > 3:
        information.remove(points[1])
    information.save(tmp_path / "v.safetensors")
    loaded = InformationMatrix.load(tmp_path / "v.safetensors", dim=11, lam=0.3, kappa=2.0)
    for one in (information, loaded):
        one.add(points[150])
        one.add_many(points[151:200])
        one.remove(points[160])
    assert torch.equal(state(loaded), state(information))
    assert (loaded.count, loaded.form, loaded.is_explicit) == (
        information.count, form, information.is_explicit)
    assert [p.name for p in tmp_path.iterdir()] == ["v.safetensors"]


def test_the_watch_over_the_drift_goes_on_after_loading(tmp_path):
    information = InformationMatrix(11, form="explicit")
    information.add_many(unit_rows(1000, 11))
    information.save(tmp_path / "v.safetensors")
    loaded = InformationMatrix.load(tmp_path / "v.safetensors")
    for one in (information, loaded):
        one.add_many(unit_rows(64, 11, seed=1))
    assert loaded.drift == information.drift is not None


def test_expectations_of_a_file(tmp_path):
    path = tmp_path / "v.safetensors"
    InformationMatrix(4, lam=0.5).save(path)
    for wanted in (dict(dim=5), dict(lam=1.0), dict(kappa=2.0)):
        with pytest.raises(ActiveDPOError, match=f"made with {next(iter(wanted))} = "):
            InformationMatrix.load(path, **wanted)


def test_files_that_are_refused(tmp_path):
    path = tmp_path / "v.safetensors"
    information = InformationMatrix(4)
    information.add_many(unit_rows(2, 4))
    information.save(path)
    whole = path.read_bytes()

    def refused(match):
        with pytest.raises(ActiveDPOError, match=match) as caught:
            InformationMatrix.load(path)
        assert "\n" not in str(caught.value)

    path.write_bytes(whole[:-1])
    refused("cannot be read")
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    refused("checksum")
    path.write_bytes(whole.replace(b'\\"lam\\":1.0', b'\\"lam\\":2.0').replace(
        b'\\"lam\\": 1.0', b'\\"lam\\": 2.0'))
    assert path.read_bytes() != whole
    refused("checksum")
    path.write_bytes(b"not a file of ours")
    refused("cannot be read")
    save_file({"features": torch.ones(2)}, path)
    refused("does not hold an information matrix")
    path.write_bytes(whole)
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(path), path, metadata=metadata | {"format": "2"})
    refused("format 2")
    path.unlink()
    refused("not there")
    path.mkdir()
    refused("not there")
    with pytest.raises(ActiveDPOError, match="cannot be written"):
        information.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["v.safetensors"]
