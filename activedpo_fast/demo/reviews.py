"""The review task: a small language model learns to finish reviews favorably."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from activedpo_fast.demo.similarity import SynopsisSimilarity
from activedpo_fast.pool.items import Prompt
from activedpo_fast.pool.texts import Text

_ASSETS = Path(__file__).parent / "assets" / "reviews"


class Rating:
    """The rating that people would give prompt and response together, from -4 (negative) to 4.

    A linear regression from the MiniLM embedding of the sentence to the mean rating of twenty
    people; `assets/README.md` has its origin and fit. In a real project, people replace it.

    Args:
        weights: file of another such regression.
    """

    def __init__(self, weights: Path = _ASSETS / "reward.safetensors") -> None:
        tensors = load_file(weights)
        self._weights, self._bias = tensors["weights"], tensors["bias"]
        self._embed = SynopsisSimilarity().embed

    def __call__(
        self,
        prompts: Sequence[Text],
        responses: Sequence[Text],
        extras: Sequence[Mapping[str, Any]],
    ) -> list[float]:
        texts = [f"{p}{r}" for p, r in zip(prompts, responses, strict=True)]
        return (self._embed(texts) @ self._weights + self._bias).tolist()


def load_review_model(
    folder: Path = _ASSETS / "model",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model before DPO, by default the vendored one, in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def read_review_prompts(split: str) -> list[Prompt]:
    """Read the split `pool` or `heldout`: the first four words of review sentences."""
    rows = pq.read_table(_ASSETS / f"{split}.parquet").to_pylist()
    return [Prompt(row["id"], row["prompt"]) for row in rows]
