"""Stores of parts of a pool joined to one: whole or not at all, and never of two kinds."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from activedpo_fast.cli.app import main
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.sketch import Sketch
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.tokens import tokenize_pool
from activedpo_fast.store.store import FeatureStore
from tests.support.killing import content, run
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer

SETTINGS = {"model": "tiny", "beta": 0.1}
ROWS: list[dict[str, Any]] = [
    {
        "id": f"p{i}",
        "topic": "art",
        "prompt": f"prompt {i}:" + " far too long" * 9 * (i == 3),
        "responses": [f" a{i}", " b" * (i + 1), " c"][: 2 + i % 2],
    }
    for i in range(6)
]


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    model = lora(tiny_causal_lm("llama"), "llama")
    # Each response runs alone: the bits of its row do not depend on the others.
    return FeatureExtractor(model, Sketch("sjlt", 64), max_tokens_per_batch=1)


@pytest.fixture(scope="module")
def make(extractor: FeatureExtractor) -> Callable[..., Path]:
    def make(
        path: Path,
        rows: list[dict[str, Any]],
        settings: dict[str, Any] = SETTINGS,
        by: FeatureExtractor = extractor,
        fill: bool = True,
    ) -> Path:
        pool = PreferencePool.from_rows(rows)
        tokens = tokenize_pool(pool, tiny_tokenizer(), max_length=60)
        store = FeatureStore.create(path, pool, settings, skipped=tokens.skipped)
        if fill:
            store.fill(by, tokens, rows_per_shard=4)
        return path

    return make


@pytest.fixture(scope="module")
def made(make: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the store of the whole pool, and with those of two parts that overlap."""
    folder = tmp_path_factory.mktemp("stores")
    for name, rows in (("whole", ROWS), ("one", ROWS[:3]), ("two", ROWS[2:])):
        make(folder / name, rows)
    return folder


@pytest.fixture
def untouched(made: Path) -> Any:
    """Check that a test changes and leaves nothing beside the stores."""
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()}
    yield
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()} == before


def test_it_is_the_store_of_the_whole_pool(
    made: Path,
    tmp_path: Path,
    extractor: FeatureExtractor,
    untouched: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Rows are copied in several parts.
    monkeypatch.setattr("activedpo_fast.store.joining._CHUNK_BYTES", 1000)
    out = tmp_path / "new" / "out"
    assert main(["store", "join", str(out), str(made / "one"), str(made / "two")]) == 0
    said = capsys.readouterr()
    assert said.out == f"15 gradient rows of 6 prompts from 2 stores in {out}\n"
    assert "1 prompts are in several stores, with the same rows: kept once" in said.err
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json",
        "pool.jsonl",
        "rows-00000.safetensors",
        "tokens.safetensors",
    ]
    whole, joined = FeatureStore.open(made / "whole"), FeatureStore.open(out)
    assert (
        "as written: 15 rows, 3 of them all zeros" in joined.verify()
    )  # the item that is too long
    assert torch.equal(joined.load().gradients, whole.load().gradients)
    assert torch.equal(joined.logps(), whole.logps())
    filling = {"filling": None}
    assert {**joined.manifest, **filling} == {**whole.manifest, **filling}
    assert joined.manifest["skipped"] == [3]

    for strategy in ("activedpo", "random"):
        picked = []
        for store in (made / "whole", out):
            target = tmp_path / "picked.jsonl"
            argv = ["select", str(store), "--pairs=4", f"--strategy={strategy}"]
            assert main([*argv, f"--output={target}"]) == 0
            picked.append(target.read_text())
        assert picked[0] == picked[1]

    # It can be gone on with as any other store.
    (out / "rows-00000.safetensors").unlink()
    pool = PreferencePool.from_rows(ROWS)
    again = FeatureStore.create(out, pool, SETTINGS, skipped=[3])
    again.fill(extractor, tokenize_pool(pool, tiny_tokenizer(), max_length=60))
    assert torch.equal(again.load().gradients, whole.load().gradients)


def test_responses_that_are_not_finite_stay_so(
    made: Path, tmp_path: Path, make: Callable[..., Path], extractor: FeatureExtractor
) -> None:
    model = lora(tiny_causal_lm("llama"), "llama")
    token = tiny_tokenizer()(" c")["input_ids"][-1]
    model.get_input_embeddings().weight.data[token] = torch.nan
    odd = FeatureExtractor(
        model, Sketch("sjlt", 64), max_tokens_per_batch=1, verify=False, skip_non_finite=True
    )
    rows = [{"id": str(i), "prompt": "x", "responses": [" a", " b" + " c" * i]} for i in range(4)]
    parts = [
        make(tmp_path / str(n), part, by=odd) for n, part in enumerate((rows[:1], rows[1:], rows))
    ]
    joined = FeatureStore.join(tmp_path / "out", parts)  # two have the same rows of zeros
    assert joined.non_finite() == FeatureStore.open(parts[2]).non_finite() != []


