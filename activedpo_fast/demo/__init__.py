"""The demo: real text, a real language model, and the functions that the examples use."""

from __future__ import annotations

from activedpo_fast.pool.items import Prompt
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.selection.result import Selection

__all__ = ["demo_prompts", "load_demo_model", "synopsis_labels"]


def load_demo_model(name: str = "small"):  # type: ignore[no-untyped-def]
    """Load the demo's language model before DPO, and its tokenizer: "small" or "smollm2"."""
    from activedpo_fast.demo.language_model import load_base

    return load_base(name)


def demo_prompts(split: str, model: str = "small") -> list[Prompt]:
    """Read the prompts of a split ("train", "pool", "heldout"), true synopses in `extra`."""
    from activedpo_fast.demo.language_model import read_prompts

    return read_prompts(split, model)


def synopsis_labels(selection: Selection, pool: PreferencePool) -> list[int | None]:
    """Label by the demo's oracle: which response is closer in meaning to the true synopsis."""
    from activedpo_fast.demo.similarity import SynopsisSimilarity
    from activedpo_fast.labels import RewardOracle

    return RewardOracle(SynopsisSimilarity(), temperature=0.05, seed=0).label(selection, pool)
