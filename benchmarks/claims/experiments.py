"""What is compared on the task with a known reward: a table of settings."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from benchmarks.claims.known_reward import EVERYTHING, METHODS, Setting

VERSION = 1  # of the task: results of another one are taken anew

_ABLATED = ("random", "activedpo, none", "adpo_plus", "trace, weighted")


@dataclass(frozen=True)
class Variant:
    """A curve: a method in a setting."""

    label: str
    method: str
    setting: Setting

    @property
    def key(self) -> str:
        """What its runs depend on: the method, and what is unusual of the setting."""
        usual = asdict(Setting())
        other = {name: value for name, value in asdict(self.setting).items()
                 if value != usual[name]}
        return f"{self.method} | {json.dumps(other, sort_keys=True)}"


@dataclass(frozen=True)
class Experiment:
    """Curves that share a picture or a table; the first is the baseline of the others."""

    name: str
    title: str
    seeds: int
    variants: tuple[Variant, ...]


def experiments() -> list[Experiment]:
    """All of them, in the order in which they are run and shown."""
    found = []
    for reward, what in (("linear", "a reward that the policy can learn exactly"),
                         ("synopsis", "a reward that it can only come near")):
        setting = Setting(reward=reward)
        found.append(Experiment(f"main {reward}", what, 200, tuple(
            Variant(method, method, setting) for method in (*METHODS, EVERYTHING))))
    base = Setting(reward="synopsis")
    found.append(_grid("lambda", "λ, and V left out (λ = 10⁹: the longest φ)", [
        (f"{method}, λ = {lam:g}", method, replace(base, options={"lam": lam}))
        for method in ("activedpo, none", "activedpo, response", "activedpo, pair")
        for lam in (1e-4, 1e-2, 1e-1, 1.0, 10.0, 1e9)]))
    found.append(_grid("responses", "responses to each prompt, M, at the same number of labels", [
        (f"{method}, M = {m}", method, replace(base, n_responses=m))
        for m in (2, 3, 8, 16) for method in _ABLATED]))
    found.append(_grid("batch", "pairs labeled in a round, B, 100 in all", [
        (f"{method}, B = {b}", method, replace(base, batch_size=b, rounds=100 // b))
        for b in (2, 10, 50) for method in _ABLATED]))
    found.append(_grid("noise", "label noise: temperature of the labels", [
        (f"{method}, T = {t:g}", method, replace(base, temperature=t))
        for t in (0.1, 1.0, 4.0) for method in _ABLATED]))
    found.append(_grid("duplicates", "share of prompts that are near-duplicates of others", [
        (f"{method}, {share:.0%}", method, replace(base, duplicates=share))
        for share in (0.0, 0.5, 0.9) for method in (*_ABLATED, "apo", "diagonal V")]))
    found.append(_grid("newest", "training on the newest round's labels only, 20 a round", [
        (method, method, replace(base, train_on="newest", batch_size=20))
        for method in _ABLATED]))
    return found


def _grid(name: str, title: str, rows: list[tuple[str, str, Setting]]) -> Experiment:
    return Experiment(name, title, 100, tuple(Variant(*row) for row in rows))
