"""Damaged files of every kind: each is read, or refused in one line, and never in a traceback."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from activedpo_fast._files import read_checked_json, write_checked_json
from activedpo_fast.cli.run_file import load_config
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.sketch import Sketch
from activedpo_fast.labels.labeled_pairs import read_labeled_pairs
from activedpo_fast.labels.reading import read_labels, read_pending
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.reading import read_prompts
from activedpo_fast.pool.tokens import tokenize_pool
from activedpo_fast.report.reading import read_run
from activedpo_fast.store.store import FeatureStore
from activedpo_fast.training.resuming import check_settings
from activedpo_fast.training.run_folder import read_adapter, read_records
from tests.support.damage import damaged_bytes, examples, one_damaged_value, read_or_refused
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer
from tests.support.runs import make_loop

POOL = [
    {"id": "a", "prompt": "p a:", "responses": [" x", " y"], "topic": "t", "cost": 1.5},
    {"id": "b", "prompt": "p b:", "responses": [" x", " y", " z"], "chat_template_kwargs": None},
    {"prompt": "p c:", "chosen": " x", "rejected": " y", "extra": {"deep": [1, None]}},
]
CHAT = [
    {
        "prompt": [{"role": "user", "content": "p"}],
        "responses": [[{"role": "assistant", "content": c}] for c in "xyz"],
        "chat_template_kwargs": {"enable_thinking": False},
    }
]
LABELS = [
    {
        "id": f"i{n}",
        "pair": [0, 1],
        "score": 0.5,
        "rank": n,
        "prompt": "p",
        "responses": ["x", "y"],
        "label": label,
    }
    for n, label in enumerate([0, 1, "skip", None])
]
RUN = {
    "model": "m",
    "prompts": "p.jsonl",
    "output_dir": "o",
    "oracle": {"kind": "people", "via": "files"},
    "lora": {"r": 4, "target_modules": ["q_proj"]},
    "selection": {"proj_dim": 16, "lam": 1.0},
    "loop": {"rounds": 2, "temperature": 0.7},
    "rules": {"max_per_prompt": 1, "group_by": "topic", "quotas": {"t": 2}},
    "dpo": {"learning_rate": 1e-4},
    "seed": 3,
}


@contextmanager
def _file(name: str, content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


def _jsonl(rows: Any) -> bytes:
    rows = rows if isinstance(rows, list) else [rows]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _labels_and_pairs(path: Path) -> None:
    read_or_refused(lambda: read_pending(path))
    read_or_refused(lambda: read_labeled_pairs(path, PreferencePool.from_rows(POOL)))
    answered, labels = read_labels(path)
    if any(label is not None for label in labels):
        answered.to_dataset(labels)


def _pools(path: Path) -> None:
    read_or_refused(lambda: read_prompts(path))
    pool = PreferencePool.load(path)
    again = PreferencePool.from_rows(json.loads(line) for line in pool.jsonl().splitlines())
    assert again.fingerprint() == pool.fingerprint()


READERS: list[tuple[str, Any, Callable[[Path], Any]]] = [
    ("pool.jsonl", POOL, _pools),
    ("pool.jsonl", CHAT, _pools),
    ("labels.jsonl", LABELS, _labels_and_pairs),
]
_each = pytest.mark.parametrize(("name", "rows", "read"), READERS, ids=["pool", "chat", "labels"])


@_each
@examples(25)
@given(data=st.data())
def test_rows_with_one_damaged_value(name: str, rows: Any, read: Any, data: Any) -> None:
    with _file(name, _jsonl(data.draw(one_damaged_value(rows)))) as path:
        read_or_refused(lambda: read(path))


@_each
@examples(25)
@given(data=st.data())
def test_rows_of_damaged_bytes(name: str, rows: Any, read: Any, data: Any) -> None:
    with _file(name, data.draw(damaged_bytes(_jsonl(rows)))) as path:
        read_or_refused(lambda: read(path))


@examples(25)
@given(data=st.data())
def test_run_files(data: Any) -> None:
    document = data.draw(one_damaged_value(RUN))
    content = data.draw(
        st.just(json.dumps(document).encode()) | damaged_bytes(yaml.safe_dump(RUN).encode())
    )
    with _file("run.yaml", content) as path:
        read_or_refused(lambda: load_config(path))


# -- stores ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "s"
    pool = PreferencePool.from_rows(POOL)
    model = lora(tiny_causal_lm("llama"), "llama")
    extractor = FeatureExtractor(model, Sketch("sjlt", 16), verify=False)
    made = FeatureStore.create(folder, pool, {"model": "tiny", "beta": 0.1}, skipped=[])
    made.fill(extractor, tokenize_pool(pool, tiny_tokenizer()), rows_per_shard=4)
    return folder


def _use(folder: Path) -> None:
    opened = FeatureStore.open(folder, complete=False)
    read_or_refused(opened.pool)
    read_or_refused(lambda: opened.verify(show_progress=False))
    FeatureStore.open(folder).rows_on_disk().close()
    FeatureStore.open(folder).load()


@pytest.mark.parametrize("name", ["manifest.json", "rows-00000", "pool.jsonl", "tokens"])
@examples(12)
@given(data=st.data())
def test_stores_of_damaged_bytes(store: Path, name: str, data: Any) -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(shutil.copytree(store, Path(parent) / "s"))
        (path,) = folder.glob(f"{name}*")
        path.write_bytes(data.draw(damaged_bytes(path.read_bytes())))
        read_or_refused(lambda: _use(folder))


@examples(30)
@given(data=st.data())
def test_manifests_with_one_damaged_value(store: Path, data: Any) -> None:
    """Its checksum is that of the damaged one: somebody has edited it, or another version."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(shutil.copytree(store, Path(parent) / "s"))
        value = data.draw(one_damaged_value(read_checked_json(folder / "manifest.json")))
        _write(folder / "manifest.json", value)
        read_or_refused(lambda: _use(folder))


def _write(path: Path, value: Any) -> None:
    try:
        write_checked_json(path, value)
    except (TypeError, ValueError, AttributeError):  # no object, or half of a surrogate pair
        path.write_text(json.dumps(value))


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run"
    make_loop(folder, rounds=1).run()
    return folder


def _read_run(folder: Path) -> None:
    read_or_refused(lambda: read_run(folder, "run"))
    read_or_refused(lambda: check_settings(folder, {"seed": 0, "loop": {"rounds": 2}}))
    for round_folder in (folder / "start", folder / "round-000"):
        read_or_refused(lambda inside=round_folder: read_adapter(inside))
    read_records(folder)


RUN_FILES = [
    "config.json",
    "start/record.json",
    "round-000/record.json",
    "round-000/seconds.json",
    "round-000/training.json",
    "round-000/checksums.json",
]


@pytest.mark.parametrize("name", RUN_FILES)
@examples(6)
@given(data=st.data())
def test_runs_with_one_damaged_value(made_run: Path, name: str, data: Any) -> None:
    path = made_run / name
    whole = path.read_bytes()
    try:
        _write(path, data.draw(one_damaged_value(read_checked_json(path))))
        read_or_refused(lambda: _read_run(made_run))
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", [*RUN_FILES, "round-000/adapter/adapter_model.safetensors"])
@examples(4)
@given(data=st.data())
def test_runs_of_damaged_bytes(made_run: Path, name: str, data: Any) -> None:
    path = made_run / name
    whole = path.read_bytes()
    try:
        path.write_bytes(data.draw(damaged_bytes(whole)))
        read_or_refused(lambda: _read_run(made_run))
    finally:
        path.write_bytes(whole)
