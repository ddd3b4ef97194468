"""Strategies against their formulas written out by hand, and the signals they read."""

from __future__ import annotations

import math

import pytest
import torch

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.selection.greedy.logdet import greedy_logdet
from activedpo_fast.selection.signals import Signals, TensorSignals
from activedpo_fast.selection.strategies import STRATEGIES, make_strategy
from activedpo_fast.selection.strategies.reward_margins import uncertainty

P, M, K = 8, 3, 12


def make_pool(rewards):
    """A pool of `P` prompts with the column "rewards", from [P * M] numbers."""
    return PreferencePool.from_rows(
        {
            "id": f"p{p}",
            "prompt": f"Prompt {p}",
            "responses": [f"{p} {m}" for m in range(M)],
            "rewards": rewards[M * p : M * p + M],
        }
        for p in range(P)
    )


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    within = torch.combinations(torch.arange(M))
    labeled = torch.arange(8).reshape(-1, 2)
    return dict(
        pairs=torch.cat([within + M * p for p in range(P)]),
        item_of_row=torch.arange(P).repeat_interleave(M),
        gradients=normal(P * M, K),
        hidden=normal(P * M, 5),
        pool=make_pool([(7 * n) % 23 / 4 for n in range(P * M)]),
        logps=-20 + 3 * normal(P * M),
        ref_logps=-20 + 3 * normal(P * M),
        history_gradients=(normal(8, K), labeled),
        history_hidden=(normal(8, 5), labeled),
        # The same labeled pairs, of rows in another order.
        history_logps=(-20 + 3 * normal(8), labeled.flip(0)),
        history_ref_logps=(-20 + 3 * normal(8), labeled),
    )


def _margins(parts, beta):
    """d of the candidates and of the labeled pairs, written out."""
    answers = []
    for (logps, pairs), (ref, ref_pairs) in (
        ((parts["logps"], parts["pairs"]), (parts["ref_logps"], parts["pairs"])),
        (parts["history_logps"], parts["history_ref_logps"]),
    ):
        answers.append(
            [
                beta * (float(logps[a] - logps[b]) - float(ref[c] - ref[d]))
                for (a, b), (c, d) in zip(pairs.tolist(), ref_pairs.tolist(), strict=True)
            ]
        )
    return answers


def test_activedpo_is_the_greedy_with_the_history(parts):
    got = make_strategy("activedpo", lam=0.1, normalize="pair").select(TensorSignals(**parts), 6)
    want = greedy_logdet(
        parts["gradients"],
        parts["pairs"],
        6,
        lam=0.1,
        normalize="pair",
        history=parts["history_gradients"],
    )
    assert got.indices.tolist() == want.indices.tolist()
    assert got.scores.tolist() == want.scores.tolist()
    without = greedy_logdet(parts["gradients"], parts["pairs"], 6, lam=0.1, normalize="pair")
    assert without.scores.tolist() != want.scores.tolist()


def test_random_draws_each_pair_once_and_depends_on_the_seed_alone(parts):
    signals = TensorSignals(parts["pairs"], parts["item_of_row"])
    n_pairs = len(parts["pairs"])
    drawn = make_strategy("random", seed=3).select(signals, n_pairs)
    assert sorted(drawn.indices.tolist()) == list(range(n_pairs))
    assert drawn.scores.tolist() == [0.0] * n_pairs
    generator = torch.Generator().manual_seed(3)
    assert drawn.indices.tolist() == torch.randperm(n_pairs, generator=generator).tolist()
    few = make_strategy("random", seed=3).select(signals, 5).indices
    assert few.tolist() == drawn.indices[:5].tolist()
    other = make_strategy("random", seed=4).select(signals, n_pairs).indices
    assert other.tolist() != drawn.indices.tolist()
    first = [int(make_strategy("random", seed=s).select(signals, 1).indices) for s in range(600)]
    counts = torch.bincount(torch.tensor(first), minlength=n_pairs).double()
    # Chi-square with 23 degrees of freedom: 49.7 is passed with probability 0.001.
    assert float(((counts - 25) ** 2 / 25).sum()) < 49.7


