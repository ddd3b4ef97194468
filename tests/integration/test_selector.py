"""From model and pool to picks, compared with the plain definition, written out here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from datasets import Dataset, DatasetDict

from activedpo_fast import ActiveDPOError, ActiveDPOSelector, PickRules, PreferencePool, Selection
from activedpo_fast.gradients.sketch import Sketch
from activedpo_fast.pool.tokens import tokenize_pool
from activedpo_fast.selection.strategies import STRATEGIES, make_strategy
from tests.support.gradients import loop_gradients, trainable
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer
from tests.support.quick import slow_except

BETA, LAM = 0.3, 0.01


def make_pool(count: int, n_responses: int = 3, start: int = 0) -> PreferencePool:
    words = ["sketch", "label", "fox", "dog", "model", "prompt", "choose", "less", "quick"]
    return PreferencePool.from_rows(
        {
            "id": f"item-{i}",
            "prompt": f"Number {i * 37 % 101} about {words[i % 9]}. TL;DR:",
            "responses": [
                f" {words[(i + 2 * j) % 9]} {words[(i * j + 5) % 9]} {i * j}"
                for j in range(n_responses)
            ],
        }
        for i in range(start, start + count)
    )


@pytest.fixture(scope="module")
def model():
    """With few trained numbers: the brute force solves with a matrix of that size at each pick."""
    targets = ["q_proj", "v_proj", "down_proj"]
    return lora(tiny_causal_lm("llama", torch.float64), "llama", r=2, target_modules=targets)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def unit_rows(model, tokenizer, pool: PreferencePool) -> torch.Tensor:
    sequences = tokenize_pool(pool, tokenizer).sequences
    rows = BETA * loop_gradients(model, sequences, trainable(model))[0]
    return rows / rows.norm(dim=1, keepdim=True)


def brute_force(candidates: torch.Tensor, history: torch.Tensor, n: int):
    """B times arg max φᵀV⁻¹φ with V inverted again at each pick."""
    dim = candidates.shape[1]
    v = LAM * torch.eye(dim, dtype=torch.float64) + history.T @ history
    picks, scores = [], []
    for _ in range(n):
        gains = (candidates * torch.linalg.solve(v, candidates.T).T).sum(dim=1)
        gains[picks] = -1
        best = int(gains.argmax())
        picks.append(best)
        scores.append(float(gains[best]))
        v = v + torch.outer(candidates[best], candidates[best])
    return picks, scores


def selector(model, tokenizer, **options) -> ActiveDPOSelector:
    return ActiveDPOSelector(
        model, processing_class=tokenizer, sketch="none", beta=BETA, lam=LAM, **options
    )


def test_select_is_the_plain_greedy(model, tokenizer) -> None:
    pool = make_pool(8)
    rows = unit_rows(model, tokenizer, pool)
    pairs = pool.pairs()
    picks, scores = brute_force(rows[pairs[:, 0]] - rows[pairs[:, 1]], rows[:0], 6)
    selection = selector(model, tokenizer).select(pool, 6)
    assert isinstance(selection, Selection) and len(selection) == 6
    for rank, (pick, index, score) in enumerate(zip(selection, picks, scores, strict=True)):
        (item, first), (_, second) = (pool.locate(int(row)) for row in pairs[index])
        assert (pick.id, pick.pair, pick.rank) == (pool[item].id, (first, second), rank)
        assert pick.responses == (pool[item].responses[first], pool[item].responses[second])
        assert pick.score == pytest.approx(score, rel=1e-7)


def test_history_is_in_v_and_not_among_the_candidates(model, tokenizer) -> None:
    pool, earlier = make_pool(6), make_pool(5, n_responses=2, start=20)
    chooser = selector(model, tokenizer)
    labeled = [chooser.select(pool, 3), chooser.select(earlier, 4)]
    second = chooser.select(pool, 5, labeled=labeled)

    rows, old = unit_rows(model, tokenizer, pool), unit_rows(model, tokenizer, earlier)
    pairs = pool.pairs()
    phi = rows[pairs[:, 0]] - rows[pairs[:, 1]]
    taken = [
        int(
            ((pool.response_offsets[pool.position(p.id)] + torch.tensor(p.pair)) == pairs)
            .all(1)
            .nonzero()
        )
        for p in labeled[0]
    ]
    phi_old = torch.stack(
        [old[2 * earlier.position(p.id)] - old[2 * earlier.position(p.id) + 1] for p in labeled[1]]
    )
    left = [i for i in range(len(pairs)) if i not in taken]
    picks, scores = brute_force(phi[left], torch.cat([phi[taken], phi_old]), 5)
    assert [p.score for p in second] == pytest.approx(scores, rel=1e-7)
    for pick, index in zip(second, picks, strict=True):
        rows_of_pick = pool.response_offsets[pool.position(pick.id)] + torch.tensor(pick.pair)
        assert rows_of_pick.tolist() == pairs[left[index]].tolist()


def test_history_is_taken_at_the_current_weights(tokenizer) -> None:
    model = lora(tiny_causal_lm("llama", torch.float64), "llama")
    pool, earlier = make_pool(6), make_pool(4, n_responses=2, start=20)
    chooser = selector(model, tokenizer)
    labeled = chooser.select(earlier, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(-1.7)
    again = selector(model, tokenizer).select(pool, 4, labeled=labeled)
    assert chooser.select(pool, 4, labeled=labeled) == again


def test_items_that_the_trainer_would_drop_are_not_candidates(model, tokenizer) -> None:
    rows = [
        {"id": "long", "prompt": "far too long " * 20, "responses": [" a", " b"]},
        {"id": "short", "prompt": "x:", "responses": [" a", " b"]},
    ]
    chooser = selector(model, tokenizer, max_length=20)
    pool = PreferencePool.from_rows(rows)
    assert [pick.id for pick in chooser.select(pool, 1)] == ["short"]
    assert [pick.id for pick in chooser.select(pool, 2)] == ["short"]


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_every_strategy_selects_and_leaves_the_model_alone(strategy, tokenizer) -> None:
    model = lora(tiny_causal_lm("llama"), "llama")
    model.train()
    flags = [p.requires_grad for p in model.parameters()]
    pool = PreferencePool(
        replace(item, extra={"rewards": [len(r) * 0.3 for r in item.responses]})
        for item in make_pool(10)
    )
    chooser = ActiveDPOSelector(
        model, processing_class=tokenizer, strategy=strategy, proj_dim=64, seed=3
    )
    selection = chooser.select(pool, 4)
    assert selection.strategy == strategy
    assert len({(pick.id, pick.pair) for pick in selection}) == 4
    assert selection == chooser.select(pool, 4)
    assert model.training and flags == [p.requires_grad for p in model.parameters()]
    assert set(chooser.last_timings) == {"features", "select"}
    later = chooser.select(pool, 4, labeled=selection)
    assert not {(p.id, p.pair) for p in later} & {(p.id, p.pair) for p in selection}


def rows_and_logps(model, tokenizer, pool: PreferencePool) -> tuple[torch.Tensor, torch.Tensor]:
    sequences = tokenize_pool(pool, tokenizer).sequences
    return loop_gradients(model, sequences, trainable(model))


def test_adpo_plus_weights_candidates_and_history(model, tokenizer) -> None:
    """Labeled pairs in the pool and elsewhere, all with the weights of the current model."""
    pool, earlier = make_pool(6), make_pool(4, n_responses=2, start=20)
    chooser = selector(model, tokenizer, strategy="adpo_plus")
    labeled = [chooser.select(pool, 2), chooser.select(earlier, 3)]
    beta = 20.0  # so that the weights differ
    chooser = ActiveDPOSelector(
        model, processing_class=tokenizer, strategy="adpo_plus", beta=beta, sketch="none", lam=LAM
    )
    got = chooser.select(pool, 5, labeled=labeled)

    weighted = {}
    for key, whole in (("pool", pool), ("earlier", earlier)):
        rows, logps = rows_and_logps(model, tokenizer, whole)
        with torch.no_grad(), model.disable_adapter():
            ref_logps = chooser.extractor.logps(tokenize_pool(whole, tokenizer))
        pairs = whole.pairs()
        d = beta * (logps - ref_logps)
        mu = (d[pairs[:, 0]] - d[pairs[:, 1]]).sigmoid()
        assert float(mu.std()) > 0.01
        weighted[key] = (
            (mu * (1 - mu)).sqrt()[:, None] * beta * (rows[pairs[:, 0]] - rows[pairs[:, 1]])
        )

    def numbers(whole: PreferencePool, picks: Selection) -> list[int]:
        places = [
            whole.response_offsets[whole.position(p.id)] + torch.tensor(p.pair) for p in picks
        ]
        return [int((whole.pairs() == place).all(dim=1).nonzero()) for place in places]

    taken = numbers(pool, labeled[0])
    left = [i for i in range(len(pool.pairs())) if i not in taken]
    history = torch.cat(
        [weighted["pool"][taken], weighted["earlier"][numbers(earlier, labeled[1])]]
    )
    picks, scores = brute_force(weighted["pool"][left], history, 5)
    assert numbers(pool, got) == [left[i] for i in picks]
    assert [p.score for p in got] == pytest.approx(scores, rel=1e-7)


def test_rules(model, tokenizer, caplog) -> None:
    plain = make_pool(6)
    pool = PreferencePool.from_rows(
        {
            "id": item.id,
            "prompt": item.prompt,
            "responses": item.responses,
            "topic": "law" if i % 2 else "art",
        }
        for i, item in enumerate(plain)
    )
    rows = unit_rows(model, tokenizer, pool)
    pairs = pool.pairs()
    phi = rows[pairs[:, 0]] - rows[pairs[:, 1]]
    chooser = selector(model, tokenizer)
    rules = PickRules(max_per_prompt=1, exclude=["item-0"], group_by="topic", quotas={"law": 2})
    picked = chooser.select(pool, 6, rules=rules)
    # One pair for each of two prompts of law, and of the two that remain of art.
    assert sorted(p.id for p in picked if p.id in ("item-2", "item-4")) == ["item-2", "item-4"]
    assert len({p.id for p in picked}) == len(picked) == 4
    assert "4 of 6 pairs picked: the rules leave no other candidate" in caplog.text

    candidates = phi.clone()
    candidates[:3] = 0  # of item-0
    first, scores = brute_force(candidates, phi[:0], 1)
    assert picked[0].score == pytest.approx(scores[0], rel=1e-7)
    assert picked[0].id == pool[pool.locate(int(pairs[first[0], 0]))[0]].id

    free = chooser.select(pool, 6)
    least = (free[3].score + free[4].score) / 2
    assert chooser.select(pool, 6, rules=PickRules(min_score=least)).picks == free.picks[:4]
    drawn = [
        chooser.select(pool, 6, rules=PickRules(random_fraction=1.0, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    with caplog.at_level("WARNING"):
        assert len(chooser.select(pool, 19)) == 18
        assert len(chooser.select(pool, 10**30)) == 18
    assert "18 pairs are picked instead of 19: there are no other candidates" in caplog.text
    assert len(chooser.select(pool, 5, labeled=chooser.select(pool, 18))) == 0
    for n, message in ((-1, "n must be 0 or more"), (1.5, "n must be an integer")):
        with pytest.raises(ActiveDPOError, match=message):
            chooser.select(pool, n)
    with pytest.raises(ActiveDPOError, match="exclude: no item has the id 'x'"):
        chooser.select(pool, 1, rules=PickRules(exclude=["x"]))


def test_reference_model_is_the_base_model(tokenizer) -> None:
    model = lora(tiny_causal_lm("llama"), "llama")
    base = tiny_causal_lm("llama")
    pool = make_pool(6)
    options = {"processing_class": tokenizer, "strategy": "aplp"}
    assert ActiveDPOSelector(model, **options).select(pool, 5) == ActiveDPOSelector(
        model, ref_model=base, **options
    ).select(pool, 5)
    base.requires_grad_(False)
    base.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    with pytest.raises(ActiveDPOError, match="ref_model"):
        ActiveDPOSelector(base, **options).select(pool, 5)


def test_options(model, tokenizer) -> None:
    paper = ActiveDPOSelector(model, processing_class=tokenizer, preset="paper")
    assert paper.extractor.sketch.dim == 8192 and paper.strategy == "activedpo"
    own = ActiveDPOSelector(model, processing_class=tokenizer, preset="paper", proj_dim=512)
    assert own.extractor.sketch.dim == 512
    pool = make_pool(4)
    rows = {
        name: selector(model, tokenizer, normalize=name).select(pool, 3)
        for name in ("response", "pair", "none", None)
    }
    assert rows["none"] == rows[None]
    plus = {
        name: selector(model, tokenizer, strategy="adpo_plus", normalize=name).select(pool, 3)
        for name in ("default", "none", "response")
    }
    assert plus["default"] == plus["none"] != plus["response"]
    assert len({tuple(p.score for p in s) for s in rows.values()}) == 3
    for wrong in (
        {"preset": "papers"},
        {"strategy": "best"},
        {"normalize": "l2"},
        {"beta": 0.0},
        {"lam": -1.0},
        {"sketch": "dense"},
        {"strategy_options": {"color": 1}},
    ):
        with pytest.raises(ActiveDPOError):
            ActiveDPOSelector(model, processing_class=tokenizer, **wrong)
    with pytest.raises(ActiveDPOError, match="normalize, lam would have no effect on a Strategy"):
        ActiveDPOSelector(
            model,
            processing_class=tokenizer,
            strategy=make_strategy("random"),
            lam=2.0,
            normalize="pair",
        )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sjlt", "rademacher"])
def test_sketches_follow_the_variance_law_on_real_gradients(model, tokenizer, method) -> None:
    """E⟨Sx,Sy⟩ = ⟨x,y⟩ and the variance of a dense Rademacher projection, for both sketches."""
    pool = make_pool(2)
    exact = selector(model, tokenizer, verify=False).extractor
    tokens = tokenize_pool(pool, tokenizer)
    rows = exact.gradients(tokens).gradients
    x, y = rows[0], rows[4]
    k, seeds = 64, 150
    variance = (x.dot(x) * y.dot(y) + x.dot(y) ** 2 - 2 * (x * x * y * y).sum()) / k
    products = []
    for seed in range(seeds):
        exact.sketch = Sketch(method, k, seed)
        sketched = exact.gradients(tokens, show_progress=False).gradients
        products.append(sketched[0].dot(sketched[4]))
    found = torch.stack(products)
    assert abs(found.mean() - x.dot(y)) < 4 * (variance / seeds).sqrt()
    # The sample variance of 150 draws is within a third of the law, except by chance < 1e-3.
    assert float(found.var() / variance) == pytest.approx(1.0, abs=0.4)


def test_arguments_that_are_not_a_pool_or_selection_are_named() -> None:
    selector = ActiveDPOSelector(lora(tiny_causal_lm("llama"), "llama"), tiny_tokenizer())
    rows = [{"prompt": "x", "chosen": " a", "rejected": " b"}]
    splits = DatasetDict(train=Dataset.from_list(rows))
    for pool, message in (
        (rows, "expected a PreferencePool or a datasets.Dataset, got list; "),
        ("pool.jsonl", "got str; make one with PreferencePool.from_rows or load"),
        (splits, "several splits"),
        (splits["train"].to_iterable_dataset(), "streamed"),
    ):
        with pytest.raises(ActiveDPOError, match=message):
            selector.select(pool, 1)
        with pytest.raises(ActiveDPOError, match=message):
            selector.tokenize(pool)
    pool = PreferencePool.from_rows(rows)
    for labeled in ("picked.jsonl", [0, 1], 3):
        with pytest.raises(ActiveDPOError, match="labeled: expected a Selection, .*read_labels"):
            selector.select(pool, 1, labeled=labeled)
        with pytest.raises(ActiveDPOError, match="asked: expected a Selection"):
            selector.select(pool, 1, asked=labeled)


@pytest.mark.parametrize("strategy", ["aplp", "margin_small", "margin_large", "adpo_plus"])
def test_equal_rewards_are_logged(strategy: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": f"The {n}", "responses": [" fox", " dog and fox"]} for n in range(4)]
    pool, line = PreferencePool.from_rows(rows), "every reward difference is 0"
    fresh = lora(tiny_causal_lm("llama"), "llama", randomize=False)
    ActiveDPOSelector(fresh, tiny_tokenizer(), strategy=strategy).select(pool, 2)
    assert (line in caplog.text) == (strategy != "adpo_plus")  # which has gradients, too
    caplog.clear()
    trained = lora(tiny_causal_lm("llama"), "llama")
    ActiveDPOSelector(trained, tiny_tokenizer(), strategy=strategy).select(pool, 2)
    assert line not in caplog.text


@pytest.mark.parametrize(
    ("strategy", "normalize", "last_layers"),
    slow_except(
        [("activedpo", "response", None), ("activedpo", "pair", 1), ("adpo_plus", "none", 1)],
        [
            (*how, last_layers)
            for how in (
                ("activedpo", "response"),
                ("activedpo", "pair"),
                ("activedpo", "none"),
                ("adpo_plus", "response"),
                ("adpo_plus", "none"),
            )
            for last_layers in (None, 1)
        ],
    ),
)
def test_two_stages_are_a_cheap_and_an_exact_selection(
    model, tokenizer, strategy: str, normalize: str, last_layers: int | None
) -> None:
    """Pairs labeled in the pool and elsewhere are in V of both stages."""
    pool, earlier = make_pool(10), make_pool(4, n_responses=2, start=20)
    options = {"strategy": strategy, "normalize": normalize}
    exact = selector(model, tokenizer, **options)
    own = {"last_layers": last_layers}
    cheap = selector(model, tokenizer, gradient="response_tokens", **own, **options)
    labeled = [exact.select(pool, 3), exact.select(earlier, 2)]
    chosen = {(pick.id, pick.pair) for pick in cheap.select(pool, 8, labeled=labeled)}
    others = [
        pick
        for pick in exact.select(pool, 99, labeled=labeled)
        if (pick.id, pick.pair) not in chosen
    ]
    # One stage with exact rows over the pairs that the cheap stage chose: the others are closed.
    expected = exact.select(pool, 4, labeled=labeled, asked=Selection(tuple(others), "activedpo"))
    two = selector(model, tokenizer, preselect=2, **own, **options)
    got = two.select(pool, 4, labeled=labeled)
    assert [(p.id, p.pair) for p in got] == [(p.id, p.pair) for p in expected]
    assert [p.score for p in got] == pytest.approx([p.score for p in expected], rel=1e-7)
    assert got.strategy == strategy and two.last_timings["features"] > 0
    assert {(p.id, p.pair) for p in got} <= chosen


def test_two_stages_of_everything_are_one(model, tokenizer) -> None:
    pool = make_pool(5)
    one = selector(model, tokenizer).select(pool, 5)
    for preselect in (3, 10**9):
        assert selector(model, tokenizer, preselect=preselect).select(pool, 5) == one
    assert selector(model, tokenizer, preselect=3).select(pool, 99) == selector(
        model, tokenizer
    ).select(pool, 99)


def test_exact_rows_are_computed_for_the_chosen_pairs_alone(model, tokenizer) -> None:
    """Told by the tokens that run through the model's embedding, in either selection."""
    pool = make_pool(12)
    seen: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].numel())
    )

    def tokens(**options) -> int:
        chooser = selector(model, tokenizer, max_tokens_per_batch=400, **options)
        chooser.extractor.check(chooser.tokenize(pool))
        seen.clear()
        chooser.select(pool, 2)
        return sum(seen)

    try:
        exact, cheap = tokens(), tokens(gradient="response_tokens")
        assert cheap < tokens(preselect=1) < cheap + 0.4 * exact
        # The reference model too runs once on every response, not again on those that are chosen.
        strategy = {"strategy": "adpo_plus"}
        reference = tokens(**strategy) - exact
        again = tokens(preselect=1, **strategy) - reference - tokens(preselect=1)
        assert abs(again) < 40  # its picks are others; one response with its prompt has 25 or more
    finally:
        hook.remove()


