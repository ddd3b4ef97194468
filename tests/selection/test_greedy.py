"""greedy_logdet against brute force, which inverts V again at every pick."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.ops import scores as score_ops
from activedpo_fast.selection import pair_features as normalize
from activedpo_fast.selection.eligible import Eligible
from activedpo_fast.selection.greedy import running_scores as scores
from activedpo_fast.selection.greedy.logdet import greedy_logdet
from activedpo_fast.selection.greedy.running_scores import RunningScores
from activedpo_fast.selection.greedy.top import rank_top
from activedpo_fast.selection.information.labeled import labeled_information
from activedpo_fast.selection.information.matrix import InformationMatrix
from activedpo_fast.selection.pair_features import PairFeatures
from activedpo_fast.store.rows import StoredRows
from tests.selection.test_information import exact_scores
from tests.support.examples import examples

NORMALIZE = ("response", "pair", None)


def unit_or_zero(rows):
    norms = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norms == 0, 1.0, norms)


def plain_features(rows, pairs, how, weights=None):
    rows = rows.double()
    if how == "response":
        rows = unit_or_zero(rows)
    phi = rows[pairs[:, 0]] - rows[pairs[:, 1]]
    phi = unit_or_zero(phi) if how == "pair" else phi
    return phi if weights is None else phi * weights[:, None]


class Rules(NamedTuple):
    """The arguments of Eligible, for the plain definition and the real one."""

    inverse_cost: torch.Tensor | None = None
    min_score: float = -math.inf
    n_random: int = 0
    random_order: torch.Tensor | None = None
    prompt: torch.Tensor | None = None
    max_per_prompt: int = 0

    def eligible(self, n_pairs):
        return Eligible(torch.ones(n_pairs, dtype=torch.bool), **self._asdict())


def brute_force(phi, labeled, n, ridge, rules=None, tie=1e-11):
    """Picks and scores of V = ridge I + labeled + picks, inverted again at each pick."""
    rules = rules or Rules()
    v = ridge * torch.eye(phi.shape[1], dtype=torch.float64) + labeled.T @ labeled
    cost = [1.0] * len(phi) if rules.inverse_cost is None else rules.inverse_cost.tolist()
    left, indices, scores = list(range(len(phi))), [], []
    while left and len(indices) < n:
        score = ((phi @ torch.linalg.inv(v)) * phi).sum(dim=1).tolist()
        if len(indices) < rules.n_random:
            index = min(left, key=lambda i: rules.random_order[i])
        else:
            left = [i for i in left if score[i] >= rules.min_score]
            best = max((score[i] * cost[i] for i in left), default=0.0)
            index = next((i for i in left if score[i] * cost[i] >= best * (1 - tie)), None)
            if index is None:
                break
        left.remove(index)
        indices.append(index)
        scores.append(score[index])
        v += torch.outer(phi[index], phi[index])
        if rules.prompt is not None:
            prompt = rules.prompt[index]
            if sum(int(rules.prompt[i] == prompt) for i in indices) >= rules.max_per_prompt:
                left = [i for i in left if rules.prompt[i] != prompt]
    return indices, scores


def assert_same(got, expected, rel=1e-8):
    indices, scores = expected
    assert got.indices.tolist() == indices
    assert got.scores.tolist() == pytest.approx(scores, rel=rel, abs=1e-30)
    assert got.indices.dtype == torch.int64 and got.scores.dtype == torch.float64
    assert got.touched.shape == (len(indices),) and (got.touched >= 0).all()


def random_case(seed, n_items, responses, k, *, duplicates, zeros, log_norms=(0.0, 0.0)):
    """Rows with copies and zeros among them, and all pairs of each item's responses."""
    generator = torch.Generator().manual_seed(seed)
    n_rows = n_items * responses
    rows = torch.randn(n_rows, k, generator=generator, dtype=torch.float64)
    low, high = log_norms
    rows *= 10 ** (
        low + (high - low) * torch.rand(n_rows, 1, generator=generator, dtype=torch.float64)
    )
    for _ in range(duplicates):
        a, b = torch.randint(n_rows, (2,), generator=generator).tolist()
        rows[a] = rows[b]
    for _ in range(zeros):
        rows[int(torch.randint(n_rows, (1,), generator=generator))] = 0.0
    within = torch.combinations(torch.arange(responses))
    pairs = torch.cat([within + item * responses for item in range(n_items)])
    return rows, pairs