def test_apo_takes_the_largest_of_one_fixed_matrix(parts):
    got = make_strategy("apo").select(TensorSignals(**parts), 7)
    z = parts["hidden"][parts["pairs"][:, 0]] - parts["hidden"][parts["pairs"][:, 1]]
    rows, labeled = parts["history_hidden"]
    seen = rows[labeled[:, 0]] - rows[labeled[:, 1]]
    v = 1e-5 * torch.eye(5, dtype=torch.float64) + seen.T @ seen
    scores = (z * torch.linalg.solve(v, z.T).T).sum(dim=1)
    order = scores.argsort(descending=True)[:7]
    assert got.indices.tolist() == order.tolist()
    assert got.scores.tolist() == pytest.approx(scores[order].tolist(), rel=1e-8)
    ridge = make_strategy("apo", ridge=10.0).select(TensorSignals(**parts), 7)
    assert float(ridge.scores[0]) < float(got.scores[0])


def test_aplp_shortlists_by_entropy_and_ranks_by_certainty(parts):
    got = make_strategy("aplp", beta=0.2, shortlist=1.5).select(TensorSignals(**parts), 3)
    logps, ref = parts["logps"].tolist(), parts["ref_logps"].tolist()
    entropy = [-sum(logps[M * p : M * p + M]) / M for p in range(P)]
    prompts = sorted(range(P), key=lambda p: -entropy[p])[: math.ceil(1.5 * 3)]
    certainty = {}
    for index, (a, b) in enumerate(parts["pairs"].tolist()):
        if a // M in prompts:
            certainty[index] = abs(0.2 * ((logps[a] - logps[b]) - (ref[a] - ref[b])))
    order = sorted(certainty, key=lambda index: -certainty[index])[:3]
    assert got.indices.tolist() == order
    assert got.scores.tolist() == pytest.approx([certainty[index] for index in order])


