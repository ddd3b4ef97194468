"""greedy_logdet against brute force: V inverted afresh at every pick."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.selection import greedy, normalize
from activedpo_fast.selection.greedy import greedy_logdet, rank_top
from activedpo_fast.selection.information import InformationMatrix
from activedpo_fast.selection.normalize import PairFeatures
from tests.unit.test_information import exact_scores

NORMALIZE = ("response", "pair", None)


def unit_or_zero(rows):
    norms = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norms == 0, 1.0, norms)


def plain_features(rows, pairs, how):
    rows = rows.double()
    if how == "response":
        rows = unit_or_zero(rows)
    phi = rows[pairs[:, 0]] - rows[pairs[:, 1]]
    return unit_or_zero(phi) if how == "pair" else phi


def brute_force(rows, pairs, n, lam, kappa, how, history=None, tie=1e-11):
    phi = plain_features(rows, pairs, how)
    v = lam / kappa * torch.eye(rows.shape[1], dtype=torch.float64)
    if history is not None:
        labelled = plain_features(*history, how)
        v += labelled.T @ labelled
    left, indices, scores = list(range(len(pairs))), [], []
    for _ in range(n):
        score = ((phi @ torch.linalg.inv(v)) * phi).sum(dim=1)
        best = max(float(score[i]) for i in left)
        index = next(i for i in left if float(score[i]) >= best * (1 - tie))
        left.remove(index)
        indices.append(index)
        scores.append(float(score[index]))
        v += torch.outer(phi[index], phi[index])
    return indices, scores


def random_case(seed, n_items, responses, k, *, duplicates, zeros, log_norms=(0.0, 0.0)):
    """Rows with copies and zeros among them, and all pairs of each item's responses."""
    generator = torch.Generator().manual_seed(seed)
    n_rows = n_items * responses
    rows = torch.randn(n_rows, k, generator=generator, dtype=torch.float64)
    low, high = log_norms
    rows *= 10 ** (low + (high - low) * torch.rand(n_rows, 1, generator=generator,
                                                   dtype=torch.float64))
    for _ in range(duplicates):
        a, b = torch.randint(n_rows, (2,), generator=generator).tolist()
        rows[a] = rows[b]
    for _ in range(zeros):
        rows[int(torch.randint(n_rows, (1,), generator=generator))] = 0.0
    within = torch.combinations(torch.arange(responses))
    pairs = torch.cat([within + item * responses for item in range(n_items)])
    return rows, pairs


cases = st.fixed_dictionaries(dict(
    seed=st.integers(0, 2**20), n_items=st.integers(1, 10), responses=st.integers(2, 4),
    k=st.integers(1, 24), duplicates=st.integers(0, 8), zeros=st.integers(0, 3),
))


@given(case=cases, how=st.sampled_from(NORMALIZE), log_lam=st.floats(-2, 3),
       kappa=st.sampled_from([1.0, 0.25]), log_norm=st.floats(-6, 6), labelled=st.integers(0, 5),
       data=st.data())
@settings(max_examples=150, deadline=None)
def test_same_picks_and_scores_as_brute_force(case, how, log_lam, kappa, log_norm, labelled, data):
    # Norms of one case span two decades, and without normalisation stay where the brute force can
    # tell candidates apart; the exact test below has the rest.
    log_norm = min(log_norm, 1.0) if how is None else log_norm
    rows, pairs = random_case(**case, log_norms=(log_norm - 2, log_norm))
    history = None
    if labelled:
        generator = torch.Generator().manual_seed(case["seed"] + 1)
        # Labelled rows repeat candidates: they are the same pool, a round later.
        some = torch.randint(len(rows), (2 * labelled,), generator=generator)
        history = (rows[some], torch.arange(2 * labelled).reshape(-1, 2))
    n = data.draw(st.integers(0, len(pairs)))
    got = greedy_logdet(rows, pairs, n, lam=10**log_lam, kappa=kappa, normalize=how,
                        history=history)
    indices, scores = brute_force(rows, pairs, n, 10**log_lam, kappa, how, history)
    assert got.indices.tolist() == indices
    assert got.scores.tolist() == pytest.approx(scores, rel=1e-8, abs=1e-30)
    assert got.indices.dtype == torch.int64 and got.scores.dtype == torch.float64


