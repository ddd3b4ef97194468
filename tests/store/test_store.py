"""The feature store: whole or absent, resumable, and never mixed up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from activedpo_fast.cli import select as select_command
from activedpo_fast.cli.app import main
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.sketch import Sketch
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.tokens import TokenizedPool, tokenize_pool
from activedpo_fast.store import filling as filling_module
from activedpo_fast.store import store as store_module
from activedpo_fast.store.store import FeatureStore
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer

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
        settings = json.loads(tensors.metadata()["settings"])
    assert settings == {**SETTINGS, "store_dtype": "float32"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_rows_on_disk_and_their_dtype(
    tmp_path: Path, pool, tokens, extractor, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The export is written in several parts.
    monkeypatch.setattr(store_module, "_CHUNK_BYTES", 1000)
    store = FeatureStore.create(tmp_path / "s", pool, SETTINGS, skipped=[], dtype=dtype)
    store.fill(extractor, tokens, rows_per_shard=4)
    shards = [load_file(path) for path in sorted((tmp_path / "s").glob("rows-*"))]
    numbers = torch.cat([shard["rows"] for shard in shards])
    assert len(shards) > 2 and not torch.equal(numbers, torch.arange(15))

    wanted = extractor.gradients(tokens).gradients.to(getattr(torch, dtype))
    rows = FeatureStore.open(tmp_path / "s").rows_on_disk()
    assert rows.shape == wanted.shape and rows.dtype == wanted.dtype
    assert torch.equal(rows.take(torch.arange(15)), wanted)
    assert torch.equal(store.load().gradients, wanted)
    store.export(tmp_path / "rows.safetensors")
    assert torch.equal(load_file(tmp_path / "rows.safetensors")["features"], wanted.float())

    again = FeatureStore.create(tmp_path / "s", pool, SETTINGS, skipped=[], dtype=dtype)
    assert again.missing_rows() == []
    other = "bfloat16" if dtype == "float32" else "float32"
    with pytest.raises(ActiveDPOError, match=f"made with store_dtype = '{dtype}', not '{other}'"):
        FeatureStore.create(tmp_path / "s", pool, SETTINGS, skipped=[], dtype=other)


def test_an_export_is_laid_out_as_safetensors_lays_it_out(
    tmp_path: Path, pool, tokens, extractor
) -> None:
    store = FeatureStore.create(tmp_path / "s", pool, SETTINGS, skipped=[])
    store.fill(extractor, tokens)
    store.export(tmp_path / "ours.safetensors")
    with safe_open(tmp_path / "ours.safetensors", "pt") as tensors:
        save_file(
            load_file(tmp_path / "ours.safetensors"),
            tmp_path / "theirs",
            metadata=tensors.metadata(),
        )

    def header(name: str) -> tuple[int, dict[str, object]]:
        content = (tmp_path / name).read_bytes()
        length = int.from_bytes(content[:8], "little")
        return length % 8, json.loads(content[8 : 8 + length])

    assert header("ours.safetensors") == header("theirs")


def test_the_command_line_sets_the_dtype(
    tmp_path: Path, pool, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_causal_lm("llama")
    base.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    lora(base, "llama").save_pretrained(tmp_path / "adapter")
    pool.to_jsonl(tmp_path / "pool.jsonl")
    argv = [
        "features",
        str(tmp_path / "pool.jsonl"),
        f"--model={tmp_path / 'model'}",
        f"--adapter={tmp_path / 'adapter'}",
        f"--output={tmp_path / 's'}",
        "--proj-dim=32",
        "--device=cpu",
        "--store-dtype",
    ]
    assert main([*argv, "bfloat16"]) == 0
    store = FeatureStore.open(tmp_path / "s")
    assert store.rows_on_disk().dtype == torch.bfloat16
    assert store.manifest["settings"]["store_dtype"] == "bfloat16"
    assert main([*argv, "bfloat16"]) == 0  # nothing to do
    capsys.readouterr()
    assert main([*argv, "float32"]) == 2
    assert "was made with store_dtype = 'bfloat16', not 'float32'" in capsys.readouterr().err


def test_rows_beyond_the_stores_dtype_are_not_written(tmp_path: Path, pool, tokens) -> None:
    model = lora(tiny_causal_lm("llama", torch.float64), "llama")
    store = FeatureStore.create(tmp_path / "s", pool, SETTINGS, skipped=[])
    with pytest.raises(ActiveDPOError, match="response 1: .*beyond float32: store rows as float64"):
        store.fill(FeatureExtractor(model, Sketch("sjlt", 32), beta=1e39, verify=False), tokens)
    assert len(store.missing_rows()) == pool.n_responses
    wide = FeatureStore.create(tmp_path / "t", pool, SETTINGS, skipped=[], dtype="float64")
    wide.fill(FeatureExtractor(model, Sketch("sjlt", 32), beta=1e39, verify=False), tokens)
    assert wide.load().gradients.isfinite().all()


def test_shards_grow_with_the_pool(tmp_path: Path, pool, tokens, extractor, monkeypatch) -> None:
    monkeypatch.setattr(filling_module, "_SHARDS", 3)
    monkeypatch.setattr(filling_module, "_SHARD_ROWS", 1)
    store = FeatureStore.create(tmp_path / "s", pool, SETTINGS, skipped=[])
    store.fill(FeatureExtractor(extractor.model, extractor.sketch, max_tokens_per_batch=1), tokens)
    assert [len(load_file(path)["rows"]) for path in (tmp_path / "s").glob("rows-*")] == [5, 5, 5]


def test_picks_from_disk_are_those_from_memory(
    tmp_path: Path, pool, tokens, extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FeatureStore.create(tmp_path / "s", pool, SETTINGS, skipped=[1])
    store.fill(extractor, tokens, rows_per_shard=4)
    labels = tmp_path / "labels.jsonl"
    labels.write_text(
        '{"id": "0", "pair": [0, 2], "label": 1}\n{"id": "3", "pair": [1, 2], "label": 0}\n'
    )
    picks = []
    for limit in (2**30, 0):
        monkeypatch.setattr(select_command, "_IN_MEMORY_BYTES", limit)
        select_command.select_pairs(tmp_path / "s", tmp_path / "picked.jsonl", n=5, labeled=labels)
        picks.append((tmp_path / "picked.jsonl").read_text())
    assert picks[0] == picks[1]


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
    assert torch.equal(again.load().gradients, extractor.gradients(tokens).gradients)
    whole = FeatureStore.create(tmp_path / "w", pool, SETTINGS, skipped=[])
    whole.fill(extractor, tokens, rows_per_shard=2)
    assert _content(again) == _content(whole)


def _content(store: FeatureStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.path.iterdir()}


def test_stores_that_do_not_fit_or_are_damaged_are_refused(
    tmp_path: Path, pool, tokens, extractor
) -> None:
    path = tmp_path / "s"
    store = FeatureStore.create(path, pool, SETTINGS, skipped=[])
    store.fill(extractor, tokens)
    store.fill(extractor, tokens)  # nothing to do
    for other in (
        FeatureExtractor(extractor.model, Sketch("sjlt", 64)),
        FeatureExtractor(extractor.model, Sketch("sjlt", 32), beta=0.7),
    ):
        with pytest.raises(ActiveDPOError, match="filled with"):
            store.fill(other, tokens)
    with pytest.raises(ActiveDPOError, match="made with dim = 32, not 64"):
        FeatureStore.create(path, pool, {**SETTINGS, "dim": 64}, skipped=[])
    with pytest.raises(ActiveDPOError, match="stored as float32 or bfloat16 or float64, not 'x'"):
        FeatureStore.create(path, pool, SETTINGS, skipped=[], dtype="x")
    with pytest.raises(ActiveDPOError, match="another pool"):
        FeatureStore.create(path, pool.subset([0, 1]), SETTINGS, skipped=[])
    with pytest.raises(ActiveDPOError, match="not a feature store"):
        FeatureStore.open(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(ActiveDPOError, match="is not a feature store"):
        FeatureStore.create(tmp_path / "other", pool, SETTINGS, skipped=[])
    assert (tmp_path / "other" / "file").read_text() == "mine"

    (path / "pool.jsonl").write_text('{"prompt": "x", "responses": ["a", "b"]}\n', encoding="utf-8")
    with pytest.raises(ActiveDPOError, match="has been changed since it was written"):
        store.pool()
