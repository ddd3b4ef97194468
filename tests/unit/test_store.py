"""The feature store: whole or absent, resumable, and never mixed up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from activedpo_fast.data import PreferencePool
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.features.extractor import FeatureExtractor
from activedpo_fast.features.sketch import Sketch
from activedpo_fast.features.store import FeatureStore
from activedpo_fast.tokenization import TokenizedPool, tokenize_pool
from tests.models import lora, tiny_causal_lm, tiny_tokenizer

SETTINGS = {"model": "tiny", "sketch": "sjlt", "dim": 32, "beta": 0.1}


@pytest.fixture(scope="module")
def pool() -> PreferencePool:
    return PreferencePool.from_rows(
        {"id": str(i), "prompt": f"prompt {i}:", "responses": [f" a{i}", " b" * (i + 1), " c"]}
        for i in range(5)
    )


@pytest.fixture(scope="module")
def tokens(pool: PreferencePool) -> TokenizedPool:
    return tokenize_pool(pool, tiny_tokenizer())


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    model = lora(tiny_causal_lm("llama"), "llama")
    return FeatureExtractor(model, Sketch("sjlt", 32), max_tokens_per_batch=40)


def test_fill_load_export(tmp_path: Path, pool, tokens, extractor) -> None:
    store = FeatureStore.create(tmp_path / "s", pool, SETTINGS, skipped=[])
    with pytest.raises(ActiveDPOError, match="15 of 15 rows are missing"):
        FeatureStore.open(tmp_path / "s")
    store.fill(extractor, tokens, rows_per_shard=4)
    found = FeatureStore.open(tmp_path / "s").load()
    wanted = extractor.gradients(tokens)
    assert torch.equal(found.gradients, wanted.gradients)
    assert torch.equal(found.logps, wanted.logps)
    assert [item.id for item in store.pool()] == pool.ids

    store.export(tmp_path / "rows.safetensors")
    exported = load_file(tmp_path / "rows.safetensors")
    assert list(exported) == ["features"] and exported["features"].dtype == torch.float32
    assert torch.equal(exported["features"], wanted.gradients)
    with safe_open(tmp_path / "rows.safetensors", "pt") as tensors:
        assert json.loads(tensors.metadata()["settings"]) == SETTINGS


def test_an_interrupted_store_is_continued(tmp_path: Path, pool, tokens, extractor) -> None:
    store = FeatureStore.create(tmp_path / "s", pool, SETTINGS, skipped=[])

    class Interrupted(Exception):
        pass

    class Stopping(FeatureExtractor):
        def iter_gradients(self, *args, **kwargs):
            for count, part in enumerate(super().iter_gradients(*args, **kwargs)):
                if count == 2:
                    raise Interrupted
                yield part

    stopping = Stopping(extractor.model, extractor.sketch, max_tokens_per_batch=40)
    with pytest.raises(Interrupted):
        store.fill(stopping, tokens, rows_per_shard=2)
    missing = len(store.missing_rows())
    assert 0 < missing < 15
    again = FeatureStore.create(tmp_path / "s", pool, SETTINGS, skipped=[])
    again.fill(extractor, tokens)
    error = (again.load().gradients - extractor.gradients(tokens).gradients).abs().max()
    assert float(error) < 1e-6  # other batches, so other roundings


def test_refusals(tmp_path: Path, pool, tokens, extractor) -> None:
    path = tmp_path / "s"
    store = FeatureStore.create(path, pool, SETTINGS, skipped=[])
    store.fill(extractor, tokens)
    with pytest.raises(ActiveDPOError, match="made with dim = 32, not 64"):
        FeatureStore.create(path, pool, {**SETTINGS, "dim": 64}, skipped=[])
    with pytest.raises(ActiveDPOError, match="another pool"):
        FeatureStore.create(path, pool.subset([0, 1]), SETTINGS, skipped=[])
    with pytest.raises(ActiveDPOError, match="not a feature store"):
        FeatureStore.open(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(ActiveDPOError, match="is not a feature store"):
        FeatureStore.create(tmp_path / "other", pool, SETTINGS, skipped=[])
    assert (tmp_path / "other" / "file").read_text() == "mine"

    shard = next(path.glob("rows-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ActiveDPOError, match=r"rows-00000\.safetensors cannot be read"):
        FeatureStore.open(path)
    (path / "pool.jsonl").write_text(
        '{"prompt": "x", "responses": ["a", "b"]}\n', encoding="utf-8")
    with pytest.raises(ActiveDPOError, match="changed"):
        store.pool()