@pytest.mark.parametrize("how", NORMALIZE)
@pytest.mark.parametrize("lam", [1e-6, 1e-4])
def test_same_picks_as_brute_force_at_tiny_lambda(how, lam):
    rows, pairs = random_case(5, 20, 3, 12, duplicates=0, zeros=0)
    rows = unit_or_zero(rows)
    got = greedy_logdet(rows, pairs, len(pairs), lam=lam, normalize=how)
    # torch.linalg.inv itself is good to about 1e-9 here.
    indices, scores = brute_force(rows, pairs, len(pairs), lam, 1.0, how, tie=1e-9)
    assert got.indices.tolist() == indices
    assert got.scores.tolist() == pytest.approx(scores, rel=1e-8)


@given(
    case=st.fixed_dictionaries(dict(
        seed=st.integers(0, 2**20), n_items=st.integers(1, 4), responses=st.integers(2, 3),
        k=st.integers(1, 5), duplicates=st.integers(0, 5), zeros=st.integers(0, 2))),
    how=st.sampled_from(NORMALIZE), lam=st.sampled_from([1e-6, 1.0, 1e3]),
    log_norm=st.sampled_from([-6.0, 0.0, 6.0]), spread=st.sampled_from([0.0, 3.0, 12.0]),
)
@settings(max_examples=60, deadline=None)
def test_every_pick_is_the_best_in_exact_arithmetic(case, how, lam, log_norm, spread):
    """Any norms and any lambda: also where no float64 inverse of V has a correct digit."""
    rows, pairs = random_case(**case, log_norms=(log_norm - spread, log_norm))
    features = PairFeatures(rows, pairs, how)
    phi = features.at(torch.arange(len(pairs)))
    # The resolution that InformationMatrix promises for the root of a score.
    resolution = InformationMatrix(rows.shape[1], lam=lam).error_scale() * features.size
    got = greedy_logdet(rows, pairs, len(pairs), lam=lam, normalize=how)
    left = list(range(len(pairs)))
    inherited = [0.0] * len(pairs)
    for step, index in enumerate(got.indices.tolist()):
        chosen = phi[got.indices[:step]]
        scores = dict(enumerate(exact_scores(chosen, phi, Fraction(lam))))
        root = float(scores[index]) ** 0.5
        best = max(left, key=lambda i: scores[i])
        assert root >= float(scores[best]) ** 0.5 - 2 * float(resolution.max())
        # What InformationMatrix promises for a feature formed without error, and for each earlier
        # pick the angle by which its rounding turns the rest.
        allowed = float(resolution[index]) + inherited[index]
        assert abs(float(got.scores[step]) ** 0.5 - root) <= allowed
        if root > 0:
            angle = float(resolution[index]) / root
            inherited = [was + 2 * angle * float(scores[i]) ** 0.5
                         for i, was in enumerate(inherited)]
        assert not any(scores[i] >= scores[index] for i in left if i < index)
        left.remove(index)


def test_pairs_that_differ_by_less_than_rounding_accumulates_are_told_apart():
    # Pair 1 is better than pair 0 by 1e-12, after 30 picks that leave both all but untouched.
    k = 64
    rows = torch.zeros(64, k, dtype=torch.float64)
    for i in range(30):
        rows[2 * i, i] = 2.0 + i
    rows[60, 40], rows[62, 41] = 1.0, 1.0 + 1e-12
    rows[60, :30] = rows[62, :30] = 1e-3
    pairs = torch.arange(64).reshape(-1, 2).flip(0)  # the 1 + 1e-12 pair is number 0
    order = greedy_logdet(rows, pairs, 32, normalize=None).indices.tolist()
    assert order[-2:] == [0, 1]
    order = greedy_logdet(rows, pairs.flip(0), 32, normalize=None).indices.tolist()
    assert order[-2:] == [31, 30]


@pytest.mark.parametrize("how", NORMALIZE)
def test_duplicates_tie_and_go_to_the_lowest_index(how):
    rows, pairs = random_case(3, 1, 4, 33, duplicates=0, zeros=0)
    copies = torch.cat([rows] * 5)
    pairs = torch.cat([pairs + 4 * c for c in range(5)])
    order = greedy_logdet(copies, pairs, len(pairs), normalize=how, lam=1e-3).indices.tolist()
    for kind in range(6):
        of_kind = [i for i in order if i % 6 == kind]
        assert of_kind == sorted(of_kind)


def test_zero_features_come_last_in_order():
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    pairs = torch.tensor([[0, 1], [2, 3], [4, 5]])
    for how in NORMALIZE:
        got = greedy_logdet(rows, pairs, 3, normalize=how)
        assert got.indices.tolist() == [2, 0, 1]
        assert got.scores[1:].tolist() == [0.0, 0.0]


