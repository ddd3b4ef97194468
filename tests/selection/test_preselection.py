"""Two stages on given rows, against their plain definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.selection.preselection import check_preselectable, select_in_two_stages
from activedpo_fast.selection.rules import PickRules
from activedpo_fast.selection.signals import TensorSignals
from activedpo_fast.selection.strategies import STRATEGIES, Strategy, make_strategy

ITEMS, RESPONSES = 30, 3
POOL = PreferencePool.from_rows(
    {
        "id": f"p{i}",
        "prompt": f"Prompt {i // 2}.",  # two items of each prompt
        "responses": [f" {i} {j}" for j in range(RESPONSES)],
        "topic": ("law", "math", None)[i % 3],
        "cost": (1.0, 0.5, 4.0, 2.0)[i % 4],
    }
    for i in range(ITEMS)
)
PAIRS = POOL.pairs()
ITEM_OF_ROW = torch.arange(ITEMS * RESPONSES) // RESPONSES


def rows_of(strategy: str = "activedpo") -> tuple[dict[str, Any], dict[str, Any]]:
    """Exact and cheap rows with their histories, and log-probs if the strategy uses them."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labeled = torch.arange(6).view(-1, 2)
    exact, history = normal(len(ITEM_OF_ROW), 24), normal(6, 24)
    kinds = [
        {
            "gradients": rows + size * normal(*rows.shape),
            "history_gradients": (old + size * normal(*old.shape), labeled),
        }
        for rows, old, size in ((exact, history, 0.0), (exact, history, 0.7))
    ]
    if strategy == "adpo_plus":
        logps = {name: 3 * normal(len(ITEM_OF_ROW)) for name in ("logps", "ref_logps")}
        logps |= {f"history_{name}": (normal(6), labeled) for name in list(logps)}
        kinds = [{**kind, **logps} for kind in kinds]
    return kinds[0], kinds[1]


def both(strategy: str = "activedpo") -> TensorSignals:
    exact, cheap = rows_of(strategy)
    return TensorSignals(
        PAIRS, ITEM_OF_ROW, **exact, cheap=TensorSignals(PAIRS, ITEM_OF_ROW, **cheap)
    )


STRATEGIES_HERE = [
    make_strategy("activedpo", lam=0.1),
    make_strategy("activedpo", lam=0.1, normalize="pair"),
    make_strategy("activedpo", lam=0.1, normalize=None),
    make_strategy("adpo_plus", lam=0.1, beta=0.3),
]


@pytest.mark.parametrize("strategy", STRATEGIES_HERE, ids=repr)
@pytest.mark.parametrize("per_pick", [1, 3, 8])
def test_exact_rows_decide_among_what_cheap_rows_choose(strategy: Strategy, per_pick: int) -> None:
    exact, cheap = rows_of(strategy.name)
    first = strategy.select(TensorSignals(PAIRS, ITEM_OF_ROW, **cheap), 5 * per_pick)
    kept = first.indices.sort().values
    expected = strategy.select(TensorSignals(PAIRS[kept], ITEM_OF_ROW, **exact), 5)
    got = select_in_two_stages(strategy, per_pick, both(strategy.name), 5)
    assert got.indices.tolist() == kept[expected.indices].tolist()
    assert got.scores.tolist() == expected.scores.tolist()
    exact_picks = strategy.select(both(strategy.name), 5).indices.tolist()
    cheap_picks = first.indices[:5].tolist()
    if per_pick < 8:
        assert got.indices.tolist() not in (exact_picks, cheap_picks)  # neither stage is idle


@pytest.mark.parametrize("strategy", STRATEGIES_HERE, ids=repr)
def test_if_everything_is_chosen_the_picks_are_those_of_one_stage_bit_by_bit(
    strategy: Strategy,
) -> None:
    exact, _ = rows_of(strategy.name)
    alone = TensorSignals(PAIRS, ITEM_OF_ROW, **exact)  # without cheap rows, which are not needed
    n = len(PAIRS) // 3
    expected = strategy.select(alone, n)
    for per_pick in (3, 1000):
        got = select_in_two_stages(strategy, per_pick, alone, n)
        assert got.indices.tolist() == expected.indices.tolist()
        assert got.scores.tolist() == expected.scores.tolist()
    with pytest.raises(ActiveDPOError, match="cheap gradients"):
        select_in_two_stages(strategy, 2, alone, n)
    assert len(select_in_two_stages(strategy, 2, alone, 0).indices) == 0


