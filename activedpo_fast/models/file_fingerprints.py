"""Fingerprints of models, adapters and tokenizers on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from activedpo_fast._files import FilePath
from activedpo_fast.models.folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    check_adapter_folder,
    files_read,
    resolve_source,
)

# Prefixes of the names of tokenizer files, for all kinds of tokenizers.
_TOKENIZER_NAMES = (
    "tokenizer",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "chat_template",
    "spiece",
    "sentencepiece",
    "source",
    "target",
    "tekken",
    "bpe",
    "additional_chat_templates",
)

_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16


def fingerprint_model(model: FilePath, gguf_file: str | None = None) -> str:
    """Return the SHA-256 (128 bits, hex) of a base model's files, sampling large weights.

    It covers the name, size and content of every file that a model or tokenizer is read from. For
    files above 4 MiB, the content is only 64 blocks of 64 KiB, spread evenly and including the
    first and last bytes.
    """
    folder = resolve_source(model, gguf_file)
    digest = hashlib.sha256()
    for path in files_read(folder):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{size}\0".encode())
        with open(path, "rb") as file:
            for start, length in _sampled_blocks(size):
                file.seek(start)
                digest.update(file.read(length))
    return digest.hexdigest()[:32]


def fingerprint_adapter(adapter: FilePath) -> str:
    """Return the SHA-256 (128 bits, hex) of all of an adapter's weights and configuration."""
    folder = Path(adapter)
    check_adapter_folder(folder)
    digest = hashlib.sha256()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        digest.update(b"\0")
    return digest.hexdigest()[:32]


def fingerprint_tokenizer(folder: Path) -> str:
    """Return the SHA-256 (128 bits, hex) of a folder's whole tokenizer files and their names."""
    digest = hashlib.sha256()
    for path in files_read(folder):
        name = str(path.relative_to(folder))
        if name.startswith(_TOKENIZER_NAMES):
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _sampled_blocks(size: int) -> Iterator[tuple[int, int]]:
    if size <= _SAMPLES * _SAMPLE_BYTES:
        yield 0, size
        return
    for n in range(_SAMPLES):
        yield (size - _SAMPLE_BYTES) * n // (_SAMPLES - 1), _SAMPLE_BYTES
