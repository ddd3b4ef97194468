"""Picks by a resident grid (csrc/greedy/): of CPU threads, and on the GPU if there is one."""

from __future__ import annotations

import copy
import math
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.ops import backends
from activedpo_fast.selection.eligible import Eligible
from activedpo_fast.selection.greedy import resident
from activedpo_fast.selection.greedy.logdet import greedy_logdet
from activedpo_fast.selection.greedy.resident import Pace, ResidentProblem, greedy_resident, on_gpu
from activedpo_fast.selection.information.matrix import InformationMatrix
from activedpo_fast.selection.pair_features import PairFeatures
from tests.selection.test_greedy import (
    NORMALIZE,
    brute_force,
    cases,
    plain_features,
    random_case,
    random_pairs,
    random_weights,
    rules,
    storages,
    unit_or_zero,
)
from tests.support.examples import examples
from tests.support.native import module_for_tests
from tests.support.quick import slow_except

ONE_LAUNCH = Pace(first=2**30)
# Picks of any launches are the same: one by one, and 3, 12, 48, ... at a time.
BLOCKS = {1: ONE_LAUNCH, 2: Pace(first=1, seconds=0), 5: Pace(first=3, seconds=math.inf)}


def on_host(blocks, wide=False, pace=ONE_LAUNCH):
    """Run by CPU threads: a block is one thread or, as on a GPU, groups of several lanes."""
    return partial(
        ResidentProblem.run, module=module_for_tests(), pace=pace, blocks=blocks, wide=wide
    )


def everything(rows, pairs, how=None, weights=None):
    """Features, and rules that admit all pairs."""
    return PairFeatures(rows, pairs, how, weights), Eligible.everything(len(pairs))


def on_all_hosts(features, information, eligible, n):
    """The ranking, the same to the last bit for every number of blocks and of launches."""
    first = None
    for blocks, pace in BLOCKS.items():
        run = on_host(blocks, pace=pace)
        got = greedy_resident(features, information, copy.deepcopy(eligible), n, run)
        first = first or got
        assert all(torch.equal(a, b) for a, b in zip(first, got, strict=True))
    return first


def assert_same(got, expected, rel=1e-9):
    assert got.indices.tolist() == expected.indices.tolist()
    assert got.scores.tolist() == pytest.approx(expected.scores.tolist(), rel=rel, abs=1e-30)
    assert got.indices.dtype == torch.int64 and got.scores.dtype == torch.float64
    assert got.touched.shape == got.indices.shape and (got.touched >= 0).all()


def information_of(features, lam=1.0, kappa=1.0, form="auto"):
    v = InformationMatrix(features.dim, lam=lam, kappa=kappa, form=form, device=features.device)
    for phi in features.chunks():
        v.add_many(phi)
    return v


@given(
    case=cases,
    dtype=storages,
    how=st.sampled_from(NORMALIZE),
    log_lam=st.floats(-2, 3),
    kappa=st.sampled_from([1.0, 0.25]),
    log_norm=st.floats(-6, 6),
    labeled=st.integers(0, 5),
    form=st.sampled_from(["auto", "low_rank", "explicit"]),
    weighted=st.booleans(),
    any_pairs=st.booleans(),
    ruled=st.booleans(),
    data=st.data(),
)
@settings(max_examples=examples(100), deadline=None)
def test_picks_of_brute_force_and_of_the_cpu(
    case, dtype, how, log_lam, kappa, log_norm, labeled, form, weighted, any_pairs, ruled, data
):
    log_norm = min(log_norm, 1.0) if how is None else log_norm
    if dtype == torch.float16:
        log_norm = max(-1.0, min(log_norm, 3.0))
    rows, pairs = random_case(**case, log_norms=(log_norm - 2, log_norm))
    rows = rows.to(dtype)
    if any_pairs:
        pairs = random_pairs(len(rows), len(pairs), case["seed"])
    weights = random_weights(len(pairs), case["seed"]) if weighted else None
    some = random_pairs(len(rows), labeled, case["seed"] + 1)
    n = data.draw(st.integers(0, len(pairs)))
    lam = 10**log_lam

    phi, known = plain_features(rows, pairs, how, weights), plain_features(rows, some, how)
    limits = None
    if ruled:
        typical = float(phi.square().sum(dim=1).median()) * kappa / lam
        limits = data.draw(rules(len(pairs), pairs[:, 0], n, typical))
        # Not a number that scores of small cases can be equal to.
        limits = limits._replace(min_score=1.0123 * limits.min_score)
    v = information_of(PairFeatures(rows, some, how), lam, kappa, form)

    def eligible():
        return limits.eligible(len(pairs)) if limits else Eligible.everything(len(pairs))

    got = on_all_hosts(PairFeatures(rows, pairs, how, weights), v, eligible(), n)
    assert_same(
        got,
        greedy_logdet(
            rows,
            pairs,
            n,
            lam=lam,
            kappa=kappa,
            normalize=how,
            weights=weights,
            history=(rows, some),
            eligible=eligible(),
        ),
    )
    indices, scores = brute_force(phi, known, n, lam / kappa, limits)
    assert got.indices.tolist() == indices
    assert got.scores.tolist() == pytest.approx(scores, rel=1e-8, abs=1e-30)


