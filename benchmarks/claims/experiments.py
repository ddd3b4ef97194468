"""The comparisons: a table of settings for each task."""

from __future__ import annotations

import json
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
    found = []
    for reward, what, seeds in (
        ("linear", "a reward that the policy can learn exactly", 200),
        ("synopsis", "a reward that it can only come near", 200),
        ("reviews", "the review task, linearized", 100),
    ):
        name = {"reviews": "linearized"}.get(reward, reward)
        found.append(
            Experiment(
                f"main {name}",
                what,
                seeds,
                tuple(
                    Variant("", method, method, Setting(reward=reward))
                    for method in (*known_reward.METHODS, EVERYTHING)
                ),
                drawn=reward != "reviews",
                seconds=3.0 if reward == "reviews" else 0.25,
            )
        )
    base = Setting(reward="synopsis")
    found.append(
        _grid(
            "lambda",
            "λ; V left out is λ = 10⁹: the longest φ",
            [
                (
                    "V left out" if lam > 1e6 else f"λ = {lam:g}",
                    method,
                    replace(base, options={} if lam == 1 else {"lam": lam}),
                )
                for method in (
                    "activedpo, none",
                    "activedpo, response",
                    "activedpo, pair",
                    "adpo_plus",
                )
                for lam in (1e-4, 1e-2, 1e-1, 1.0, 10.0, 1e9)
            ],
        )
    )
    found.append(
        _grid(
            "responses",
            "M responses to each prompt, at the same number of labels",
            [
                (f"M = {m}", method, replace(base, n_responses=m))
                for m in (2, 3, 8, 16)
                for method in ABLATED
            ],
        )
    )
    found.append(
        _grid(
            "batch",
            "B pairs labeled in a round, 100 in all",
            [
                (f"B = {b}", method, replace(base, batch_size=b, rounds=100 // b))
                for b in (2, 10, 50)
                for method in ABLATED
            ],
        )
    )
    found.append(
        _grid(
            "noise",
            "label noise: the temperature T of the labels",
            [
                (f"T = {t:g}", method, replace(base, temperature=t))
                for t in (0.1, 1.0, 4.0)
                for method in ABLATED
            ],
        )
    )
    found.append(
        _grid(
            "duplicates",
            "share of prompts that are near-duplicates of others",
            [
                (f"{share:.0%}", method, replace(base, duplicates=share))
                for share in (0.0, 0.5, 0.9)
                for method in (*ABLATED, "apo", "diagonal V")
            ],
        )
    )
    found.append(
        _grid(
            "newest",
            "training on all labels, or on the newest round's only; B = 20",
            [
                (which, method, replace(base, train_on=which, batch_size=20))
                for which in ("all", "newest")
                for method in ABLATED
            ],
        )
    )
    histories: list[tuple[str, dict[str, Any]]] = [
        ("usual", {}),
        ("history frozen", {"history": "frozen"}),
        ("no history", {"history": "none"}),
        *((f"k = {k}", {"proj_dim": k}) for k in (32, 16, 8, 4)),
    ]
    found.append(
        _grid(
            "features",
            "what V has of the labeled pairs; gradients (64 numbers) sketched to k",
            [
                (row, method, replace(base, **options))
                for row, options in histories
                for method in ("activedpo, none", "activedpo, response", "adpo_plus", "trace_plus")
            ],
        )
    )
    found.append(
        _grid(
            "share",
            "share of each batch that is picked at random",
            [
                (f"{share:.0%}", method, replace(base, random_share=share))
                for share in (0.0, 0.3, 0.5, 0.7)
                for method in ABLATED[1:]
            ],
        )
    )
    return found


def _grid(name: str, title: str, cells: list[tuple[str, str, Setting]]) -> Experiment:
    return Experiment(
        name,
        title,
        100,
        tuple(Variant(row, method, method, setting) for row, method, setting in cells),
    )


def of_reviews() -> list[Experiment]:
    """In the order in which they are run and shown."""
    main = Experiment(
        "main reviews",
        "sentiment of reviews",
        8,
        tuple(Variant("", method, method, ReviewSetting()) for method in reviews.METHODS),
        seconds=300,
    )
    gate = Experiment(
        "gate",
        "All pairs of 400 prompts labeled at once",
        2,
        (Variant("", EVERYTHING, EVERYTHING, ReviewSetting(rounds=1, prompts_per_round=400)),),
        compared=False,
        seconds=200,
    )
    once = ReviewSetting(rounds=1, prompts_per_round=200, batch_size=192)
    steps = Experiment(
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
            for rate, epochs in (
                (1e-3, 2),
                (1e-3, 8),
                (2e-3, 2),
                (2e-3, 4),
                (2e-3, 8),
                (4e-3, 2),
                (4e-3, 4),
            )
        ),
        compared=False,
        seconds=60,
    )
    return [gate, steps, main]
