"""The comparisons: a table of settings for each task.

The two functions that return them are long, as tables are: an entry is read beside its neighbors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.claims import known_reward, reviews
from benchmarks.claims.known_reward import Setting
from benchmarks.claims.reviews import ReviewSetting

RANDOM, EVERYTHING = "random", "all labels"
ABLATED = (RANDOM, "activedpo, none", "adpo_plus", "trace_plus")


@dataclass(frozen=True)
class Variant:
    """A curve: a method in a setting, in a row and a column of the experiment's table."""

    row: str
    column: str
    method: str
    setting: Any

    @property
    def key(self) -> str:
        """What its runs depend on: the method, and what is unusual of the setting."""
        usual = asdict(type(self.setting)())
        other = {
            name: value for name, value in asdict(self.setting).items() if value != usual[name]
        }
        return f"{self.method} | {json.dumps(other, sort_keys=True)}"


@dataclass(frozen=True)
class Experiment:
    """Curves that share a table; each is compared with random picks in its row.

    compared: False where each run stands for itself, beside its own start.
    seconds: of a run on one core, roughly.
    """

    name: str
    title: str
    seeds: int
    variants: tuple[Variant, ...]
    drawn: bool = True  # in the picture of the main tables
    compared: bool = True
    seconds: float = 0.25

    def baseline(self, row: str) -> Variant:
        """Random picks in a row's setting, or, where the row has none, in that of a main table."""
        own = [v for v in self.variants if v.row == row and v.method == RANDOM]
        usual = Variant(row, RANDOM, RANDOM, replace(Setting(), reward="synopsis"))
        return own[0] if own else usual