@pytest.mark.parametrize(
    ("lam", "labeled", "form"),
    [
        *slow_except(
            [(1e-6, 7, "low_rank"), (1e3, 0, "explicit")],
            product((1e-6, 1e3), (0, 7), ("low_rank", "explicit")),
        ),
        (1e-3, 0, "low_rank"),
        (1.0, 7, "explicit"),
    ],
)
def test_every_lambda(lam, labeled, form):
    """More than two tiles, pieces and rounds: 200 picks, k = 1100, shared rows."""
    generator = torch.Generator().manual_seed(3)
    k = 1100 if form == "low_rank" else 90
    rows = torch.randn(40, k, generator=generator) * torch.rand(40, 1, generator=generator)
    pairs = torch.combinations(torch.arange(40))[:400]
    history = (rows[:14], torch.arange(14).reshape(7, 2)[:labeled])
    v = information_of(PairFeatures(*history, "response"), lam=lam, form=form)
    want = greedy_logdet(rows, pairs, 200, lam=lam, history=history)
    got = on_all_hosts(*everything_with(rows, pairs, "response", v), 200)
    assert_same(got, want)


def everything_with(rows, pairs, how, information):
    features, eligible = everything(rows, pairs, how)
    return features, information, eligible


@pytest.mark.parametrize("how", NORMALIZE)
def test_ties_go_to_the_lowest_index(how):
    """Each pair four times, and all features of the same length: more contenders than slots."""
    rows, pairs = random_case(7, 10, 2, 24, duplicates=0, zeros=0)
    rows, pairs = unit_or_zero(rows).repeat(4, 1).float(), torch.arange(80).reshape(40, 2)
    features, eligible = everything(rows, pairs, how)
    want = greedy_logdet(rows, pairs, 40, normalize=how, lam=0.1)
    got = on_all_hosts(features, InformationMatrix(24, lam=0.1), eligible, 40)
    assert_same(got, want)
    assert sorted(i % 10 for i in got.indices[:10].tolist()) == list(range(10))
    assert got.indices[:10].max() < 10


def test_identical_and_zero_features():
    rows = torch.zeros(40, 5)
    rows[::2, 0] = 1.0
    pairs = torch.arange(40).reshape(20, 2)
    pairs[::3, 1] = pairs[::3, 0]  # a row with itself
    for how in NORMALIZE:
        features, eligible = everything(rows, pairs, how)
        got = on_all_hosts(features, InformationMatrix(5), eligible, 20)
        first = [i for i in range(20) if i % 3]
        assert got.indices.tolist() == first + list(range(0, 20, 3))
        assert got.scores[len(first) :].eq(0).all()


@pytest.mark.parametrize("n_prompts", [20, 14])  # 14: six prompts have two items far apart
def test_rules_of_prompts_groups_costs_and_least_scores(n_prompts):
    rows, pairs = random_case(11, 20, 4, 12, duplicates=4, zeros=2)
    prompt = pairs[:, 0] // 4 % n_prompts
    left = torch.rand(len(pairs), generator=torch.Generator().manual_seed(0)) > 0.2
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(1))
    costs = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)[prompt % 3]

    def eligible(**given):
        return Eligible(
            left.clone(),
            prompt=prompt,
            max_per_prompt=2,
            quota_group=prompt % 4 - 1,
            room=[3, 0, 20],
            **given,
        )

    for given_ in (
        {},
        {"inverse_cost": costs},
        {"min_score": 0.4},
        {"min_score": 0.4, "inverse_cost": costs},
        {"n_random": 9, "random_order": order},
        {"n_random": 60, "random_order": order, "inverse_cost": costs},
    ):
        ours, theirs = eligible(**given_), eligible(**given_)
        want = greedy_logdet(rows, pairs, 60, eligible=theirs)
        features = PairFeatures(rows, pairs, "response")
        got = on_all_hosts(features, InformationMatrix(12), ours, 60)
        assert_same(got, want)
        assert 0 < len(got.indices) < 60  # the rules leave no more
        assert ours.remaining.any()
        greedy_resident(features, InformationMatrix(12), ours, 60, on_host(2))
        assert not ours.remaining[got.indices].any()