def test_aplp_entropy_is_of_whole_responses_whatever_the_loss(parts):
    """Means rank the pairs, sums the prompts: an entropy does not depend on the loss."""
    lengths = (torch.arange(P * M) // M) % 4 + 1
    means = {**parts, **{name: parts[name] / lengths for name in ("logps", "ref_logps")}}
    got = make_strategy("aplp", beta=0.2, shortlist=1.5).select(
        TensorSignals(**means, lengths=lengths), 3
    )
    sums = parts["logps"].view(P, M).sum(1)
    prompts = sums.argsort()[: math.ceil(1.5 * 3)].tolist()
    reward = 0.2 * (means["logps"] - means["ref_logps"])
    first, second = parts["pairs"].unbind(1)
    certainty = (reward[first] - reward[second]).abs()
    certainty[~torch.isin(first // M, torch.tensor(prompts))] = -1.0
    assert got.indices.tolist() == certainty.argsort(descending=True)[:3].tolist()
    assert set(prompts) != set(means["logps"].view(P, M).sum(1).argsort()[:5].tolist())


def test_aplp_entropy_counts_responses_that_are_in_no_candidate_pair(parts):
    # Prompt 0's third response is very unlikely, and its pairs are not candidates any more.
    parts["logps"] = torch.full((P * M,), -20.0, dtype=torch.float64)
    parts["logps"][2] = -500.0
    parts["pairs"] = torch.tensor([[3, 4], [0, 1]])
    got = make_strategy("aplp", shortlist=1).select(TensorSignals(**parts), 1)
    assert got.indices.tolist() == [1]


def test_aplp_order_does_not_saturate_and_ties_go_to_the_lowest_index(parts):
    parts["logps"] = torch.zeros(P * M, dtype=torch.float64)
    parts["ref_logps"] = torch.zeros(P * M, dtype=torch.float64)
    parts["logps"][0], parts["logps"][3], parts["logps"][6] = 1000.0, 2000.0, 1000.0
    got = make_strategy("aplp", beta=1.0, shortlist=100).select(TensorSignals(**parts), 7)
    # Prompt 1 has the pairs 3, 4, 5; then those of prompts 0 and 2, tied; then the lowest zero.
    assert got.indices.tolist() == [3, 4, 0, 1, 6, 7, 2]
    assert got.scores.tolist() == [2000.0] * 2 + [1000.0] * 4 + [0.0]


@pytest.mark.parametrize("name, sign", [("margin_small", 1), ("margin_large", -1)])
def test_margins(parts, name, sign):
    got = make_strategy(name, beta=0.3).select(TensorSignals(**parts), 9)
    d = [abs(value) for value in _margins(parts, 0.3)[0]]
    order = sorted(range(len(d)), key=lambda index: sign * d[index])[:9]
    assert got.indices.tolist() == order
    want = [1 / (1 + math.exp(d[index])) if sign == 1 else d[index] for index in order]
    assert got.scores.tolist() == pytest.approx(want, rel=1e-12)


def test_margins_apart_by_rounding_are_ties_and_large_ones_are_not(parts):
    parts["ref_logps"] = torch.zeros(P * M, dtype=torch.float64)
    parts["logps"] = torch.zeros(P * M, dtype=torch.float64)
    first = [-30.3, -30.1, -30.2, -0.3, -0.1, -0.2, 0.0, -500.0, -700.0]
    parts["logps"][:9] = torch.tensor(first, dtype=torch.float64)
    parts["pairs"] = parts["pairs"][:9]
    # The pairs (0, 1), (0, 2), (1, 2), (3, 4), ..., (7, 8); d of 0 and 3 is 0.2 up to rounding.
    small = make_strategy("margin_small", beta=1.0).select(TensorSignals(**parts), 9).indices
    assert small.tolist() == [1, 2, 4, 5, 0, 3, 8, 6, 7]
    large = make_strategy("margin_large", beta=1.0).select(TensorSignals(**parts), 9).indices
    assert large.tolist() == [7, 6, 8, 0, 3, 1, 2, 4, 5]


@pytest.mark.parametrize("normalize", [None, "response", "pair"])
def test_adpo_plus_is_the_greedy_on_weighted_features(parts, normalize):
    strategy = make_strategy("adpo_plus", lam=0.2, kappa=3.0, beta=0.3, normalize=normalize)
    got = strategy.select(TensorSignals(**parts), 6)

    def weighted(rows, pairs, margins):
        if normalize == "response":
            rows = rows / rows.norm(dim=1, keepdim=True)
        phi = rows[pairs[:, 0]] - rows[pairs[:, 1]]
        if normalize == "pair":
            phi = phi / phi.norm(dim=1, keepdim=True)
        mu = torch.tensor([1 / (1 + math.exp(-d)) for d in margins], dtype=torch.float64)
        return (mu * (1 - mu)).sqrt()[:, None] * phi

    d, labeled_d = _margins(parts, 0.3)
    phi = weighted(parts["gradients"], parts["pairs"], d)
    labeled = weighted(*parts["history_gradients"], labeled_d)
    v = 0.2 / 3.0 * torch.eye(K, dtype=torch.float64) + labeled.T @ labeled
    for index, score in zip(got.indices.tolist(), got.scores.tolist(), strict=True):
        scores = (phi * torch.linalg.solve(v, phi.T).T).sum(dim=1)
        assert index == int(scores.argmax())
        assert score == pytest.approx(float(scores[index]), rel=1e-9)
        v = v + torch.outer(phi[index], phi[index])
        phi[index] = 0


def test_adpo_plus_weights_of_sure_pairs_are_tiny_but_right():
    d = torch.tensor([0.0, 1.0, -1.0, 50.0, -700.0, 1400.0, 1e6, -1e308], dtype=torch.float64)
    weights = uncertainty(d).tolist()
    assert weights[0] == 0.5
    assert weights[1] == weights[2] == pytest.approx(math.sqrt(0.19661193324148185), rel=1e-15)
    for value, exponent in zip(weights[3:6], (-25.0, -350.0, -700.0), strict=True):
        assert value == pytest.approx(math.exp(exponent), rel=1e-12)
    assert 0 < weights[6] == weights[7] < 1e-300


def test_adpo_plus_wants_one_history_of_all_signals(parts):
    numbers, pairs = parts["history_logps"]
    parts["history_logps"] = numbers, pairs[:2]
    with pytest.raises(ActiveDPOError, match="history_logps has 2 labeled pairs, history_ref"):
        make_strategy("adpo_plus").select(TensorSignals(**parts), 1)
    numbers, pairs = parts["history_ref_logps"]
    parts["history_ref_logps"] = numbers, pairs[:2]
    with pytest.raises(ActiveDPOError, match="4 labeled pairs have gradients, but 2"):
        make_strategy("adpo_plus").select(TensorSignals(**parts), 1)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_duplicate_pairs_tie_and_every_strategy_checks_n(parts, name):
    strategy = make_strategy(name)
    n_pairs = len(parts["pairs"])
    for n, message in (
        (n_pairs + 1, f"{n_pairs + 1} pairs .* only {n_pairs}"),
        (-1, "0 or more"),
        (2.0, "integer"),
    ):
        with pytest.raises(ActiveDPOError, match=message):
            strategy.select(TensorSignals(**parts), n)
    none = strategy.select(TensorSignals(**parts), 0)
    assert none.indices.shape == none.scores.shape == (0,)
    if name != "random":
        for key in ("gradients", "hidden", "logps", "ref_logps"):  # every prompt is like the first
            value = parts[key][:M]
            parts[key] = value.repeat((P,) + (1,) * (value.ndim - 1))
        parts["pool"] = make_pool([0.1, 3.0, 0.7] * P)
        everything = strategy.select(TensorSignals(**parts), n_pairs).indices.tolist()
        for kind in range(M):
            of_kind = [i for i in everything if i % M == kind]
            assert of_kind == sorted(of_kind)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_a_strategy_needs_what_it_requires_and_no_more(parts, name):
    strategy = make_strategy(name)
    needed = set(strategy.requires)
    needed = {"pool" if signal == "rewards" else signal for signal in needed}
    needed |= {f"history_{signal}" for signal in needed if f"history_{signal}" in parts}
    base = {key: parts[key] for key in ("pairs", "item_of_row")}
    given = {key: parts[key] for key in needed}
    assert len(strategy.select(TensorSignals(**base, **given), 4).indices) == 4
    for missing in strategy.requires:
        own = "pool" if missing == "rewards" else missing
        rest = {key: value for key, value in given.items() if own not in key}
        with pytest.raises(ActiveDPOError, match=missing):
            strategy.select(TensorSignals(**base, **rest), 4)


def test_options_are_checked():
    names = [
        "activedpo",
        "random",
        "apo",
        "aplp",
        "margin_small",
        "margin_large",
        "adpo_plus",
        "trace",
        "trace_plus",
        "reward_gap",
    ]
    assert list(STRATEGIES) == names
    assert STRATEGIES["adpo_plus"]().normalize is None
    assert STRATEGIES["activedpo"].options() == ("lam", "kappa", "normalize")
    with pytest.raises(ActiveDPOError, match=f"'best'; known: {', '.join(names)}"):
        make_strategy("best")
    with pytest.raises(ActiveDPOError, match="'apo' has no option 'lam'; known: ridge"):
        make_strategy("apo", lam=1.0)
    for name, options in (
        ("activedpo", dict(lam=0)),
        ("activedpo", dict(normalize="row")),
        ("apo", dict(ridge=-1.0)),
        ("aplp", dict(beta="0.1")),
        ("aplp", dict(shortlist=0.5)),
        ("random", dict(seed=0.5)),
        ("activedpo", dict(kappa=True)),
        ("margin_small", dict(beta=0.0)),
        ("margin_large", dict(beta=-1)),
        ("adpo_plus", dict(beta=0)),
        ("adpo_plus", dict(normalize="l2")),
        ("adpo_plus", dict(lam=0)),
        ("trace", dict(lam=0)),
        ("trace", dict(targets=0)),
        ("trace_plus", dict(beta=-1)),
        ("reward_gap", dict(reward="")),
        ("reward_gap", dict(reward=3)),
    ):
        with pytest.raises(ActiveDPOError, match=next(iter(options))):
            make_strategy(name, **options)


def test_reward_gap_takes_the_pairs_that_a_reward_rates_furthest_apart(parts):
    pool, pairs = parts["pool"], parts["pairs"].tolist()
    column = [n for item in pool for n in item.extra["rewards"]]

    def longest(prompts, responses, extras):
        assert (prompts[M], responses[M], extras[M]) == ("Prompt 1", "1 0", pool[1].extra)
        return [math.sin(9 * n) for n in range(len(responses))]

    for reward, numbers in (
        ("rewards", column),
        (longest, [math.sin(9 * n) for n in range(P * M)]),
    ):
        got = make_strategy("reward_gap", reward=reward).select(TensorSignals(**parts), 9)
        gaps = [abs(numbers[a] - numbers[b]) for a, b in pairs]
        assert got.indices.tolist() == sorted(range(len(gaps)), key=lambda n: -gaps[n])[:9]
        assert got.scores.tolist() == sorted(gaps, reverse=True)[:9]


@pytest.mark.parametrize(
    "numbers, message",
    [
        ([1.0, 2.0], "item 'p0': 'rewards' should have 3 finite numbers"),
        ([1.0, 2.0, float("nan")], "item 'p0': 'rewards' should have 3 finite"),
        ([1.0, 2.0, 10**400], "item 'p0': 'rewards' should have 3 finite"),
        ([1e308, -1e308, 1.0], "item 'p0': 'rewards' should have 3 finite"),
        ([1.0, 2.0, True], "item 'p0': 'rewards' should have 3 finite"),
        ("123", "item 'p0': 'rewards' should have 3 finite"),
        (4.0, "item 'p0': 'rewards' should have 3 finite"),
        (None, "item 'p0' has no column 'rewards'"),
    ],
)
def test_rewards_of_a_column_are_checked(parts, numbers, message):
    rows = [
        {"prompt": i.prompt, "id": i.id, "responses": i.responses, "rewards": numbers}
        for i in parts["pool"]
    ]
    signals = TensorSignals(**(parts | {"pool": PreferencePool.from_rows(rows)}))
    with pytest.raises(ActiveDPOError, match=message):
        make_strategy("reward_gap").select(signals, 2)


@pytest.mark.parametrize(
    "reward, message",
    [
        (lambda p, r, e: [1.0] * (len(r) - 1), "gave 23 numbers for 24 responses"),
        (lambda p, r, e: [1.0] * 4 + [math.inf] * 20, "reward of a response to id 'p1' is inf"),
        (lambda p, r, e: None, "a number for each of 24 responses, not None"),
        (lambda p, r, e: [10**400] * 24, "a number for each of 24 responses, not "),
        (lambda p, r, e: [None] * 24, "a number for each of 24 responses, not "),
    ],
)
def test_rewards_of_a_function_are_checked(parts, reward, message):
    with pytest.raises(ActiveDPOError, match=message):
        make_strategy("reward_gap", reward=reward).select(TensorSignals(**parts), 2)


def test_nan_is_named(parts):
    parts["logps"][5] = float("nan")
    with pytest.raises(ActiveDPOError, match="logps of response row 5"):
        make_strategy("aplp").select(TensorSignals(**parts), 1)
    parts["hidden"][4, 0] = float("inf")
    with pytest.raises(ActiveDPOError, match="not finite: 4 of 24"):
        make_strategy("apo").select(TensorSignals(**parts), 1)


def test_no_history_is_allowed_and_an_incomplete_one_is_an_error(parts):
    del parts["history_hidden"], parts["history_logps"], parts["history_ref_logps"]
    for name in ("history_hidden", "history_logps", "history_ref_logps"):
        with pytest.raises(ActiveDPOError, match=f"'{name}'"):
            getattr(TensorSignals(**parts), name)()
    del parts["history_gradients"]
    signals = TensorSignals(**parts)
    for name, shape in (
        ("gradients", (0, K)),
        ("hidden", (0, 5)),
        ("logps", (0,)),
        ("ref_logps", (0,)),
    ):
        rows, pairs = getattr(signals, f"history_{name}")()
        assert rows.shape == shape and pairs.shape == (0, 2) and pairs.dtype == torch.int64


def test_the_base_class_names_the_signal():
    for name in (
        "gradients",
        "history_gradients",
        "hidden",
        "history_hidden",
        "logps",
        "history_logps",
        "ref_logps",
        "history_ref_logps",
    ):
        with pytest.raises(ActiveDPOError, match=f"'{name}'"):
            getattr(Signals(), name)()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(gradients=torch.ones(3, 4)), "gradients has 3 rows for 24"),
        (dict(hidden=torch.ones(24)), "hidden must be"),
        (dict(pairs=torch.tensor([[0, 24]])), r"pairs\[0\] is \[0, 24\]"),
        (dict(pairs=torch.ones(3, 2)), "int64"),
        (dict(item_of_row=torch.zeros(24)), "item_of_row"),
        (dict(logps=torch.ones(24, 1)), "one dimension"),
        (
            dict(history_logps=(torch.ones(2, 1), torch.tensor([[0, 1]]))),
            "history_logps .* one dim",
        ),
        (
            dict(history_ref_logps=(torch.ones(2), torch.tensor([[0, 2]]))),
            "history_ref_logps.0. is",
        ),
        (dict(history_gradients=(torch.ones(2, 3), torch.tensor([[0, 1]]))), "3 columns"),
    ],
)
def test_tensors_that_do_not_fit(parts, change, message):
    with pytest.raises(ActiveDPOError, match=message):
        TensorSignals(**{**parts, **change})
