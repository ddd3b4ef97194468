"""What a run costs in passes through the model, counted from its files: the same on any machine.

Counted are tokens of texts: special tokens, chat templates and truncation are left out. Sampling,
whose tokens come one by one, takes far longer per token than other passes. A prompt that is read
once for several responses counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from activedpo_fast.pool.files import jsonl_rows
from activedpo_fast.pool.messages import message_text
from activedpo_fast.training.run_folder import round_folders

STAGES = ("generate", "select", "train")


@dataclass(frozen=True)
class Tokens:
    """Tokens that went through the model forward and, for gradients, back."""

    forward: float = 0
    backward: float = 0

    @property
    def units(self) -> float:
        """The cost in forward passes of one token; a backward pass counts as two."""
        return self.forward + 2 * self.backward

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> Tokens:
        return Tokens(times * self.forward, times * self.backward)


# What one token of a response costs; log-probs come with the gradients.
_GRADIENT, _FORWARD = Tokens(1, 1), Tokens(1, 0)
_TRAINED = _GRADIENT + _FORWARD  # the second forward pass is that of the reference


def count_tokens(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    requires: frozenset[str],
    *,
    epochs: float,
    pairs_per_round: int | None = None,
    train_on: str = "all",
    generated: bool = True,
) -> list[dict[str, Tokens]]:
    """Return the tokens of each stage for the labeled rounds of an `ActiveDPOLoop`'s folder.

    Args:
        requires: the strategy's signals, which candidates and labeled pairs are asked for.
        epochs: over the pairs that a round trains on.
        pairs_per_round: how many pairs a round trains on, repeats included, if the number of steps
            is fixed; it replaces `epochs`.

        generated: the responses were sampled, not given.

    Raises:
        ActiveDPOError: a file cannot be read.
    """
    per_token = _per_token(requires)
    labeled = labeled_pairs = 0
    found = []
    for round_folder in round_folders(folder).values():
        if not (round_folder / "labels.jsonl").exists():
            break
        rows = [
            row for _, row in jsonl_rows(round_folder / "labels.jsonl") if row["label"] in (0, 1)
        ]
        pool = (row for _, row in jsonl_rows(round_folder / "pool.jsonl"))
        newest = _tokens(tokenizer, rows, once=False)
        candidates = _tokens(tokenizer, pool, once=True)
        sampled = candidates if generated else 0
        stages = {"generate": _FORWARD * sampled, "select": per_token * (candidates + labeled)}
        labeled += newest
        labeled_pairs += len(rows)
        trained, pairs = (labeled, labeled_pairs) if train_on == "all" else (newest, len(rows))
        passes = epochs if pairs_per_round is None else pairs_per_round / max(pairs, 1)
        # A round without a preference is not trained on.
        stages["train"] = _TRAINED * (passes * trained if rows else 0)
        found.append(stages)
    return found


def cumulative(rounds: Iterable[Mapping[str, Tokens]]) -> list[float]:
    """Return thousands of `Tokens.units` spent until the end of each round, 0 for the start."""
    spent = (sum(tokens.units for tokens in stages.values()) / 1000 for stages in rounds)
    return list(accumulate(spent, initial=0.0))


def _per_token(requires: frozenset[str]) -> Tokens:
    cost = {"gradients": _GRADIENT, "ref_logps": _FORWARD, "hidden": _FORWARD}
    if "gradients" not in requires:
        cost["logps"] = _FORWARD
    return sum((cost[name] for name in requires if name in cost), Tokens())


def _tokens(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[Mapping[str, Any]], *, once: bool
) -> int:
    """Of the responses of rows, and of each prompt once or once for each of its responses."""
    texts: list[str] = []
    for row in rows:
        for text in (*row["responses"], *[row["prompt"]] * (1 if once else len(row["responses"]))):
            texts += (
                [text] if isinstance(text, str) else [message_text(message) for message in text]
            )
    return sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) if texts else 0
