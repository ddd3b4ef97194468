"""The cost of a run in passes through the model, counted from its files: the same on any machine.

A unit is one token in one forward pass; a backward pass counts as two. Sampling, whose tokens come
one by one, takes far longer a token than that; a prompt that is read once for several responses
counts once.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from activedpo_fast.pool.files import jsonl_rows

GRADIENT, FORWARD = 3, 1  # log-probs come with the gradients
TRAINED = GRADIENT + FORWARD  # the forward pass is that of the reference


def passes(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    requires: frozenset[str],
    epochs: int,
    train_on: str = "all",
) -> list[float]:
    """Thousands of units after each round of an `ActiveDPOLoop`'s folder, 0 first.

    Args:
        requires: the strategy's signals, which candidates and labeled pairs are asked for.
    """
    per_token = _per_token(requires)
    total, labeled = 0, 0
    found = [0.0]
    for round_folder in sorted(folder.glob("round-*")):
        newest = _tokens(tokenizer, jsonl_rows(round_folder / "labels.jsonl"), once=False)
        candidates = _tokens(tokenizer, jsonl_rows(round_folder / "pool.jsonl"), once=True)
        total += candidates  # sampling
        total += per_token * (candidates + labeled)
        labeled += newest
        total += TRAINED * epochs * (labeled if train_on == "all" else newest)
        found.append(total / 1000)
    return found


def _per_token(requires: frozenset[str]) -> int:
    logps = FORWARD if "logps" in requires and "gradients" not in requires else 0
    return logps + sum(
        {"gradients": GRADIENT, "ref_logps": FORWARD, "hidden": FORWARD}.get(name, 0)
        for name in requires
    )


def _tokens(
    tokenizer: PreTrainedTokenizerBase, placed: Iterable[tuple[str, Any]], *, once: bool
) -> int:
    """Of the responses of rows, and of each prompt once or once for each of its responses."""
    texts: list[str] = []
    for _, row in placed:
        texts += row["responses"] + [row["prompt"]] * (1 if once else len(row["responses"]))
    return sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) if texts else 0