def of_known_reward() -> list[Experiment]:
    """In the order in which they are run and shown."""
    unweighted = ("activedpo, none", "activedpo, response", "adpo_plus", "trace_plus")
    normalized = ("activedpo, none", "activedpo, response", "activedpo, pair", "adpo_plus")
    lambdas = {f"λ = {lam:g}": {"options": {"lam": lam}} for lam in (1e-4, 1e-2, 1e-1, 10.0)}
    lambdas["λ = 1"] = {}
    lambdas["V left out"] = {"options": {"lam": 1e9}}
    in_order = sorted(lambdas, key=lambda row: lambdas[row].get("options", {}).get("lam", 1.0))
    return [
        _main("linear", "a reward that the policy can learn exactly", 200),
        _main("synopsis", "a reward that it can only come near", 200),
        _main("reviews", "the review task, linearized", 100),
        _grid(
            "lambda",
            "λ; V left out is λ = 10⁹: the longest φ",
            normalized,
            {row: lambdas[row] for row in in_order},
        ),
        _grid(
            "responses",
            "M responses to each prompt, at the same number of labels",
            ABLATED,
            {f"M = {m}": {"n_responses": m} for m in (2, 3, 8, 16)},
        ),
        _grid(
            "batch",
            "B pairs labeled in a round, 100 in all",
            ABLATED,
            {f"B = {b}": {"batch_size": b, "rounds": 100 // b} for b in (2, 10, 50)},
        ),
        _grid(
            "noise",
            "label noise: the temperature T of the labels",
            ABLATED,
            {f"T = {t:g}": {"temperature": t} for t in (0.1, 1.0, 4.0)},
        ),
        _grid(
            "duplicates",
            "share of prompts that are near-duplicates of others",
            (*ABLATED, "apo", "diagonal V"),
            {f"{share:.0%}": {"duplicates": share} for share in (0.0, 0.5, 0.9)},
        ),
        _grid(
            "newest",
            "training on all labels, or on the newest round's only; B = 20",
            ABLATED,
            {on: {"train_on": on, "batch_size": 20} for on in ("all", "newest")},
        ),
        _grid(
            "features",
            "what V has of the labeled pairs; gradients (64 numbers) sketched to k",
            unweighted,
            {
                "usual": {},
                "history frozen": {"history": "frozen"},
                "no history": {"history": "none"},
                **{f"k = {k}": {"proj_dim": k} for k in (32, 16, 8, 4)},
            },
        ),
        _grid(
            "share",
            "share of each batch that is picked at random",
            ABLATED[1:],
            {f"{share:.0%}": {"random_share": share} for share in (0.0, 0.3, 0.5, 0.7)},
        ),
    ]


def of_reviews() -> list[Experiment]:
    """In the order in which they are run and shown."""
    usual, gemma = ReviewSetting(), ReviewSetting(model="gemma")
    once = ReviewSetting(rounds=1, prompts_per_round=200, batch_size=192)
    steps = [(1e-3, 2), (1e-3, 8), (2e-3, 2), (2e-3, 4), (2e-3, 8), (4e-3, 2), (4e-3, 4)]
    return [
        _gate("gate", "All pairs of 400 prompts labeled at once", usual),
        Experiment(
            "steps",
            "192 random labels at once, by learning rate and epochs",
            2,
            tuple(
                Variant(
                    f"{rate:g}, {epochs} epochs",
                    RANDOM,
                    RANDOM,
                    replace(once, learning_rate=rate, epochs=epochs),
                )
                for rate, epochs in steps
            ),
            compared=False,
            seconds=60,
        ),
        Experiment(
            "main reviews",
            "sentiment of reviews",
            8,
            _variants(
                [name for name, (_, options) in reviews.METHODS.items() if "by" not in options],
                usual,
                {"": {}},
            ),
            seconds=300,
        ),
        _gate("gate gemma", "The same with Gemma's architecture", gemma),
        Experiment(
            "main gemma",
            "the same, Gemma's architecture",
            4,
            _variants(
                (
                    RANDOM,
                    "activedpo, response",
                    reviews.OWN_TOKENS,
                    "activedpo, none",
                    "trace_plus",
                    "margin_large",
                    reviews.TRUE_DIFFERENCE,
                ),
                gemma,
                {"": {}},
            ),
            seconds=300,
        ),
        Experiment(
            "outside gemma",
            "Gemma's architecture, picks by rewards from outside",
            4,
            _variants(
                (
                    RANDOM,
                    reviews.VADER_DIFFERENCE,
                    reviews.TWEETS_DIFFERENCE,
                    reviews.LEARNED_DIFFERENCE,
                    reviews.WORDS_DIFFERENCE,
                    reviews.TWEETS_LABELS,
                    reviews.TRUE_DIFFERENCE,
                ),
                gemma,
                {"": {}},
            ),
            seconds=200,
        ),
        Experiment(
            "longer gemma",
            "Random picks, trained three times as long",
            4,
            tuple(
                Variant(f"{epochs} epochs", RANDOM, RANDOM, replace(gemma, epochs=epochs))
                for epochs in (2, 6)
            ),
            compared=False,
            seconds=400,
        ),
        Experiment(
            "more gemma",
            "Gemma's architecture, rewards learned from the labels so far",
            8,
            _variants(
                (RANDOM, reviews.LEARNED_DIFFERENCE, reviews.WORDS_DIFFERENCE), gemma, {"": {}}
            ),
            seconds=200,
        ),
        Experiment(
            "outside llama",
            "Llama's architecture, picks by rewards from outside",
            8,
            _variants(
                (
                    RANDOM,
                    reviews.VADER_DIFFERENCE,
                    reviews.TWEETS_DIFFERENCE,
                    reviews.LEARNED_DIFFERENCE,
                    reviews.WORDS_DIFFERENCE,
                ),
                usual,
                {"": {}},
            ),
            seconds=200,
        ),
        Experiment(
            "responses of reviews",
            "M responses to each prompt, at the same number of labels",
            4,
            _variants(
                (RANDOM, "activedpo, none", "trace_plus"),
                usual,
                {f"M = {m}": {"n_responses": m} for m in (2, 3, 8)},
            ),
            seconds=400,
        ),
        Experiment(
            "responses of gemma",
            "the same with Gemma's architecture",
            4,
            _variants(
                (RANDOM, reviews.TWEETS_DIFFERENCE, reviews.LEARNED_DIFFERENCE),
                gemma,
                {f"M = {m}": {"n_responses": m} for m in (2, 3, 8)},
            ),
            seconds=400,
        ),
        Experiment(
            "newest of reviews",
            "training on all labels, or on the newest round's only",
            4,
            _variants(
                (RANDOM, "activedpo, response"),
                usual,
                {on: {"train_on": on} for on in ("all", "newest")},
            ),
            seconds=200,
        ),
    ]


def _main(reward: str, title: str, seeds: int) -> Experiment:
    """All methods with a known reward; the linearized task is not in the picture."""
    linearized = reward == "reviews"
    return Experiment(
        "main linearized" if linearized else f"main {reward}",
        title,
        seeds,
        _variants((*known_reward.METHODS, EVERYTHING), Setting(reward=reward), {"": {}}),
        drawn=not linearized,
        seconds=3.0 if linearized else 0.25,
    )


def _grid(
    name: str, title: str, methods: Iterable[str], rows: Mapping[str, dict[str, Any]]
) -> Experiment:
    """Methods in changed settings of the reward that the policy can only come near."""
    base = Setting(reward="synopsis")
    return Experiment(name, title, 100, _variants(methods, base, rows))


def _gate(name: str, title: str, setting: ReviewSetting) -> Experiment:
    """What all labels at once are worth: a task on which that is little compares nothing."""
    setting = replace(setting, rounds=1, prompts_per_round=400)
    return Experiment(
        name, title, 2, _variants([EVERYTHING], setting, {"": {}}), compared=False, seconds=250
    )


def _variants(
    methods: Iterable[str], base: Any, rows: Mapping[str, dict[str, Any]]
) -> tuple[Variant, ...]:
    """Every method in every row, whose settings differ from `base` as it says."""
    return tuple(
        Variant(row, method, method, replace(base, **changes))
        for row, changes in rows.items()
        for method in methods
    )