RULES = [
    {"max_per_prompt": 1},
    {"group_by": "topic", "quotas": {"law": 2, "math": 0}},
    {"group_by": "topic", "quotas": {"law": 2}, "max_per_prompt": 1, "random_fraction": 0.4},
    {"random_fraction": 0.5, "max_per_prompt": 1},
    {"random_fraction": 1.0},
    {"cost": "cost", "exclude": ["p4"], "max_per_prompt": 2},
]


@pytest.mark.parametrize("given", RULES, ids=str)
@pytest.mark.parametrize("per_pick", [1, 2, 5])
def test_rules_hold_once(given: dict[str, Any], per_pick: int) -> None:
    n, rules = 10, PickRules(**given)
    strategy = STRATEGIES_HERE[0]

    def picks(**how: Any) -> list[int]:
        eligible = rules.bind(POOL, PAIRS, n)
        if how:
            ranking = select_in_two_stages(strategy, signals=both(), n=n, eligible=eligible, **how)
        else:
            ranking = strategy.select(both(), n, eligible=eligible)
        return ranking.indices.tolist()

    one, two = picks(), picks(per_pick=per_pick)
    # As many picks as one stage makes, the same of them at random, and none that it could not make.
    assert len(two) == len(one) == len(set(two))
    n_random = round(rules.random_fraction * n)
    assert two[:n_random] == one[:n_random]
    eligible = rules.bind(POOL, PAIRS, n)
    for index in two:
        assert eligible.remaining[index]
        eligible.record_pick(index)
    assert picks(per_pick=1000) == one


def test_the_first_stage_leaves_a_choice_within_every_limit() -> None:
    """One pair of every prompt: exact rows have a say only if more of a prompt are chosen first."""
    exact, _ = rows_of()
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(exact["gradients"].shape, generator=generator, dtype=torch.float64)
    signals = TensorSignals(
        PAIRS, ITEM_OF_ROW, **exact, cheap=TensorSignals(PAIRS, ITEM_OF_ROW, gradients=noise)
    )
    n = ITEMS // 2

    def gain(per_pick: int) -> float:
        eligible = PickRules(max_per_prompt=1).bind(POOL, PAIRS, n)
        ranking = select_in_two_stages(STRATEGIES_HERE[0], per_pick, signals, n, eligible=eligible)
        assert len(ranking.indices) == n
        return float(ranking.scores.log1p().sum())

    assert gain(1) < gain(2) < gain(5) <= gain(6)


def test_the_least_score_is_of_exact_rows() -> None:
    strategy = make_strategy("activedpo", normalize=None)
    exact, _ = rows_of()
    tiny = {"gradients": exact["gradients"] * 1e-3}
    signals = TensorSignals(
        PAIRS,
        ITEM_OF_ROW,
        gradients=exact["gradients"],
        cheap=TensorSignals(PAIRS, ITEM_OF_ROW, **tiny),
    )
    all_scores = strategy.select(signals, 12).scores
    least = float(all_scores[6])
    rules = PickRules(min_score=least)
    got = select_in_two_stages(strategy, 5, signals, 12, eligible=rules.bind(POOL, PAIRS, 12))
    assert 0 < len(got.indices) < 12 and bool((got.scores >= least).all())


def test_other_strategies_are_refused() -> None:
    for name in STRATEGIES:
        if name in ("activedpo", "adpo_plus"):
            check_preselectable(make_strategy(name))
        else:
            with pytest.raises(ActiveDPOError, match=f"preselect: .*{name}.* activedpo, adpo_plus"):
                check_preselectable(make_strategy(name))


def test_cheap_signals_are_of_the_same_candidates() -> None:
    exact, cheap = rows_of()
    other = TensorSignals(PAIRS[1:], ITEM_OF_ROW, **cheap)
    with pytest.raises(ActiveDPOError, match="cheap: it has other candidate pairs"):
        TensorSignals(PAIRS, ITEM_OF_ROW, **exact, cheap=other)