@pytest.mark.parametrize(
    ("how", "dtype"),
    slow_except(
        [("pair", torch.float32), (None, torch.bfloat16)],
        [
            ("response", torch.float32),
            ("response", torch.bfloat16),
            ("pair", torch.float32),
            (None, torch.bfloat16),
        ],
    ),
)
def test_lanes_and_groups(how, dtype):
    """Blocks of two groups of four lanes, each a thread: the division of work, and the barriers."""
    k = 150 if how == "pair" else 1100
    rows, pairs = random_case(13, 12, 3, k, duplicates=6, zeros=2)
    rows = rows.to(dtype)
    form = "explicit" if how == "pair" else "low_rank"
    v = information_of(PairFeatures(rows, pairs[:4], how), lam=0.1, form=form)
    costs = 0.5 + (pairs[:, 0] % 3).double()

    def select(run):
        eligible = Eligible(
            torch.ones(len(pairs), dtype=torch.bool),
            inverse_cost=costs,
            min_score=1e-3,
            prompt=pairs[:, 0] // 3,
            max_per_prompt=2,
        )
        return greedy_resident(PairFeatures(rows, pairs, how), v, eligible, 20, run)

    want, got, again = select(on_host(1)), select(on_host(1, True)), select(on_host(2, True))
    assert_same(got, want)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_few_rows_are_read_and_later_picks_need_many_directions():
    """Norms differ: most pairs lack more directions than one pass applies."""
    rows, pairs = random_case(1, 500, 2, 48, duplicates=0, zeros=0, log_norms=(-1.0, 0.0))
    rows = rows.float()
    want = greedy_logdet(rows, pairs, 300, normalize=None, lam=0.01)
    features, eligible = everything(rows, pairs)
    got = on_all_hosts(features, InformationMatrix(48, lam=0.01), eligible, 300)
    assert_same(got, want)
    assert 0 < int(got.touched.sum()) < 0.5 * len(rows) * 300


