"""An encoder that has nothing in common with the oracle's: the mean of a text's word vectors.

The package wordllama ships token embeddings (256 numbers each) and their tokenizer. Only these two
files are read: its own loader asks the Hub for the tokenizer even though the package has it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from activedpo_fast.errors import ActiveDPOError


class WordVectors:
    """Unit vectors of texts, by the words in them and not by their order."""

    def __init__(self) -> None:
        folder = _package_folder()
        self._tokenizer = Tokenizer.from_file(
            str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json")
        )
        self._tokenizer.no_padding()
        weights = load_file(folder / "weights" / "l2_supercat_256.safetensors")
        self._vectors = weights["embedding.weight"].float()

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Float32 [n, 256]."""
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        means = [self._vectors[torch.tensor(f.ids, dtype=torch.long)].mean(0) for f in found]
        return torch.nn.functional.normalize(torch.stack(means), dim=1)


def _package_folder() -> Path:
    spec = importlib.util.find_spec("wordllama")
    if spec is None or spec.origin is None:
        raise ActiveDPOError(
            "picks by word vectors need the package wordllama: pip install --no-deps wordllama"
        )
    return Path(spec.origin).parent