def test_what_does_not_go_together_is_named(
    made: Path, tmp_path: Path, make: Callable[..., Path], extractor: FeatureExtractor
) -> None:
    other = FeatureExtractor(extractor.model, Sketch("sjlt", 64), beta=0.2, max_tokens_per_batch=1)
    batched = FeatureExtractor(extractor.model, extractor.sketch, max_tokens_per_batch=400)
    changed = [{**ROWS[0], "responses": [" z", " y"]}, *ROWS[4:]]
    column = [{**ROWS[0], "topic": "law"}, *ROWS[4:]]
    half = {"model_fingerprint": "2", **SETTINGS}
    for name, rows, options, expected in (
        ("settings", ROWS[3:], {"settings": {**SETTINGS, "beta": 0.5}}, "with beta = 0.5, not 0.1"),
        ("extractor", ROWS[3:], {"by": other}, "with beta = 0.2, not 0.1"),
        ("model", ROWS[3:], {"settings": half}, "with another model"),
        ("texts", changed, {}, "item 'p0' is in .*one and in .*texts, with other texts: make"),
        ("column", column, {}, "item 'p0' is in .*one and in .*column, with another 'topic'"),
        ("numbers", ROWS, {"by": batched}, "with other numbers for response [123]: make"),
        ("missing", ROWS[3:], {"fill": False}, "missing is incomplete, 8 of 8 rows are missing"),
    ):
        first = made / "one"
        if name == "model":
            first = make(tmp_path / "first", ROWS[:3], {**half, "model_fingerprint": "1"})
        part = make(tmp_path / name, rows, **options)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ActiveDPOError, match=expected):
            FeatureStore.join(tmp_path / "out", [first, part])
        assert sorted(tmp_path.rglob("*")) == before, name


def test_a_damaged_row_is_not_copied(tmp_path: Path, make: Callable[..., Path]) -> None:
    part = make(tmp_path / "part", ROWS[:2])
    shard = part / "rows-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ActiveDPOError, match="rows-00000.safetensors is damaged"):
        FeatureStore.join(tmp_path / "out", [part])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part"]


def test_outputs_that_are_refused(
    made: Path, tmp_path: Path, untouched: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    for output, expected in (
        (tmp_path / "full", "is not empty: choose another path"),
        (tmp_path / "file", "is a file"),
        (made / "one", "is not empty"),
        (made / "one" / "new", "is inside"),
    ):
        assert main(["store", "join", str(output), str(made / "one"), str(made / "two")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("activedpo: error: ") and expected in said and said.count("\n") == 1
    assert main(["store", "join", str(tmp_path / "out"), str(tmp_path / "empty")]) == 2
    assert "empty is not a feature store" in capsys.readouterr().err
    with pytest.raises(ActiveDPOError, match="no stores to join"):
        FeatureStore.join(tmp_path / "out", [])
    assert main(["store", "join", str(tmp_path / "empty"), str(made / "one"), "--quiet"]) == 0
    assert FeatureStore.open(tmp_path / "empty").manifest["responses"] == 7
    assert capsys.readouterr().out == ""


def test_nothing_half_is_left(made: Path, tmp_path: Path, untouched: None) -> None:
    command = ["store", "join", str(tmp_path / "out"), str(made / "one"), str(made / "two")]
    unbroken = run([[*command[:2], str(tmp_path / "unbroken"), *command[3:]]])
    assert unbroken[0] == 0, unbroken
    steps = unbroken[1]["steps"]
    for number, when, code in (
        (signal.SIGINT, steps // 2, 130),
        (signal.SIGKILL, steps // 3, -signal.SIGKILL),
    ):
        assert run([command], when=when, number=number)[0] == code
        left = [path.name for path in tmp_path.iterdir() if path.name != "unbroken"]
        assert all(name.startswith(".out-") for name in left)
        assert bool(left) == (number == signal.SIGKILL)
    code, _, said = run([command], largest=1000)  # as on a full disk
    assert code == 2 and "cannot be written" in said and len(said.splitlines()) < 3
    assert [path.name for path in tmp_path.iterdir()] == ["unbroken"]
    assert run([command])[0] == 0
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")