def test_more_are_listed_than_are_advanced_between_two_barriers():
    """All features have the same length: the first pick lowers all their bounds, and all are
    read."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(2600, 6, generator=generator, dtype=torch.float64)
    rows = unit_or_zero(rows).float()
    rows[1::2] = 0
    pairs = torch.arange(2600).reshape(1300, 2)
    want = greedy_logdet(rows, pairs, 40, lam=0.1)
    features, eligible = everything(rows, pairs, "response")
    got = on_all_hosts(features, InformationMatrix(6, lam=0.1), eligible, 40)
    assert_same(got, want)
    assert int(got.touched.max()) > 2 * 1024
    features, eligible = everything(rows, pairs, "response")
    assert_same(
        greedy_resident(features, InformationMatrix(6, lam=0.1), eligible, 40, on_host(2, True)),
        want,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("k", [1, 3, 37, 1027])
def test_rows_at_any_address(k, dtype):
    """Whether four numbers of a row can be loaded at once does not matter."""
    rows, pairs = random_case(3, 30, 2, k, duplicates=2, zeros=1)
    wide = torch.zeros(len(rows), k + 6, dtype=dtype)
    found = []
    for shift in (0, 1, 4):
        wide[:, shift : shift + k] = rows.to(dtype)
        here = wide[:, shift : shift + k]
        features, eligible = everything(here, pairs, "response")
        assert features.rows.stride(0) == k + 6
        found.append(on_all_hosts(features, InformationMatrix(k, lam=0.1), eligible, 20))
        assert_same(found[-1], greedy_logdet(here, pairs, 20, lam=0.1))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("form, points", [("low_rank", 9), ("explicit", 9), ("explicit", 100)])
def test_factors_of_an_information_matrix(form, points):
    phi = torch.randn(points, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = InformationMatrix(12, lam=0.5, kappa=2.0, form=form)
    v.add_many(phi)
    v.add(phi[0])
    base, directions, pulled = v.factors()
    assert (base is None) == (form == "low_rank") and len(directions) > 0
    if base is None:
        base = 2.0 * torch.eye(12, dtype=torch.float64)
    root = base - directions.T @ (pulled @ base)
    expected = torch.linalg.inv(
        0.25 * torch.eye(12).double() + phi.T @ phi + torch.outer(phi[0], phi[0])
    )
    torch.testing.assert_close(root.T @ root, expected, rtol=1e-11, atol=1e-12)


def test_uninitialized_memory_may_have_any_content(monkeypatch):
    rows, pairs = random_case(5, 30, 3, 20, duplicates=3, zeros=2)
    v = information_of(PairFeatures(rows[:4], pairs[:1], None), form="explicit")
    given_ = (*everything_with(rows, pairs, None, v), 40)
    want = on_all_hosts(*given_)
    empty = torch.empty

    def poisoned(*shape, **kwargs):
        tensor = empty(*shape, **kwargs)
        tensor.view(torch.uint8).fill_(0xFF)  # NaN, -1
        return tensor

    monkeypatch.setattr(resident.torch, "empty", poisoned)
    assert all(torch.equal(a, b) for a, b in zip(want, on_all_hosts(*given_), strict=True))


def test_a_launch_makes_as_many_picks_as_take_some_time():
    pace = Pace(first=16, seconds=0.2)
    assert pace.next(16, 0.001) == 64  # the time of few picks says little
    assert pace.next(64, 0.1) == 128
    assert pace.next(128, 0.8) == 32
    assert pace.next(1, 100.0) == 1
    assert pace.next(8, 0.0) == 32


def test_a_selection_can_be_interrupted_between_launches(capsys):
    rows, pairs = random_case(5, 30, 3, 20, duplicates=0, zeros=0)
    features, eligible = everything(rows, pairs)
    before = eligible.remaining.clone()
    real, made = module_for_tests(), []

    class Module:
        GreedyProblem, greedy_bytes_float64 = real.GreedyProblem, real.greedy_bytes_float64

        @staticmethod
        def greedy_select_float64(problem, **where):
            if len(made) == 2:
                raise KeyboardInterrupt
            made.append((where["begin"], where["end"]))
            real.greedy_select_float64(problem, **where)

    run = partial(ResidentProblem.run, module=Module, pace=Pace(5, 0), blocks=2, wide=False)
    with pytest.raises(KeyboardInterrupt):
        greedy_resident(features, InformationMatrix(20), eligible, 30, run, show_progress=True)
    assert made == [(0, 5), (5, 6)]
    assert "6/30" in capsys.readouterr().err
    assert torch.equal(eligible.remaining, before)


def test_no_picks_no_candidates_and_rows_that_are_too_large():
    rows, pairs = random_case(5, 3, 2, 4, duplicates=0, zeros=0)
    features, eligible = everything(rows, pairs)
    v = InformationMatrix(4)
    assert len(greedy_resident(features, v, eligible, 0, on_host(2)).indices) == 0
    nothing = Eligible(torch.zeros(len(pairs), dtype=torch.bool))
    assert len(greedy_resident(features, v, nothing, 2, on_host(2)).indices) == 0
    features, eligible = everything(rows * 1e150, pairs)
    with pytest.raises(ActiveDPOError, match="too large"):
        greedy_resident(features, InformationMatrix(4, lam=1e-10), eligible, 1, on_host(1))


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "k, lam, form", [(8192, 1.0, "low_rank"), (2003, 1e-3, "explicit"), (67, 1e-6, "explicit")]
)
def test_gpu_picks_what_the_cpu_picks(k, lam, form, dtype):
    generator = torch.Generator().manual_seed(k)
    rows = torch.randn(3000, k, generator=generator)
    rows = (rows * torch.rand(3000, 1, generator=generator)).to(dtype)
    pairs = torch.randint(3000, (5001, 2), generator=generator)
    some = torch.arange(40).reshape(20, 2)
    order = torch.randperm(len(pairs), generator=generator)
    found = []
    for device, run in (("cpu", on_host(2)), *(("cuda", on_gpu),) * 3):
        there = rows.to(device)
        v = information_of(PairFeatures(there, some, "response"), lam, form=form)
        eligible = Eligible(
            torch.ones(len(pairs), dtype=torch.bool),
            n_random=5,
            random_order=order,
            prompt=pairs[:, 0],
            max_per_prompt=2,
        )
        found.append(greedy_resident(PairFeatures(there, pairs, "response"), v, eligible, 150, run))
    assert_same(found[1], found[0])
    for again in found[2:]:
        assert all(torch.equal(a, b) for a, b in zip(found[1], again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("k, shift", [(2003, 1), (512, 4), (1030, 3)])
def test_gpu_rows_at_any_address(k, shift, dtype):
    generator = torch.Generator().manual_seed(k)
    rows = torch.zeros(4000, k + 7)
    rows[:, shift : shift + k] = torch.randn(4000, k, generator=generator)
    rows = (rows * (0.5 + torch.rand(4000, 1, generator=generator))).to(dtype)
    pairs = torch.randint(4000, (6001, 2), generator=generator)
    found = []
    for device, run in (("cpu", on_host(2)), ("cuda", on_gpu)):
        there = rows.to(device)[:, shift : shift + k]
        features = PairFeatures(there, pairs, "response")
        v = InformationMatrix(k, lam=0.1, device=device)
        found.append(greedy_resident(features, v, Eligible.everything(len(pairs)), 100, run))
    assert_same(found[1], found[0])


@pytest.mark.gpu
@pytest.mark.parametrize("how", NORMALIZE)
def test_gpu_ties_and_poisoned_memory(how, monkeypatch):
    rows, pairs = random_case(7, 200, 2, 300, duplicates=20, zeros=3)
    rows, pairs = unit_or_zero(rows).repeat(4, 1).float(), torch.arange(1600).reshape(800, 2)
    v = InformationMatrix(300, lam=0.1)
    want = greedy_resident(*everything_with(rows, pairs, how, v), 800, on_host(2))
    empty = torch.empty

    def poisoned(*shape, **kwargs):
        tensor = empty(*shape, **kwargs)
        tensor.view(torch.uint8).fill_(0xFF)
        return tensor

    monkeypatch.setattr(resident.torch, "empty", poisoned)
    v = InformationMatrix(300, lam=0.1, device="cuda")
    got = greedy_resident(*everything_with(rows.cuda(), pairs, how, v), 800, on_gpu)
    assert_same(got, want)


@pytest.mark.gpu
def test_memory_that_pytorch_keeps_is_free_for_rows():
    free, _ = torch.cuda.mem_get_info()
    kept = torch.empty(int(0.95 * free), dtype=torch.uint8, device="cuda")
    rows = torch.zeros(1000, free // 4000 // 30)  # with as much again, more than 1/20
    del kept
    assert resident.at_its_place(rows, torch.device("cuda", 0)).is_cuda
    torch.cuda.empty_cache()


@pytest.mark.gpu
def test_rows_on_a_gpu_without_its_kernel_go_to_the_cpu(monkeypatch, caplog):
    rows, pairs = random_case(5, 50, 3, 40, duplicates=3, zeros=1)
    want = greedy_logdet(rows.float(), pairs, 20)
    monkeypatch.setattr(backends, "_why_no_cuda", lambda: "not built")
    with caplog.at_level("INFO", logger="activedpo_fast"):
        got = greedy_logdet(rows.float().cuda(), pairs, 20)
    assert_same(got, want)
    assert "rows go to the CPU" in caplog.text


@pytest.mark.gpu
def test_gpu_needs_its_memory_on_the_stream():
    """Two selections on two streams, each the same as alone."""
    rows, pairs = random_case(9, 2000, 3, 512, duplicates=5, zeros=0)
    rows = rows.float().cuda()
    v = InformationMatrix(512, device="cuda")

    def select():
        return greedy_resident(*everything_with(rows, pairs, "response", v), 100, on_gpu)

    want = select()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        other = select()
    assert all(torch.equal(a, b) for a, b in zip(want, other, strict=True))


def test_a_problem_converts_its_tensors():
    """The extension gets the addresses of tensors on one device, of the dtypes that it reads."""
    rows, pairs = random_case(2, 4, 3, 6, duplicates=0, zeros=0)
    features, eligible = everything(rows.half()[:, :6].T.contiguous().T, pairs, "response")
    problem = ResidentProblem.of(features, InformationMatrix(6), eligible, 3)
    assert problem.rows.stride(1) == 1 and problem.row_stride == 6
    assert problem.prompt is None and problem.inverse_cost is None and problem.base is None
    assert problem.pairs.dtype == torch.int64 and problem.left.dtype == torch.uint8
    assert problem.min_score == -math.inf
    assert problem.directions.shape == problem.pulled.shape == (3, 6)