def test_settings_that_a_strategy_does_not_have_are_named(model, tokenizer, caplog) -> None:
    def make(**options) -> None:
        ActiveDPOSelector(model, processing_class=tokenizer, **options)

    make(lam=0.5, normalize="pair")
    make(strategy="trace", lam=0.5, kappa=2)
    make(strategy="random")
    assert not caplog.messages
    make(strategy="apo", kappa=0.5, normalize="pair")
    make(strategy="margin_small", lam=0.5)
    assert caplog.messages == [
        "normalize=pair has no effect: strategy 'apo' has no such option",
        "kappa=0.5 has no effect: strategy 'apo' has no such option",
        "lam=0.5 has no effect: strategy 'margin_small' has no such option",
    ]


def test_what_two_stages_cannot_be_is_refused(model, tokenizer) -> None:
    for options, message in (
        ({"preselect": 0}, "preselect: 0 is below 1"),
        ({"preselect": 2.5}, "preselect: expected"),
        ({"preselect": 2, "gradient": "response_tokens"}, "preselect: gradient is"),
        ({"preselect": 2, "strategy": "trace"}, "preselect: the strategy 'trace'"),
        ({"preselect": 2, "strategy": "random"}, "preselect: the strategy 'random'"),
    ):
        with pytest.raises(ActiveDPOError, match=message):
            selector(model, tokenizer, **options)
    unchecked = selector(model, tokenizer, preselect=1, verify=False)
    with pytest.raises(ActiveDPOError, match="no preselect"):
        unchecked.select(make_pool(4), 2)