def test_row_and_pair_order_do_not_change_the_gains():
    rows, pairs = random_case(11, 8, 3, 16, duplicates=0, zeros=0)
    got = greedy_logdet(rows, pairs, 10)
    shuffle = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    other = greedy_logdet(rows, pairs[shuffle].flip(1), 10)
    assert shuffle[other.indices].tolist() == got.indices.tolist()
    torch.testing.assert_close(other.scores, got.scores, rtol=1e-12, atol=0)


def test_gains_add_up_to_the_log_determinant_and_information_is_updated():
    rows, pairs = random_case(2, 8, 3, 16, duplicates=0, zeros=0)
    information = InformationMatrix(16, lam=0.5, kappa=2.0, form="low_rank")
    before = information.logdet()
    got = greedy_logdet(rows, pairs, 20, lam=0.5, kappa=2.0, information=information)
    assert information.count == 20
    assert information.logdet() - before == pytest.approx(float(got.scores.log1p().sum()))
    assert (got.scores.diff() <= 1e-12).all()
    with pytest.raises(ActiveDPOError, match="lam=0.5"):
        greedy_logdet(rows, pairs, 1, information=information)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", NORMALIZE)
def test_stored_dtypes_are_widened_a_chunk_at_a_time(dtype, how, monkeypatch):
    rows, pairs = random_case(4, 9, 3, 16, duplicates=3, zeros=1)
    rows = rows.to(dtype)
    want = greedy_logdet(rows.double(), pairs, 15, normalize=how)
    monkeypatch.setattr(normalize, "_COPY_BYTES", 0)
    monkeypatch.setattr(normalize, "_CHUNK_BYTES", 5 * 8 * 16)
    assert PairFeatures(rows, pairs, how)._rows.dtype == dtype
    got = greedy_logdet(rows, pairs, 15, normalize=how, history=(rows[:0], pairs[:0]))
    assert got.indices.tolist() == want.indices.tolist()
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-12, atol=0)


def test_few_candidates_are_scored_afresh(monkeypatch):
    """The bound of the error is tight enough to be of use: one candidate or two a pick."""
    counts = []
    original = greedy._Scores._refresh

    def counting(self, indices):
        counts.append(len(indices))
        original(self, indices)

    monkeypatch.setattr(greedy._Scores, "_refresh", counting)
    rows, pairs = random_case(6, 60, 3, 64, duplicates=0, zeros=0)
    greedy_logdet(rows, pairs, 40)
    assert counts[0] == len(pairs)
    assert sum(counts[1:]) <= 42


@pytest.mark.parametrize("n, message", [
    (4, "4 pairs are asked for, but there are only 3"), (-1, "0 or more"), (1.5, "integer"),
])
def test_bad_n(n, message):
    with pytest.raises(ActiveDPOError, match=message):
        greedy_logdet(torch.ones(6, 2), torch.arange(6).reshape(3, 2), n)


def test_nothing_asked_and_nothing_there():
    pairs = torch.arange(6).reshape(3, 2)
    assert greedy_logdet(torch.ones(6, 2), pairs, 0).indices.shape == (0,)
    empty = greedy_logdet(torch.ones(0, 2), pairs[:0], 0)
    assert empty.indices.shape == (0,) and empty.scores.dtype == torch.float64


def test_bad_rows():
    rows, pairs = torch.ones(6, 2), torch.arange(6).reshape(3, 2)
    rows[1, 0], rows[4, 1] = float("nan"), float("inf")
    with pytest.raises(ActiveDPOError, match="not finite: 1, 4 of 6"):
        greedy_logdet(rows, pairs, 1)
    with pytest.raises(ActiveDPOError, match=r"pairs\[2\] is \[4, 5\]"):
        greedy_logdet(torch.ones(5, 2), pairs, 1)
    with pytest.raises(ActiveDPOError, match="floating"):
        greedy_logdet(torch.ones(6, 2, dtype=torch.int64), pairs, 1)
    with pytest.raises(ActiveDPOError, match="normalize"):
        greedy_logdet(torch.ones(6, 2), pairs, 1, normalize="rows")
    with pytest.raises(ActiveDPOError, match="lam"):
        greedy_logdet(torch.ones(6, 2), pairs, 1, lam=0.0)
    with pytest.raises(ActiveDPOError, match=r"\[N, 2\]"):
        greedy_logdet(torch.ones(6, 2), pairs, 1, history=(torch.ones(2, 3), pairs[:1]))


def test_rank_top_breaks_ties_within_the_doubt():
    scores = torch.tensor([1.0, 3.0, 3.0 + 1e-14, 2.0], dtype=torch.float64)
    assert rank_top(scores, torch.full_like(scores, 1e-13), 3).indices.tolist() == [1, 2, 3]
    assert rank_top(scores, torch.zeros_like(scores), 3).indices.tolist() == [2, 1, 3]
