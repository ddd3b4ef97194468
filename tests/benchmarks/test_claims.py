"""The experiments behind docs/evidence.md: statistics, criteria on trial, the log-linear policy."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from activedpo_fast.selection.signals import TensorSignals
from benchmarks.claims import known_reward, learned_difference, linear_fit
from benchmarks.claims.evidence import document
from benchmarks.claims.experiments import Experiment, Variant, of_known_reward
from benchmarks.claims.jobs import missing_runs
from benchmarks.claims.known_reward import BETA, EVERYTHING, METHODS, RIDGE, Setting
from benchmarks.claims.results import Results
from benchmarks.claims.shown import seeds_of
from benchmarks.claims.statistics import compare, holm, saved
from benchmarks.claims.trial_strategies import TRIALS
from benchmarks.claims.world import RESPONSES, World

# -- statistics ------------------------------------------------------------------------------------


def test_holm() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5})
    assert found == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.5})


def test_labels_saved_are_read_off_the_mean_curves() -> None:
    labels = np.array([0.0, 10, 20, 30, 40])
    base = np.tile([0.0, 0.1, 0.2, 0.3, 0.4], (6, 1))
    twice = np.tile([0.0, 0.2, 0.4, 0.41, 0.42], (6, 1))
    draws = np.random.default_rng(0).integers(6, size=(200, 6))
    assert saved(twice, base, labels, labels, draws) == pytest.approx((0.5, 0.5, 0.5))
    assert saved(base, base, labels, labels, draws).value == 0
    found = saved(base / 2, base, labels, labels, draws)
    assert math.isnan(found.value) and found.low == -math.inf
    assert math.isnan(saved(twice, -base, labels, labels, draws).value)  # nothing to save
    # At three times the price, twice as fast is dearer.
    assert saved(twice, base, 3 * labels, labels, draws).value == pytest.approx(-0.5)
    # A later dip does not hide where a curve first reached the value.
    dip = np.tile([0.0, 0.5, 0.1, 0.1, 0.1], (6, 1))
    assert saved(dip, base, labels, labels, draws).value == pytest.approx(0.8)


def test_differences_are_paired() -> None:
    generator = np.random.default_rng(1)
    # The effect of a seed, far larger than the difference between methods.
    luck = generator.normal(size=(12, 1))
    base = luck + np.linspace(0, 1, 6) + 0.01 * generator.normal(size=(12, 6))
    curves = {
        "random": base,
        "better": base + 0.1 + 0.01 * generator.normal(size=(12, 6)),
        "same": base + 0.01 * generator.normal(size=(12, 6)),
    }
    found = compare(curves, "random", np.arange(6.0))
    assert set(found) == {"better", "same"}
    assert found["better"].area.value == pytest.approx(0.1, abs=0.01)
    assert found["better"].area.low > 0.09 and found["better"].p_holm < 0.005
    assert found["same"].p > 0.05 and found["same"].area.low < 0 < found["same"].area.high


def test_runs_are_kept_and_those_of_another_version_are_not(tmp_path: Path) -> None:
    results = Results(tmp_path / "runs.json", version=1)
    results.add("a | {}", 3, {"reward": [0.123456, 1.0], "kl": 0.5})
    results.add("b | {}", 0, {"reward": [0.0]})
    results.save({"date": "today"})
    again = Results(tmp_path / "runs.json", version=1)
    assert again.runs("a | {}") == {3: {"reward": [0.123, 1.0], "kl": 0.5}}
    assert again.environment == {"date": "today"} and again.runs("c") == {}
    assert Results(tmp_path / "runs.json", version=2).runs("a | {}") == {}


def test_settings_that_are_the_same_have_the_same_runs() -> None:
    found = of_known_reward()
    keys = {(e.name, v.row, v.column): v.key for e in found for v in e.variants}
    assert keys["responses", "M = 3", "adpo_plus"] == keys["main synopsis", "", "adpo_plus"]
    assert len(set(keys.values())) == len(
        {(v.method, repr(v.setting)) for e in found for v in e.variants}
    )
    assert all(e.baseline(v.row).method == "random" for e in found for v in e.variants)


# -- criteria on trial -----------------------------------------------------------------------------


def _signals(seed: int = 0) -> TensorSignals:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    pairs = torch.tensor(
        [pair for n in range(5) for pair in itertools.combinations(range(3 * n, 3 * n + 3), 2)]
    )
    known = torch.tensor([[0, 1], [2, 3]])
    return TensorSignals(
        pairs,
        torch.arange(5).repeat_interleave(3),
        gradients=normal(15, 7),
        logps=9 * normal(15),
        ref_logps=9 * normal(15),
        history_gradients=(normal(4, 7), known),
        history_logps=(9 * normal(4), known),
        history_ref_logps=(9 * normal(4), known),
    )


def test_a_trial_is_greedy_by_its_definition() -> None:
    signals = _signals()
    ranking = TRIALS["diagonal"](lam=0.3).select(signals, 6)
    rows, (past_rows, past_pairs) = signals.gradients(), signals.history_gradients()
    assert isinstance(rows, torch.Tensor)
    phi = rows[signals.pairs[:, 0]] - rows[signals.pairs[:, 1]]
    past = past_rows[past_pairs[:, 0]] - past_rows[past_pairs[:, 1]]
    v = 0.3 + past.square().sum(dim=0)
    left = list(range(len(phi)))
    for pick, score in zip(ranking.indices.tolist(), ranking.scores.tolist(), strict=True):
        gains = {n: float((phi[n].square() / v).sum()) for n in left}
        assert pick == max(gains, key=lambda n: gains[n])
        assert score == pytest.approx(gains[pick], rel=1e-9)
        left.remove(pick)
        v = v + phi[pick].square()


def test_picks_made_at_once_do_not_depend_on_each_other() -> None:
    signals = _signals()
    picks = TRIALS["at_once"](lam=0.3).select(signals, 6).indices.tolist()
    rows, (past_rows, past_pairs) = signals.gradients(), signals.history_gradients()
    assert isinstance(rows, torch.Tensor)
    v = 0.3 * torch.eye(7, dtype=torch.float64)
    for a, b in past_pairs.tolist():
        v += torch.outer(past_rows[a] - past_rows[b], past_rows[a] - past_rows[b])
    scores = [
        float((rows[a] - rows[b]) @ torch.linalg.inv(v) @ (rows[a] - rows[b]))
        for a, b in signals.pairs.tolist()
    ]
    assert picks == sorted(range(len(scores)), key=lambda n: -scores[n])[:6]


def test_ties_are_taken_in_order() -> None:
    signals = _signals()
    rows = signals.gradients()
    assert isinstance(rows, torch.Tensor)
    twice = TensorSignals(
        torch.cat([signals.pairs, signals.pairs + 15]),
        torch.arange(10).repeat_interleave(3),
        gradients=rows.repeat(2, 1),
    )
    picks = TRIALS["diagonal"]().select(twice, 4).indices.tolist()
    assert picks[0] < 15 and len(set(picks)) == 4


# -- the log-linear policy -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> World:
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(150, RESPONSES, 6, generator=generator, dtype=torch.float64)
    features -= features.mean(dim=1, keepdim=True)
    reward = features @ torch.randn(6, generator=generator, dtype=torch.float64)
    return World(features[:100], reward[:100], features[100:], reward[100:])


def test_gradients_are_those_of_the_policy(world: World) -> None:
    theta = torch.randn(6, dtype=torch.float64, requires_grad=True)
    prompts, responses = torch.tensor([3, 8]), torch.tensor([0, 11])
    logps = known_reward.log_probability(world, theta, prompts, responses)
    found = known_reward.gradient(world, theta.detach(), prompts, responses)
    for row, logp in zip(found, logps, strict=True):
        (expected,) = torch.autograd.grad(BETA * logp, theta, retain_graph=True)
        torch.testing.assert_close(row, expected)


def test_the_fit_is_the_minimum_of_the_dpo_loss(world: World) -> None:
    chosen, rejected = torch.randint(RESPONSES, (2, 40), generator=torch.Generator().manual_seed(1))
    prompts = torch.arange(40)
    theta = known_reward.fit(
        world.features[prompts, chosen] - world.features[prompts, rejected]
    ).requires_grad_()
    start = -math.log(RESPONSES)
    reward = [
        BETA * (known_reward.log_probability(world, theta, prompts, at) - start)
        for at in (chosen, rejected)
    ]
    loss = -torch.nn.functional.logsigmoid(reward[0] - reward[1]).sum()
    (slope,) = torch.autograd.grad(loss + RIDGE / 2 * theta.square().sum(), theta)
    assert slope.abs().max() < 1e-8


@pytest.mark.parametrize("method", [*METHODS, EVERYTHING])
def test_a_run_learns_and_is_the_same_again(world: World, method: str) -> None:
    setting = Setting(rounds=3, batch_size=5, prompts_per_round=20)
    traces = [known_reward.run(world, method, setting, seed=2) for _ in range(2)]
    assert traces[0] == traces[1]
    assert len(traces[0].reward) == 4 and abs(traces[0].reward[0]) < 1e-9
    assert traces[0].accuracy > 0.5
    if method == EVERYTHING:
        assert traces[0].reward[-1] > 0.9


def test_gradients_are_sketched_as_the_library_does() -> None:
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = known_reward.sketched(rows, 4096)
    exact, squares = rows @ rows.T, rows.square().sum(dim=1)
    deviation = ((squares[:, None] * squares + exact.square()) / 4096).sqrt()  # `Sketch` checks it
    assert bool(((found @ found.T - exact).abs() < 5 * deviation).all())
    assert known_reward.sketched(rows[:0], 8).shape == (0, 8)


def test_the_part_of_the_history_that_is_in_v(world: World) -> None:
    history = known_reward.History([], [])
    start, now = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    history.add(world, start, [(3, 1, 2), (5, 0, 9)])
    own = torch.tensor([7, 7]), torch.tensor([4, 6])

    def rows(kind: str) -> torch.Tensor:
        signals = known_reward.signals_of(
            world, now, Setting(history=kind), torch.tensor([[0, 1]]), own, history, 2
        )
        return signals.history_gradients()[0]

    prompts, responses = torch.tensor([3, 3, 5, 5]), torch.tensor([1, 2, 0, 9])
    for kind, theta in (("current", now), ("frozen", start)):
        torch.testing.assert_close(
            rows(kind), known_reward.gradient(world, theta, prompts, responses)
        )
    assert len(rows("none")) == 0


def test_a_share_of_the_picks_is_random(world: World) -> None:
    picked = {}
    for share in (0.0, 0.5, 1.0):
        setting = Setting(batch_size=10, random_share=share)
        theta, prompts = torch.zeros(6, dtype=torch.float64), torch.arange(20)
        responses = known_reward.sample(world, theta, prompts, 3, torch.Generator().manual_seed(4))
        picked[share] = known_reward.select(
            world,
            theta,
            "activedpo, none",
            setting,
            prompts,
            responses,
            known_reward.History([], []),
            seed=3,
        )
    assert picked[0.5][:5] == picked[0.0][:5]
    assert len(set(picked[0.5])) == 10 and picked[0.5][5:] != picked[0.0][5:]
    assert len(set(picked[1.0]) & set(picked[0.0])) < 10


def test_methods_see_the_same_first_responses(world: World) -> None:
    theta = torch.zeros(6, dtype=torch.float64)
    rows = [
        known_reward.sample(world, theta, torch.arange(9), 3, torch.Generator().manual_seed(4))
        for _ in range(2)
    ]
    assert torch.equal(*rows)
    assert all(len(set(row)) == 3 for row in rows[0].tolist())


def test_a_linear_reward_is_fitted_and_another_one_is_not(world: World) -> None:
    assert linear_fit.fit(world)["r2"] > 0.99
    generator = torch.Generator().manual_seed(8)
    noise = [
        torch.randn(r.shape, generator=generator, dtype=torch.float64)
        for r in (world.reward, world.heldout_reward)
    ]
    other = linear_fit.fit(replace(world, reward=noise[0], heldout_reward=noise[1]))
    assert abs(other["r2"]) < 0.05


def test_differences_that_the_features_tell_are_learned_and_others_are_not() -> None:
    generator = torch.Generator().manual_seed(3)
    theta = torch.randn(4, generator=generator, dtype=torch.float64)

    def one_round(told: bool) -> learned_difference.Round:
        features = torch.randn(400, 4, generator=generator, dtype=torch.float64)
        noise = torch.randn(400, generator=generator, dtype=torch.float64)
        apart = features @ theta if told else noise
        labeled = torch.randperm(400, generator=generator)[:100]
        return learned_difference.Round({"x": features}, {}, apart, labeled, apart[labeled].sign())

    for told in (True, False):
        new = one_round(told)
        found = learned_difference.predicted([one_round(told), one_round(told)], new, "x")
        mean, most = float(new.apart.abs().mean()), float(new.apart.abs().topk(64).values.mean())
        share = (found["apart"] - mean) / (most - mean)
        assert (found["correlation"] > 0.9 and share > 0.8) if told else share < 0.3


# -- the page --------------------------------------------------------------------------------------


def test_the_page_has_the_tables_of_what_has_run(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    setting = Setting(rounds=10, batch_size=10)
    main = Experiment(
        "main linear",
        "a reward",
        200,
        tuple(Variant("", method, method, setting) for method in (*METHODS, EVERYTHING)),
    )
    grid = Experiment(
        "noise",
        "label noise",
        100,
        tuple(
            Variant(f"T = {t:g}", method, method, Setting(temperature=t))
            for t in (1.0, 4.0)
            for method in ("random", "adpo_plus")
        ),
    )
    absent = Experiment(
        "batch", "not run yet", 100, (Variant("B = 2", "random", "random", Setting(batch_size=2)),)
    )
    results = Results(tmp_path / "known_reward.json", version=1)
    for variant in (*main.variants, *grid.variants):
        for seed in range(6):
            gain = 0.9 if variant.method == "adpo_plus" else 0.6
            reward = gain * np.linspace(0, 1, 11) + 0.01 * generator.normal(size=11)
            run = {"reward": reward.tolist(), "kl": 2.0, "accuracy": 0.75, "agreement": 0.8}
            if variant.method in ("random", "activedpo, none"):
                run |= {"width": [1.0, 2.0], "error": [0.5, 1.5]}
            results.add(variant.key, seed, run)
    results.save({"processor": "a CPU", "date": "today", "versions": {"torch": "2"}})
    page = tmp_path / "evidence.md"
    page.write_text(
        "".join(
            f"<!-- benchmark: claims: {name} -->\n<!-- end -->\n"
            for name in ("known_reward machine", "main linear", "noise", "batch", "paper")
        )
    )
    document({"known_reward": results}, {"known_reward": [main, grid, absent]}, page)
    text = page.read_text()
    assert "a CPU, one core a run, today; torch 2." in text
    better = next(line for line in text.splitlines() if line.startswith("| adpo_plus"))
    cells = [cell.strip() for cell in better.split("|")]
    assert float(cells[4].split()[0]) == pytest.approx(0.9, abs=0.02)
    assert float(cells[5].split()[0]) == pytest.approx(0.165, abs=0.01)
    assert float(cells[7].split("%")[0]) == pytest.approx(33, abs=3)  # 0.6 is 2/3 of 0.9
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| T")] == [
        "T = 1",
        "T = 4",
    ]
    assert "<!-- benchmark: claims: batch -->\n<!-- end -->" in text  # nothing has run
    assert "Llama-2-7B, TL;DR" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "evidence_known_reward.png",
        "evidence_bound.png",
    }


def test_runs_on_disk_are_not_missing(tmp_path: Path) -> None:
    variant = Variant("", "random", "random", Setting())
    experiment = Experiment("main", "", 5, (variant,))
    results = Results(tmp_path / "known_reward.json", version=1)
    results.add(variant.key, 1, {"reward": [0.0]})
    assert [seed for seed, _ in missing_runs(results, [experiment], 3)] == [0, 2]
    assert len(missing_runs(results, [experiment], None)) == 4


def test_runs_of_a_seed_are_paired_only_if_they_are_sampled_alike(tmp_path: Path) -> None:
    variants = tuple(Variant("", method, method, Setting()) for method in ("random", "apo"))
    results = Results(tmp_path / "reviews.json", version=1)
    for seed, samplers in enumerate(((1, 1), (1, 2), (2, 2))):
        for variant, sampler in zip(variants, samplers, strict=True):
            recorded = {} if sampler == 1 else {"sampler": sampler}
            results.add(variant.key, seed, {"reward": [0.0], **recorded})
    assert seeds_of(results, Experiment("main", "", 5, variants)) == [0, 2]