cases = st.fixed_dictionaries(
    dict(
        seed=st.integers(0, 2**20),
        n_items=st.integers(1, 10),
        responses=st.integers(2, 4),
        k=st.integers(1, 24),
        duplicates=st.integers(0, 8),
        zeros=st.integers(0, 3),
    )
)
storages = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


def random_pairs(n_rows, n, seed):
    """Pairs of any rows, also of different prompts, and some of them twice."""
    return torch.randint(n_rows, (n, 2), generator=torch.Generator().manual_seed(seed))


def random_weights(n, seed):
    """Some of them are zero."""
    drawn = 3 * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(drawn < 0.2, 0.0, drawn)


@st.composite
def rules(draw, n_pairs, first, n, typical):
    """`first`: the first row of each pair; `typical`: the size of a score."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    given = {}
    if draw(st.booleans()):
        costs = torch.tensor([0.25, 1.0, 1.0, 7.0], dtype=torch.float64)
        given["inverse_cost"] = costs[torch.randint(4, (n_pairs,), generator=generator)]
    if draw(st.booleans()):
        given["min_score"] = typical * draw(st.sampled_from([-1.0, 1e-3, 0.1, 0.9]))
    if draw(st.booleans()):
        given["n_random"] = round(draw(st.floats(0, 1)) * n)
        given["random_order"] = torch.randperm(n_pairs, generator=generator)
    if draw(st.booleans()):
        given["prompt"] = first // 3
        given["max_per_prompt"] = draw(st.integers(1, 3))
    return Rules(**given)


@given(
    case=cases,
    dtype=storages,
    how=st.sampled_from(NORMALIZE),
    log_lam=st.floats(-2, 3),
    kappa=st.sampled_from([1.0, 0.25]),
    log_norm=st.floats(-6, 6),
    labeled=st.integers(0, 5),
    weighted=st.booleans(),
    any_pairs=st.booleans(),
    ruled=st.booleans(),
    batch=st.sampled_from([3, 2048]),
    data=st.data(),
)
@settings(max_examples=examples(120), deadline=None)
def test_same_picks_and_scores_as_brute_force(
    case, dtype, how, log_lam, kappa, log_norm, labeled, weighted, any_pairs, ruled, batch, data
):
    # Norms of one case span two decades, and without normalization stay where the brute force can
    # tell candidates apart; the exact test below has the rest.
    log_norm = min(log_norm, 1.0) if how is None else log_norm
    if dtype == torch.float16:
        log_norm = max(-1.0, min(log_norm, 3.0))
    rows, pairs = random_case(**case, log_norms=(log_norm - 2, log_norm))
    rows = rows.to(dtype)
    if any_pairs:
        pairs = random_pairs(len(rows), len(pairs), case["seed"])
    weights = random_weights(len(pairs), case["seed"]) if weighted else None
    # Labeled rows repeat candidates: they are the same pool, a round later.
    some = random_pairs(len(rows), labeled, case["seed"] + 1)
    history = (rows[some.flatten()], torch.arange(2 * labeled).reshape(-1, 2))
    history_weights = random_weights(labeled, case["seed"] + 1) if weighted else None
    n = data.draw(st.integers(0, len(pairs)))

    phi = plain_features(rows, pairs, how, weights)
    ridge = 10**log_lam / kappa
    limits = Rules()
    if ruled and len(pairs):
        typical = float(phi.square().sum(dim=1).median()) / ridge
        limits = data.draw(rules(len(pairs), pairs[:, 0], n, typical))
    expected = brute_force(phi, plain_features(*history, how, history_weights), n, ridge, limits)
    touched = []
    for backend in ("cpp", "reference"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACTIVEDPO_BACKEND", backend)
            patch.setattr(scores, "_BATCH", batch)
            got = greedy_logdet(
                rows,
                pairs,
                n,
                lam=10**log_lam,
                kappa=kappa,
                normalize=how,
                weights=weights,
                history=history if labeled else None,
                history_weights=history_weights if labeled else None,
                eligible=limits.eligible(len(pairs)) if ruled else None,
            )
        assert_same(got, expected)
        touched.append(int(got.touched.sum()))
    assert touched[0] <= touched[1]


@pytest.mark.parametrize("how", NORMALIZE)
@pytest.mark.parametrize("lam", [1e-6, 1e-4])
def test_same_picks_as_brute_force_at_tiny_lambda(how, lam):
    rows, pairs = random_case(5, 20, 3, 12, duplicates=0, zeros=0)
    rows = unit_or_zero(rows)
    phi = plain_features(rows, pairs, how)
    got = greedy_logdet(rows, pairs, len(pairs), lam=lam, normalize=how)
    # torch.linalg.inv itself is good to about 1e-9 here.
    assert_same(got, brute_force(phi, phi[:0], len(pairs), lam, tie=1e-9))


def replay(phi, picks, ridge, inverse_cost):
    """Scores of given picks by Sherman-Morrison; each must be the best, and the first of its
    copies."""
    inverse = torch.eye(phi.shape[1], dtype=torch.float64) / ridge
    score = phi.square().sum(dim=1) / ridge
    rounding = 1e-12 * score * inverse_cost
    kind = phi.unique(dim=0, return_inverse=True)[1]
    left, scores = torch.ones(len(phi), dtype=torch.bool), []
    for index in picks:
        value = torch.where(left, score * inverse_cost, -1.0)
        assert left[index] and (value <= value[index] + rounding + rounding[index]).all()
        copies = left[:index] & (kind[:index] == kind[index])
        assert not (copies & (inverse_cost[:index] >= inverse_cost[index])).any()
        left[index] = False
        w = inverse @ phi[index]
        scores.append(float(phi[index] @ w))
        inverse -= torch.outer(w, w) / (1 + scores[-1])
        score = score - (phi @ w).square() / (1 + scores[-1])
    return scores


@given(
    seed=st.integers(0, 2**20),
    n_items=st.integers(60, 500),
    responses=st.integers(2, 4),
    k=st.one_of(st.integers(64, 512), st.sampled_from([64, 128, 511, 512])),
    n=st.integers(1, 120),
    dtype=storages,
    how=st.sampled_from(NORMALIZE),
    lam=st.sampled_from([0.03, 1.0, 100.0]),
    spread=st.sampled_from([0.0, 0.5, 2.0]),
    rank=st.sampled_from([8, 64, None]),
    costs=st.booleans(),
    kept=st.booleans(),
    batch=st.sampled_from([16, 2048]),
)
@settings(max_examples=examples(30), deadline=None)
def test_larger_pools(
    seed, n_items, responses, k, n, dtype, how, lam, spread, rank, costs, kept, batch
):
    """Many blocks of candidates, margins that grow and shrink, panels with rows to spare."""
    rows, pairs = random_case(
        seed, n_items, responses, k, duplicates=20, zeros=5, log_norms=(-spread, 0.0)
    )
    generator = torch.Generator().manual_seed(seed)
    if rank is not None:  # most of the rows lie in few directions, as gradients do
        mix = torch.randn(rank, k, generator=generator, dtype=torch.float64)
        rows = rows[:, :rank] @ mix / rank**0.5 + 0.05 * rows
    rows = rows.to(dtype)
    inverse_cost = torch.ones(len(pairs), dtype=torch.float64)
    if costs:
        inverse_cost = 0.1 + torch.rand(len(pairs), generator=generator, dtype=torch.float64)
    n = min(n, len(pairs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "_BATCH", batch)
        if not kept:
            patch.setattr(score_ops, "_PRODUCTS_BYTES", 0)
        got = greedy_logdet(
            rows,
            pairs,
            n,
            lam=lam,
            normalize=how,
            eligible=Rules(inverse_cost if costs else None).eligible(len(pairs)),
        )
    assert len(got.indices) == n
    picks = got.indices.tolist()
    expected = replay(plain_features(rows, pairs, how), picks, lam, inverse_cost)
    assert_same(got, (picks, expected))


@given(
    case=st.fixed_dictionaries(
        dict(
            seed=st.integers(0, 2**20),
            n_items=st.integers(1, 4),
            responses=st.integers(2, 3),
            k=st.integers(1, 5),
            duplicates=st.integers(0, 5),
            zeros=st.integers(0, 2),
        )
    ),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    how=st.sampled_from(NORMALIZE),
    lam=st.sampled_from([1e-6, 1.0, 1e3]),
    log_norm=st.sampled_from([-6.0, 0.0, 6.0, 30.0]),
    spread=st.sampled_from([0.0, 3.0, 12.0, 60.0]),
    any_pairs=st.booleans(),
    batch=st.sampled_from([2, 2048]),
)
@settings(max_examples=examples(60), deadline=None)
def test_every_pick_is_the_best_in_exact_arithmetic(
    case, dtype, how, lam, log_norm, spread, any_pairs, batch
):
    """Any norms and any lambda: also where no float64 inverse of V has a correct digit."""
    # Unless it is of 60 decades, the spread stays within what each dtype can hold.
    log_norm = 30.0 if spread == 60.0 else log_norm
    rows, pairs = random_case(**case, log_norms=(log_norm - spread, log_norm))
    rows = rows.to(dtype)
    if any_pairs:
        pairs = random_pairs(len(rows), len(pairs), case["seed"])
    features = PairFeatures(rows, pairs, how)
    phi = features.at(torch.arange(len(pairs)))
    # The resolution that InformationMatrix promises for the root of a score.
    resolution = InformationMatrix(rows.shape[1], lam=lam).error_scale() * features.size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "_BATCH", batch)
        got = greedy_logdet(rows, pairs, len(pairs), lam=lam, normalize=how)
    assert sorted(got.indices.tolist()) == list(range(len(pairs)))
    left = list(range(len(pairs)))
    allowed = resolution.tolist()
    for step, index in enumerate(got.indices.tolist()):
        chosen = phi[got.indices[:step]]
        exact = dict(enumerate(exact_scores(chosen, phi, Fraction(lam))))
        root = float(exact[index]) ** 0.5
        # No other is better by more than the errors of both roots, and the score is right.
        for i in left:
            assert float(exact[i]) ** 0.5 - root <= 2 * (allowed[i] + allowed[index])
        assert abs(float(got.scores[step]) ** 0.5 - root) <= allowed[index]
        if root > 0:
            # For each earlier pick the angle by which its rounding turns the rest.
            angle = float(resolution[index]) / root
            allowed = [was + 2 * angle * float(exact[i]) ** 0.5 for i, was in enumerate(allowed)]
        # In a tie, a later one may be picked, but none that comes after the best.
        assert index <= min(left, key=lambda i: (-exact[i], i))
        left.remove(index)


def test_pairs_that_differ_by_less_than_rounding_accumulates_are_told_apart():
    # Pair 1 is better than pair 0 by 1e-12, after 30 picks that hardly change either.
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


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_remainders_of_nearly_dependent_features_are_told_apart(backend, monkeypatch):
    """Scores fall from 1e19 to 0.1, and the errors of earlier picks stay a small part of that."""
    monkeypatch.setenv("ACTIVEDPO_BACKEND", backend)
    rows, pairs = random_case(0, 2, 3, 2, duplicates=0, zeros=1, log_norms=(6.0, 6.0))
    got = greedy_logdet(rows, pairs, 6, normalize=None, lam=1e-6)
    phi = plain_features(rows, pairs, None)
    for step, index in enumerate(got.indices.tolist()):
        exact = exact_scores(phi[got.indices[:step]], phi, Fraction(1e-6))
        left = set(range(6)) - set(got.indices[:step].tolist())
        assert float(exact[index]) >= max(float(exact[i]) for i in left) * (1 - 1e-12)
        assert float(got.scores[step]) == pytest.approx(float(exact[index]), rel=1e-5)


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


def test_gains_add_up_to_the_log_determinant():
    rows, pairs = random_case(2, 8, 3, 16, duplicates=0, zeros=0)
    got = greedy_logdet(rows, pairs, 20, lam=0.5, kappa=2.0)
    v_0 = InformationMatrix(16, lam=0.5, kappa=2.0)
    labeled = PairFeatures(rows, pairs[got.indices], "response")
    v = labeled_information(labeled, labeled, lam=0.5, kappa=2.0)
    assert v.count == 20
    assert v.logdet() - v_0.logdet() == pytest.approx(float(got.scores.log1p().sum()))
    assert (got.scores.diff() <= 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", NORMALIZE)
def test_stored_dtypes_are_widened_a_chunk_at_a_time(dtype, how, monkeypatch):
    rows, pairs = random_case(4, 9, 3, 16, duplicates=3, zeros=1)
    rows = rows.to(dtype)
    history = (rows[:8], torch.arange(8).reshape(-1, 2))
    want = greedy_logdet(rows.double(), pairs, 15, normalize=how, history=history)
    monkeypatch.setattr(normalize, "_CHUNK_BYTES", 5 * 8 * 16)
    features = PairFeatures(rows, pairs, how)
    assert features.rows is rows
    assert {len(part) for part in features.chunks()} == {5, 2}
    got = greedy_logdet(rows, pairs, 15, normalize=how, history=history)
    assert got.indices.tolist() == want.indices.tolist()
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_few_candidates_are_scored_again(dtype, monkeypatch):
    """The error bound is tight enough to be useful: one or two candidates per pick."""
    counts = []
    original = RunningScores.refresh

    def counting(self, indices):
        counts.append(len(indices))
        original(self, indices)

    monkeypatch.setattr(RunningScores, "refresh", counting)
    rows, pairs = random_case(6, 60, 3, 64, duplicates=0, zeros=0)
    greedy_logdet(rows.to(dtype), pairs, 40)
    assert len(counts) == 40 and sum(counts) <= 42


def test_touched_counts_rows(monkeypatch):
    """Pairs at right angles, each alone within its margin: the next pick's two rows are enough."""
    norms = 0.9 ** torch.arange(30)
    rows = torch.stack([torch.diag(norms), torch.zeros(30, 30)], dim=1).reshape(60, 30)
    pairs = torch.arange(60).reshape(30, 2)
    got = greedy_logdet(rows, pairs, 30, normalize=None)
    assert got.indices.tolist() == list(range(30))
    assert got.touched.tolist() == [0] + [2] * 29
    monkeypatch.setenv("ACTIVEDPO_BACKEND", "reference")
    got = greedy_logdet(rows, pairs, 30, normalize=None)
    assert got.touched.tolist() == [0] + [2 * (30 - i) for i in range(1, 30)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_most_rows_are_read_only_a_few_times(dtype):
    rows, pairs = random_case(1, 700, 3, 64, duplicates=0, zeros=0, log_norms=(-1.5, 0.0))
    got = greedy_logdet(rows.to(dtype), pairs, 100, normalize=None)
    assert got.touched.shape == (100,)
    assert 0 < int(got.touched.sum()) < 0.1 * len(rows) * 100
    assert int(got.touched.max()) <= len(rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_on_disk_give_the_picks_of_rows_in_memory(dtype, tmp_path):
    rows, pairs = random_case(8, 60, 3, 40, duplicates=5, zeros=2)
    rows = rows.to(dtype)
    save_file({"gradients": rows}, tmp_path / "rows.safetensors")
    stored = StoredRows.open([tmp_path / "rows.safetensors"])
    want = greedy_logdet(rows, pairs, 50, history=(rows[:9], pairs[:3]))
    got = greedy_logdet(stored, pairs, 50, history=(stored.select(torch.arange(9)), pairs[:3]))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "n, message",
    [(4, "4 pairs are asked for, but there are only 3"), (-1, "0 or more"), (1.5, "integer")],
)
def test_bad_n(n, message):
    with pytest.raises(ActiveDPOError, match=message):
        greedy_logdet(torch.ones(6, 2), torch.arange(6).reshape(3, 2), n)


def test_no_picks_and_no_candidates():
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
    with pytest.raises(ActiveDPOError, match="too large"):
        greedy_logdet(torch.eye(6, 2).double() * 1e150, pairs, 1, normalize=None, lam=1e-10)
    with pytest.raises(ActiveDPOError, match="normalize"):
        greedy_logdet(torch.ones(6, 2), pairs, 1, normalize="rows")
    with pytest.raises(ActiveDPOError, match="lam"):
        greedy_logdet(torch.ones(6, 2), pairs, 1, lam=0.0)
    with pytest.raises(ActiveDPOError, match=r"\[N, 2\]"):
        greedy_logdet(torch.ones(6, 2), pairs, 1, history=(torch.ones(2, 3), pairs[:1]))


def test_rank_top_breaks_ties_within_the_error_bound():
    scores = torch.tensor([1.0, 3.0, 3.0 + 1e-14, 2.0], dtype=torch.float64)
    assert rank_top(scores, torch.full_like(scores, 1e-13), 3).indices.tolist() == [1, 2, 3]
    assert rank_top(scores, torch.zeros_like(scores), 3).indices.tolist() == [2, 1, 3]
