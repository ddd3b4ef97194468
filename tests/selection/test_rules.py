"""The rules of a selection against a plain list that is searched again at every pick."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activedpo_fast import ActiveDPOError, PickRules, PreferencePool
from activedpo_fast.pool.items import Prompt
from activedpo_fast.pool.rewards import rewards_of
from activedpo_fast.selection.eligible import Eligible, random_order, warn_if_fewer
from activedpo_fast.selection.signals import TensorSignals
from activedpo_fast.selection.strategies import STRATEGIES, make_strategy
from tests.support.examples import examples


def make_pool(
    sizes: list[int], topics: list[Any], costs: list[float], prompts: int = 99
) -> PreferencePool:
    """Item i has the prompt number i % `prompts`, as text and as the column "post"."""
    return PreferencePool.from_rows(
        {
            "id": f"p{i}",
            "prompt": f"Prompt {i % prompts}",
            "post": i % prompts,
            "responses": [f"{i} {j}" for j in range(size)],
            "topic": topics[i % len(topics)],
            "cost": costs[i % len(costs)],
            "rewards": [math.sin(7 * i + 5 * j) for j in range(size)],
        }
        for i, size in enumerate(sizes)
    )


def admitted(
    pool: PreferencePool,
    pairs: torch.Tensor,
    rules: PickRules,
    taken: list[int],
    elsewhere: list[str] = (),
) -> list[bool]:  # type: ignore[assignment]
    """The definition: may each candidate be picked, with those of `taken` picked before?"""
    items = [pool[pool.locate(int(a))[0]] for a, _ in pairs]
    answer = []
    for index, item in enumerate(items):
        out = [other.prompt for other in pool if other.id in rules.exclude]
        ok = index not in taken and item.prompt not in out
        if rules.max_per_prompt is not None:
            ok &= sum(items[i].prompt == item.prompt for i in taken) < rules.max_per_prompt
        group = item.extra.get(rules.group_by) if rules.group_by else None
        if group in rules.quotas:
            before = sum(items[i].extra[rules.group_by] == group for i in taken)
            ok &= before + elsewhere.count(group) < rules.quotas[group]
        answer.append(ok)
    return answer


pools = st.builds(
    make_pool,
    st.lists(st.integers(2, 4), min_size=3, max_size=6),
    st.just(["law", "math", None]),
    st.just([1.0, 0.5, 4.0]),
    st.integers(1, 6),
)
options = st.fixed_dictionaries(
    {},
    optional={
        "max_per_prompt": st.integers(1, 4),
        "exclude": st.lists(st.sampled_from(["p0", "p1", "p2"]), max_size=2),
        "quotas": st.dictionaries(st.sampled_from(["law", "math"]), st.integers(0, 3), min_size=1),
        "random_fraction": st.floats(0, 1),
        "cost": st.just("cost"),
        "min_score": st.floats(-1, 1),
        "prompt_by": st.just("post"),
    },
)


def make_rules(given: dict[str, Any]) -> PickRules:
    return PickRules(**given, group_by="topic" if "quotas" in given else None)


@settings(max_examples=examples(150), deadline=None)
@given(pool=pools, given=options, data=st.data())
def test_candidates_left_after_every_pick(
    pool: PreferencePool, given: dict[str, Any], data: st.DataObject
) -> None:
    rules = make_rules(given)
    pairs = data.draw(st.sampled_from([pool.pairs(), pool.pairs().flip(0)]))
    pairs = pairs[data.draw(st.integers(0, 2)) :]
    n = data.draw(st.integers(0, len(pairs)))
    if n and not any(admitted(pool, pairs, rules, [])):
        with pytest.raises(ActiveDPOError, match=f"none of {len(pairs)} candidate"):
            rules.bind(pool, pairs, n)
        return
    eligible = rules.bind(pool, pairs, n)
    left = eligible.remaining
    assert (left.dtype, left.shape, left.device.type) == (torch.bool, (len(pairs),), "cpu")
    taken: list[int] = []
    elsewhere: list[str] = []
    names = list(rules.quotas)
    while True:
        assert left.tolist() == admitted(pool, pairs, rules, taken, elsewhere)
        assert eligible.remaining is left  # in place
        if not left.any():
            break
        if names and data.draw(st.integers(0, 3)) == 0:
            elsewhere.append(data.draw(st.sampled_from(names)))
            eligible.record_elsewhere(names.index(elsewhere[-1]))
            eligible.record_elsewhere(-1)
            continue
        index = data.draw(st.sampled_from(left.nonzero().flatten().tolist()))
        topic = pool[pool.locate(int(pairs[index, 0]))[0]].extra["topic"]
        number = names.index(topic) if topic in names else -1
        assert eligible.quota_group_of(index) == number
        eligible.record_pick(index)
        taken.append(index)


@given(pool=pools, given=options, n=st.integers(0, 3))
@settings(max_examples=examples(50), deadline=None)
def test_costs_minimum_scores_and_random_picks_are_bound(
    pool: PreferencePool, given: dict[str, Any], n: int
) -> None:
    given = {k: v for k, v in given.items() if k not in ("quotas", "exclude")}
    pairs = pool.pairs()
    eligible = make_rules(given).bind(pool, pairs, n)
    assert eligible.min_score == given.get("min_score", -math.inf)
    assert eligible.n_random == round(given.get("random_fraction", 0) * n)
    if eligible.n_random:
        assert sorted(eligible.random_order.tolist()) == list(range(len(pairs)))
    else:
        assert eligible.random_order is None
    if "cost" in given:
        costs = [pool[pool.locate(int(a))[0]].extra["cost"] for a, _ in pairs]
        assert eligible.inverse_cost.tolist() == [1 / cost for cost in costs]
        assert eligible.inverse_cost.dtype == torch.float64
    else:
        assert eligible.inverse_cost is None


# -- every strategy under rules --------------------------------------------------------------------

P, M, K = 7, 3, 6
LAM, BETA = 0.1, 0.2
POOL = make_pool([M] * P, ["law", "math", None, "math"], [1.0, 0.3, 2.5])
PAIRS = POOL.pairs()[1:]


def _parts() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labeled = torch.arange(4).view(2, 2)
    return dict(
        pairs=PAIRS,
        pool=POOL,
        item_of_row=torch.arange(P).repeat_interleave(M),
        gradients=normal(P * M, K),
        hidden=normal(P * M, 4),
        logps=-20 + 3 * normal(P * M),
        ref_logps=-20 + 3 * normal(P * M),
        history_gradients=(normal(4, K), labeled),
        history_hidden=(normal(4, 4), labeled),
        history_logps=(-20 + 3 * normal(4), labeled),
        history_ref_logps=(-20 + 3 * normal(4), labeled),
    )


PARTS = _parts()
STRATEGIES_HERE = {
    "activedpo": make_strategy("activedpo", lam=LAM, normalize=None),
    "adpo_plus": make_strategy("adpo_plus", lam=LAM, beta=BETA),
    "apo": make_strategy("apo", ridge=0.2),
    "aplp": make_strategy("aplp", beta=BETA, shortlist=1.0),
    "margin_large": make_strategy("margin_large", beta=BETA),
    "margin_small": make_strategy("margin_small", beta=BETA),
    "random": make_strategy("random", seed=4),
    "reward_gap": make_strategy("reward_gap"),
    "trace": make_strategy("trace", lam=LAM),
    "trace_plus": make_strategy("trace_plus", lam=LAM, beta=BETA, targets=13),
}


def _differences(name: str, pairs: torch.Tensor | None = None) -> torch.Tensor:
    rows, own = PARTS[name] if pairs is None else (PARTS[name], pairs)
    return rows[own[:, 0]] - rows[own[:, 1]]


def _forms(phi: torch.Tensor, seen: torch.Tensor, lam: float) -> torch.Tensor:
    v = lam * torch.eye(phi.shape[1], dtype=torch.float64) + seen.T @ seen
    return (phi * torch.linalg.solve(v, phi.T).T).sum(dim=1)


def plain_scores(name: str, taken: list[int]) -> torch.Tensor:
    """The strategy's score of every candidate after the picks `taken`, by its formula."""
    d = BETA * (_differences("logps", PAIRS) - _differences("ref_logps", PAIRS))
    seen_d = BETA * (_differences("history_logps") - _differences("history_ref_logps"))
    if name == "random":
        return torch.zeros(len(PAIRS), dtype=torch.float64)
    if name in ("aplp", "margin_large"):
        return d.abs()
    if name == "reward_gap":
        numbers = rewards_of(POOL, "rewards")
        return (numbers[PAIRS[:, 0]] - numbers[PAIRS[:, 1]]).abs()
    if name == "margin_small":
        return 1 / (1 + d.abs().exp())
    if name == "apo":
        return _forms(_differences("hidden", PAIRS), _differences("history_hidden"), 0.2)
    phi, seen = _differences("gradients", PAIRS), _differences("history_gradients")
    if name.endswith("_plus"):
        phi, seen = (
            (x.sigmoid() * (1 - x.sigmoid())).sqrt()[:, None] * rows
            for x, rows in ((d, phi), (seen_d, seen))
        )
    known = torch.cat([seen, phi[taken]])
    if not name.startswith("trace"):
        return _forms(phi, known, LAM)
    rows = PARTS["gradients"].view(P, M, K)
    centered = rows - rows.mean(dim=1, keepdim=True)
    # 21 rows and at most 13 targets: every second prompt.
    c = centered[:: 2 if name == "trace_plus" else 1].flatten(0, 1)
    inverse = (LAM * torch.eye(K, dtype=torch.float64) + known.T @ known).inverse()
    gains = []
    for own in phi:
        after = (
            LAM * torch.eye(K, dtype=torch.float64) + known.T @ known + torch.outer(own, own)
        ).inverse()
        gains.append(((inverse - after) @ (c.T @ c)).trace())
    return torch.stack(gains)


