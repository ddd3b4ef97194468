"""A store that is not what was written: every flipped bit, copied file and lost row is named."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from activedpo_fast._files import read_checked_json, write_checked_json
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.sketch import Sketch
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.tokens import TokenizedPool, tokenize_pool
from activedpo_fast.store.shards import PartialShard, ShardLayout
from activedpo_fast.store.store import FeatureStore
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer

SETTINGS = {"model": "tiny", "beta": 0.1}


@pytest.fixture(scope="module")
def pool() -> PreferencePool:
    return PreferencePool.from_rows(
        {"id": str(i), "prompt": f"prompt {i}:", "responses": [f" a{i}", " b" * (i + 1)], "n": i}
        for i in range(6)
    )


@pytest.fixture(scope="module")
def tokens(pool: PreferencePool) -> TokenizedPool:
    return tokenize_pool(pool, tiny_tokenizer())


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    model = lora(tiny_causal_lm("llama"), "llama")
    return FeatureExtractor(model, Sketch("sjlt", 16), max_tokens_per_batch=30, verify=False)


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
    pool: PreferencePool,
    tokens: TokenizedPool,
    extractor: FeatureExtractor,
) -> Path:
    folder = tmp_path_factory.mktemp("made") / "s"
    store = FeatureStore.create(folder, pool, SETTINGS, skipped=[])
    store.fill(extractor, tokens, rows_per_shard=5)
    return folder


@pytest.fixture
def folder(tmp_path: Path, made: Path) -> Path:
    return shutil.copytree(made, tmp_path / "s")


def _use_all(folder: Path) -> FeatureStore:
    store = FeatureStore.open(folder)
    store.pool()
    store.load()
    return store


def test_a_flipped_bit_anywhere_is_named(folder: Path, made: Path, tokens: TokenizedPool) -> None:
    random.seed(0)
    before = _use_all(folder).load()
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for n in sorted(random.sample(range(len(whole)), 60)):
            flipped = bytearray(whole)
            flipped[n] ^= 1 << random.randrange(8)
            path.write_bytes(flipped)
            if path.name == "tokens.safetensors":  # it only serves to name what differs
                with pytest.raises(ActiveDPOError, match=r"tokens\.safetensors"):
                    FeatureStore.open(folder).verify()
            else:
                try:
                    found = _use_all(folder).load()
                except ActiveDPOError as error:
                    assert path.name in str(error) or "format" in str(error), (n, str(error))
                else:  # white space in the manifest
                    assert path.name == "manifest.json", n
                    assert torch.equal(found.gradients, before.gradients)
        path.write_bytes(whole)
    assert "are as written: 12 rows" in _use_all(folder).verify()


def test_a_damaged_shard_is_computed_again(
    folder: Path, made: Path, pool: PreferencePool, tokens: TokenizedPool, extractor
) -> None:
    (folder / "rows-00001.safetensors").unlink()
    with pytest.raises(ActiveDPOError, match="is incomplete, 5 of 12 rows are missing"):
        FeatureStore.open(folder)
    FeatureStore.create(folder, pool, SETTINGS, skipped=[]).fill(extractor, tokens)
    assert _content(folder) == _content(made)


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_copies_of_shards(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = _use_all(folder).load().gradients
    # Beside the others: equal rows are the same rows.
    shutil.copy(folder / "rows-00000.safetensors", folder / "rows-00007.safetensors")
    assert torch.equal(_use_all(folder).load().gradients, rows)
    assert "rows-00007.safetensors repeats rows of" in caplog.text
    # In place of another: its rows are missing.
    (folder / "rows-00007.safetensors").unlink()
    shutil.copy(folder / "rows-00000.safetensors", folder / "rows-00001.safetensors")
    with pytest.raises(ActiveDPOError, match=r"5 of 12 rows are missing.*rows-00001.* is a copy"):
        FeatureStore.open(folder)


def test_a_shard_of_another_store_is_named(
    folder: Path, tmp_path: Path, pool: PreferencePool, tokens: TokenizedPool, extractor
) -> None:
    other = FeatureStore.create(tmp_path / "t", pool, {**SETTINGS, "beta": 1}, skipped=[])
    other.fill(extractor, tokens, rows_per_shard=5)
    shutil.copy(tmp_path / "t" / "rows-00001.safetensors", folder)
    with pytest.raises(ActiveDPOError, match=r"rows-00001\.safetensors is damaged or of another"):
        FeatureStore.open(folder)


@pytest.mark.parametrize("size", [0, 7, 50, 400, -1])
def test_a_shard_cut_short_is_named(folder: Path, size: int) -> None:
    shard = folder / "rows-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(ActiveDPOError, match=r"rows-00002\.safetensors is damaged.*delete it and"):
        FeatureStore.open(folder)


def _drop(name: str) -> Callable[[dict], dict]:
    return lambda manifest: {key: manifest[key] for key in manifest if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((_drop(name), f"{name!r} is missing") for name in ("pool", "skipped", "files")),
        (lambda manifest: {**manifest, "responses": "12"}, "'responses' is missing or not int"),
        (lambda manifest: {**manifest, "settings": []}, "'settings' is missing or not dict"),
        (lambda manifest: {**manifest, "filling": {}}, "'rows_per_shard' is missing or not int"),
        (lambda manifest: {**manifest, "color": 1}, "'color', which this version does not know"),
        (lambda manifest: {**manifest, "format": 6}, "a newer version made .format 6, here 5"),
        (lambda manifest: {**manifest, "format": None}, "unknown format"),
    ],
)
def test_manifests_of_other_versions(folder: Path, change: Callable, message: str) -> None:
    manifest = read_checked_json(folder / "manifest.json")
    write_checked_json(folder / "manifest.json", change(manifest))
    with pytest.raises(ActiveDPOError, match=message):
        FeatureStore.open(folder)


def test_a_manifest_changed_by_hand(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"beta": 0.1', '"beta": 0.2'))
    with pytest.raises(ActiveDPOError, match="its checksum does not match"):
        FeatureStore.open(folder)


def test_another_extractor_is_refused(
    folder: Path, pool: PreferencePool, tokens: TokenizedPool, extractor
) -> None:
    (folder / "rows-00001.safetensors").unlink()
    store = FeatureStore.create(folder, pool, SETTINGS, skipped=[])
    for other, name in (
        (FeatureExtractor(extractor.model, Sketch("sjlt", 16), beta=0.5, verify=False), "beta"),
        (FeatureExtractor(extractor.model, Sketch("sjlt", 16, 1), verify=False), "sketch_seed"),
        (
            FeatureExtractor(
                lora(tiny_causal_lm("llama"), "llama", seed=5), Sketch("sjlt", 16), verify=False
            ),
            "weights",
        ),
    ):
        with pytest.raises(ActiveDPOError, match=f"was filled with {name} = "):
            store.fill(other, tokens)


def test_a_pool_that_is_gone_or_half_replaced(
    folder: Path, pool: PreferencePool, made: Path
) -> None:
    (folder / "pool.jsonl").unlink()
    with pytest.raises(ActiveDPOError, match=r"pool\.jsonl is gone: run `activedpo features`"):
        FeatureStore.open(folder)
    FeatureStore.create(folder, pool, SETTINGS, skipped=[])
    assert _content(folder) == _content(made)
    # Killed between the two manifests that replacing the pool writes, before and after the pool.
    rows = [json.loads(line) for line in (folder / "pool.jsonl").read_text().splitlines()]
    other = PreferencePool.from_rows({**row, "n": 100} for row in rows)
    FeatureStore.create(folder, other, SETTINGS, skipped=[])
    final = read_checked_json(folder / "manifest.json")
    half = {
        **final,
        "files": {
            **final["files"],
            "pool.jsonl": read_checked_json(made / "manifest.json")["files"]["pool.jsonl"],
        },
        "next_files": {"pool.jsonl": final["files"]["pool.jsonl"]},
    }
    for there in (folder, made):
        content = (there / "pool.jsonl").read_bytes()
        (folder / "pool.jsonl").write_bytes(content)
        write_checked_json(folder / "manifest.json", half)
        assert len(_use_all(folder).pool()) == len(pool)
        FeatureStore.create(folder, other, SETTINGS, skipped=[])
        assert read_checked_json(folder / "manifest.json") == final
        assert _use_all(folder).pool()[0].extra == {"n": 100}


def test_a_partial_shard_keeps_whole_rows_only(tmp_path: Path) -> None:
    layout, key = ShardLayout(4, 3, torch.float32), b"k" * 32
    rows = torch.tensor([7, 1, 5, 2])
    gradients, logps = torch.randn(4, 3), torch.randn(4, dtype=torch.float64)
    path = tmp_path / "rows-00000.partial"
    with PartialShard(path, key, layout) as shard:
        shard.append(rows[:3], gradients[:3], logps[:3])
    assert PartialShard.contents(path, key) == ([7, 1, 5], 1)
    assert PartialShard.contents(path, b"x" * 32) == ([], 4)  # of another store
    whole = path.read_bytes()
    for offset, left in (
        (layout.gradients + 4, []),
        (layout.rows + 8, [7]),
        (layout.logps + 16, [7, 1]),
    ):
        broken = bytearray(whole)
        broken[offset] ^= 1
        path.write_bytes(broken)
        assert PartialShard.contents(path, key) == (left, 4 - len(left))
        with PartialShard(path, key) as shard:
            at = shard.count
            shard.append(rows[at:], gradients[at:], logps[at:])
            shard.finish(tmp_path / f"whole-{len(left)}")
    contents = {found.read_bytes() for found in tmp_path.glob("whole-*")}
    assert len(contents) == 1
    for size in (0, 5, 100):  # killed before it was begun
        path.write_bytes(whole[:size])
        assert PartialShard.contents(path, key) is None