def plain_picks(
    name: str, rules: PickRules, n: int, order: list[int]
) -> tuple[list[int], list[float]]:
    taken: list[int] = []
    gains: list[float] = []
    shortlist: set[int] | None = None
    n_random = n if name == "random" else round(rules.random_fraction * n)
    costs = [POOL[int(a) // M].extra["cost"] if rules.cost else 1.0 for a, _ in PAIRS]
    while len(taken) < n:
        scores = plain_scores(name, taken).tolist()
        left = [i for i, ok in enumerate(admitted(POOL, PAIRS, rules, taken)) if ok]
        if len(taken) < n_random:
            left.sort(key=lambda i: order[i])
        else:
            if name == "aplp" and shortlist is None:
                prompts = sorted({int(PAIRS[i, 0]) // M for i in left})
                mean = PARTS["logps"].view(P, M).mean(dim=1).tolist()
                shortlist = set(sorted(prompts, key=lambda p: mean[p])[: n - len(taken)])
            if shortlist is not None:
                left = [i for i in left if int(PAIRS[i, 0]) // M in shortlist]
            if rules.min_score is not None:
                left = [i for i in left if scores[i] >= rules.min_score]
            left.sort(key=lambda i: -scores[i] / costs[i])
        if not left:
            break
        taken.append(left[0])
        gains.append(scores[left[0]])
    return taken, gains


@pytest.mark.parametrize("name", list(STRATEGIES_HERE))
@settings(max_examples=examples(60), deadline=None)
@given(given=options, data=st.data())
def test_every_strategy_honors_the_rules(
    name: str, given: dict[str, Any], data: st.DataObject
) -> None:
    if name == "random":
        given.pop("min_score", None)
    if name.startswith("trace") and "min_score" in given:
        given.pop("cost", None)
    if "min_score" in given:  # only some candidates reach it
        scores = plain_scores(name, []).sort().values
        place = data.draw(st.integers(0, len(scores) - 2))
        given["min_score"] = float(scores[place : place + 2].mean())
    rules = make_rules(given)
    n = data.draw(st.integers(1, 5) | st.integers(1, len(PAIRS)))
    eligible = rules.bind(POOL, PAIRS, n)
    if name == "random":
        order = random_order(len(PAIRS), 4).tolist()
    else:
        order = [] if eligible.random_order is None else eligible.random_order.tolist()
    got = STRATEGIES_HERE[name].select(TensorSignals(**PARTS), n, eligible=eligible)
    taken, gains = plain_picks(name, rules, n, order)
    assert got.indices.tolist() == taken
    assert got.scores.tolist() == pytest.approx(gains, rel=1e-9)


def test_no_strategy_is_left_out() -> None:
    assert set(STRATEGIES_HERE) == set(STRATEGIES)


@pytest.mark.parametrize("name", list(STRATEGIES_HERE))
def test_without_rules_a_strategy_is_as_with_none(name: str) -> None:
    strategy = STRATEGIES_HERE[name]
    free = strategy.select(TensorSignals(**PARTS), 5)
    bound = strategy.select(TensorSignals(**PARTS), 5, eligible=PickRules().bind(POOL, PAIRS, 5))
    assert free.indices.tolist() == bound.indices.tolist()
    assert free.scores.tolist() == bound.scores.tolist()
    assert len(free.indices) == 5


def test_scores_that_may_grow_have_no_least_by_cost() -> None:
    eligible = PickRules(min_score=0.5, cost="cost").bind(POOL, PAIRS, 2)
    with pytest.raises(ActiveDPOError, match="min_score and cost cannot be combined"):
        STRATEGIES_HERE["trace"].select(TensorSignals(**PARTS), 2, eligible=eligible)


def test_random_picks_have_no_score_to_compare() -> None:
    strategy = STRATEGIES_HERE["random"]
    eligible = PickRules(min_score=0.5).bind(POOL, PAIRS, 2)
    with pytest.raises(ActiveDPOError, match="min_score: the strategy 'random' has no scores"):
        strategy.select(TensorSignals(**PARTS), 2, eligible=eligible)


# -- binding ---------------------------------------------------------------------------------------


def test_all_rules_together() -> None:
    eligible = Eligible.everything(3)
    assert eligible.remaining.tolist() == [True] * 3
    assert (eligible.inverse_cost, eligible.random_order) == (None, None)
    assert (eligible.min_score, eligible.n_random) == (-math.inf, 0)
    assert eligible.quota_group_of(1) == -1
    eligible.record_pick(1)
    eligible.record_elsewhere(-1)
    assert eligible.remaining.tolist() == [True, False, True]


@pytest.mark.parametrize("seed", range(3))
def test_aplp_shortlists_for_the_picks_that_are_not_random(seed: int) -> None:
    rules = PickRules(random_fraction=0.5, seed=seed)
    eligible = rules.bind(POOL, PAIRS, 4)
    assert eligible.random_order is not None
    taken, _ = plain_picks("aplp", rules, 4, eligible.random_order.tolist())
    got = STRATEGIES_HERE["aplp"].select(TensorSignals(**PARTS), 4, eligible=eligible)
    assert got.indices.tolist() == taken


def test_random_order_is_of_seed_and_pool() -> None:
    pool, other = (make_pool(sizes, ["law"], [1.0]) for sizes in ([4, 4, 4], [4, 4, 4, 2]))

    def order(pool: PreferencePool, seed: int) -> list[int]:
        rules = PickRules(random_fraction=0.5, seed=seed)
        found = rules.bind(pool, pool.pairs()[:18], 10).random_order
        assert found is not None and found.dtype == torch.int64
        return found.tolist()

    assert order(pool, 1) == order(pool, 1)
    assert len({tuple(order(p, seed)) for p in (pool, other) for seed in (0, 1)}) == 4


def test_groups_may_be_numbers_and_ids_too() -> None:
    rows = [
        {"id": i, "prompt": f"{i}", "responses": ["a", "b"], "level": level}
        for i, level in enumerate([1, True, "1", None, float("nan")])
    ]
    pool = PreferencePool.from_rows(rows)
    assert PickRules(group_by="level", quotas={1: 0}).quotas == {"1": 0}
    assert PickRules(group_by="level", quotas={True: 0}).quotas == {"true": 0}
    rules = PickRules(exclude=[4], group_by="level", quotas={"1": 1, "true": 0})
    eligible = rules.bind(pool, pool.pairs(), 2)
    assert eligible.remaining.tolist() == [True, False, True, True, False]
    assert eligible.quota_group_of(2) == 0
    eligible.record_pick(2)
    assert eligible.remaining.tolist() == [False, False, False, True, False]


def test_rules_for_a_part_of_the_prompts() -> None:
    prompts = [
        Prompt(f"p{i}", "x", {"topic": topic}) for i, topic in enumerate(["law", "math", "art"])
    ]
    rules = PickRules(exclude=["p2", "p0"], group_by="topic", quotas={"law": 1, "art": 2}, seed=3)
    rules.check(prompts)
    assert rules.within(prompts) == rules
    assert rules.within(prompts[1:]) == PickRules(
        exclude=["p2"], group_by="topic", quotas={"art": 2}, seed=3
    )
    assert rules.within(prompts[1:2]) == PickRules(seed=3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_per_prompt": 0}, "max_per_prompt must be an integer from 1, not 0"),
        ({"max_per_prompt": True}, "max_per_prompt"),
        ({"max_per_prompt": 1.0}, "max_per_prompt"),
        ({"exclude": "p1"}, "exclude must be a list of ids, not 'p1'"),
        ({"exclude": {"p1": 1}}, "exclude must be a list"),
        ({"exclude": 3}, "exclude must be a list"),
        ({"exclude": ["p1", None]}, "None is not an id"),
        ({"group_by": "topic"}, "quotas missing"),
        ({"quotas": {"law": 1}}, "group_by missing"),
        ({"group_by": 3, "quotas": {"law": 1}}, "group_by must be the name of a field, not 3"),
        ({"group_by": "topic", "quotas": ["law"]}, "quotas must map"),
        ({"group_by": "topic", "quotas": {"law": -1}}, "quotas: 'law' must have an integer from 0"),
        ({"group_by": "topic", "quotas": {"law": 1.5}}, "integer from 0, not 1.5"),
        ({"group_by": "topic", "quotas": {1.5: 1}}, "quotas: 1.5 is not a group"),
        ({"min_score": math.inf}, "min_score must be a finite number, not inf"),
        ({"min_score": "1"}, "min_score"),
        ({"random_fraction": 1.01}, "random_fraction must be a number from 0 to 1, not 1.01"),
        ({"random_fraction": math.nan}, "random_fraction"),
        ({"random_fraction": True}, "random_fraction"),
        ({"cost": ""}, "cost must be the name of a field, not ''"),
        ({"seed": 0.5}, "seed must be an integer, not 0.5"),
    ],
)
def test_bad_values(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ActiveDPOError) as caught:
        PickRules(**given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"exclude": ["p1", "zz", "yy"]}, "exclude: no item has the id 'yy' (and 1 more)"),
        (
            {"group_by": "topic", "quotas": {"law": 1, "Math": 1}},
            "quotas: no item's 'topic' is 'Math'",
        ),
        ({"group_by": "Topic", "quotas": {"law": 1}}, "group_by: there is no column 'Topic'; the"),
        (
            {"group_by": "tags", "quotas": {"law": 1}},
            "group_by: 'tags' of item 'p0' must be text, an integer or a boolean, not ['a']",
        ),
        ({"cost": "price"}, "cost: item 'p0' has no 'price'"),
        ({"cost": "text"}, "cost: 'text' of item 'p0' must be a positive number, not '3'"),
        ({"cost": "zero"}, "cost: 'zero' of item 'p0' must be a positive number, not 0"),
        ({"cost": "tiny"}, "cost: 'tiny' of item 'p0'"),
        ({"cost": "huge"}, "cost: 'huge' of item 'p0'"),
        ({"cost": "flag"}, "cost: 'flag' of item 'p0'"),
        ({"cost": "half"}, "cost: item 'p1' has no 'half'"),
        ({"exclude": ["p0", "p1"]}, "the rules leave none of 2 candidate pairs"),
        ({"group_by": "topic", "quotas": {"law": 0}}, "the rules leave none"),
    ],
)
def test_rules_that_do_not_fit_the_pool(given: dict[str, Any], message: str) -> None:
    extra = {
        "topic": "law",
        "tags": ["a"],
        "text": "3",
        "zero": 0,
        "tiny": 5e-324,
        "huge": 10**400,
        "flag": True,
    }
    pool = PreferencePool.from_rows(
        {
            "id": f"p{i}",
            "prompt": f"{i}",
            "responses": ["a", "b"],
            **extra,
            **({"half": 2} if i == 0 else {}),
        }
        for i in range(2)
    )
    with pytest.raises(ActiveDPOError) as caught:
        PickRules(**given).bind(pool, pool.pairs(), 1)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_excluded_prompt_needs_no_cost() -> None:
    pool = PreferencePool.from_rows(
        {
            "id": f"p{i}",
            "prompt": f"{i}",
            "responses": ["a", "b"],
            **({"cost": 4} if i == 0 else {}),
        }
        for i in range(2)
    )
    eligible = PickRules(exclude=["p1"], cost="cost").bind(pool, pool.pairs(), 1)
    assert eligible.remaining.tolist() == [True, False]
    assert eligible.inverse_cost is not None and float(eligible.inverse_cost[0]) == 0.25


def test_fewer_picks_than_asked_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    eligible = Eligible.everything(2)
    with caplog.at_level(logging.INFO):
        warn_if_fewer(2, 2, eligible)
        assert not caplog.records
        warn_if_fewer(1, 2, eligible)
        eligible.min_score = 0.5
        warn_if_fewer(1, 2, eligible)
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 2 pairs picked: the rules leave no other candidate",
        "1 of 2 pairs picked: the rules leave no other candidate that scores 0.5 or more",
    ]
