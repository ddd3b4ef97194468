"""An existing store accepts new columns of the pool, and refuses other texts or tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from activedpo_fast._files import read_checked_json, write_checked_json
from activedpo_fast.cli import features as features_command
from activedpo_fast.cli.app import main
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.sketch import Sketch
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.tokens import tokenize_pool
from activedpo_fast.store.store import FeatureStore
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer

ROWS: list[dict[str, Any]] = [
    {
        "id": f"p{n}",
        "prompt": f"label {n}?",
        "responses": [f" fox {n}", " dog", " a" * (n + 1)],
        "topic": "law",
        "tokens": 1.0,
    }
    for n in range(5)
]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _chats(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            **row,
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "responses": [[{"role": "assistant", "content": text}] for text in row["responses"]],
        }
        for row in rows
    ]


def _project(folder: Path, template: str | None = None) -> list[str]:
    """Files of a model, an adapter and a pool, and the command that computes the features."""
    base, tokenizer = tiny_causal_lm("llama"), tiny_tokenizer(chat=template is not None)
    if template is not None:
        tokenizer.chat_template = template + tokenizer.chat_template
    base.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lora(base, "llama").save_pretrained(str(folder / "adapter"))
    _write(folder / "pool.jsonl", ROWS if template is None else _chats(ROWS))
    return [
        "features",
        str(folder / "pool.jsonl"),
        f"--model={folder / 'model'}",
        f"--adapter={folder / 'adapter'}",
        f"--output={folder / 'store'}",
        "--proj-dim=32",
        "--device=cpu",
        "--max-tokens-per-batch=24",
    ]


def _interrupt(monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    """Run the command until some rows are written."""
    from activedpo_fast.gradients import extractor

    real, calls = extractor.captured_rows, []

    def passing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(extractor, "captured_rows", passing)
        assert main(argv) == 130


def test_a_process_killed_while_the_store_is_created(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, store = _project(tmp_path), tmp_path / "store"
    assert main(argv) == 0
    whole = {path.name: path.read_bytes() for path in store.iterdir()}
    manifest = read_checked_json(store / "manifest.json")
    begun = {key: manifest[key] for key in manifest if key not in ("tokens", "filling")}
    begun["files"] = {"pool.jsonl": manifest["files"]["pool.jsonl"]}
    write_checked_json(tmp_path / "begun.json", begun)
    temporary = f".manifest-{16 * 'a'}.json"
    for left in (
        {temporary: b"{", ".lock": b"process 1 on another"},
        {"manifest.json": (tmp_path / "begun.json").read_bytes(), temporary: b"{"},
        {"pool.jsonl": whole["pool.jsonl"], f".pool-{16 * 'a'}.jsonl": b"{"},
    ):
        for path in store.iterdir():
            path.unlink()
        for name, content in left.items():
            (store / name).write_bytes(content)
        assert main(argv) == 0
        there = {path.name: path.read_bytes() for path in store.iterdir()}
        assert there == whole
    # Another pool, or a folder with other files, is still refused.
    (store / "pool.jsonl").unlink()
    _write(tmp_path / "pool.jsonl", ROWS[1:])
    assert main(argv) == 2
    assert "holds the rows of another pool: choose" in capsys.readouterr().err
    (store / "manifest.json").rename(store / "notes.json")
    assert main(argv) == 2
    assert "is not a feature store" in capsys.readouterr().err


@pytest.mark.parametrize("finished", [True, False])
def test_columns_are_brought_up_to_date(
    tmp_path: Path,
    finished: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = _project(tmp_path)
    if finished:
        assert main(argv) == 0
        monkeypatch.setattr(features_command, "load_policy", None)  # no model is needed
    else:
        _interrupt(monkeypatch, argv)
    rows = {path.name: path.read_bytes() for path in (tmp_path / "store").glob("rows-*")}
    assert rows
    corrected = [
        {**row, "tokens": 1.0 if n == 3 else 100.0, "topic": ("law", "math")[n % 2]}
        for n, row in enumerate(ROWS)
    ]
    _write(tmp_path / "pool.jsonl", corrected)
    capsys.readouterr()
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "columns brought up to date: tokens, topic" in said
    assert said.startswith(f"{tmp_path / 'store'} is complete already") is finished
    for name, content in rows.items():
        if name.endswith(".safetensors"):
            assert (tmp_path / "store" / name).read_bytes() == content
    picked = tmp_path / "picked.jsonl"
    assert (
        main(
            [
                "select",
                str(tmp_path / "store"),
                "--cost",
                "tokens",
                "--pairs",
                "2",
                "--max-per-prompt",
                "2",
                "--output",
                str(picked),
            ]
        )
        == 0
    )
    assert {json.loads(line)["id"] for line in picked.read_text().splitlines()} == {"p3"}

    # Running again changes nothing. A column that was removed from the pool is removed.
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    assert main(argv) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()} == times
    _write(
        tmp_path / "pool.jsonl",
        [{name: row[name] for name in ("id", "prompt", "responses")} for row in ROWS],
    )
    assert main(argv) == 0
    assert "up to date: tokens, topic" in capsys.readouterr().out
    assert FeatureStore.open(tmp_path / "store").pool()[0].extra == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: [{**rows[0], "prompt": "other?"}, *rows[1:]],
            "the texts of item 'p0' have changed",
        ),
        (
            lambda rows: [*rows[:4], {**rows[4], "responses": [" x", *rows[4]["responses"][1:]]}],
            "the texts of item 'p4' have changed",
        ),
        (lambda rows: [rows[1], rows[0], *rows[2:]], "item 1 was 'p0', now 'p1'"),
        (lambda rows: rows[:4], "of 5 prompts, now 4"),
    ],
)
def test_other_texts_are_refused_and_nothing_is_taken_over(
    tmp_path: Path, change: Any, message: str
) -> None:
    pool = PreferencePool.from_rows(ROWS)
    store = FeatureStore.create(tmp_path / "s", pool, {}, skipped=[])
    before = (tmp_path / "s" / "pool.jsonl").read_bytes()
    corrected = change([{**row, "tokens": 7} for row in ROWS])
    with pytest.raises(ActiveDPOError, match=f"holds the rows of another pool .*{message}"):
        FeatureStore.create(tmp_path / "s", PreferencePool.from_rows(corrected), {}, skipped=[])
    with pytest.raises(ActiveDPOError, match="made with beta"):
        FeatureStore.create(
            tmp_path / "s",
            PreferencePool.from_rows({**row, "tokens": 7} for row in ROWS),
            {"beta": 1},
            skipped=[],
        )
    assert (tmp_path / "s" / "pool.jsonl").read_bytes() == before
    assert store.columns_taken == []


def test_other_template_arguments_of_a_row_are_refused(tmp_path: Path) -> None:
    chat = [
        {
            "id": row["id"],
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "responses": [[{"role": "assistant", "content": text}] for text in row["responses"]],
        }
        for row in ROWS
    ]
    FeatureStore.create(tmp_path / "s", PreferencePool.from_rows(chat), {}, skipped=[])
    chat[2]["chat_template_kwargs"] = {"x": 1}
    with pytest.raises(ActiveDPOError, match="item 'p2' has another 'chat_template_kwargs'"):
        FeatureStore.create(tmp_path / "s", PreferencePool.from_rows(chat), {}, skipped=[])


def test_a_template_that_knows_the_date_is_not_continued_on_another_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datetime

    from transformers.utils import chat_template_utils

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz) + datetime.timedelta(days=1)

    argv = _project(tmp_path, "{{ strftime_now('%d %B %Y') }}\n")
    _interrupt(monkeypatch, argv)
    before = {path: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", Tomorrow)
        capsys.readouterr()
        assert main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        "gives other tokens than when the store was begun, for 5 prompts, first that of 'p0'"
        in error
        and "date" in error
    )
    assert {path: path.read_bytes() for path in (tmp_path / "store").iterdir()} == before
    assert main(argv) == 0  # today again


def test_the_prompt_whose_tokens_differ_is_named(tmp_path: Path) -> None:
    pool, model = PreferencePool.from_rows(ROWS), lora(tiny_causal_lm("llama"), "llama")
    extractor = FeatureExtractor(model, Sketch("sjlt", 8))
    tokens = tokenize_pool(pool, tiny_tokenizer())
    store = FeatureStore.create(tmp_path / "s", pool, {}, skipped=[])
    store.fill(extractor, tokens)
    other = tiny_tokenizer()
    other.add_tokens(["label 3"])
    again = FeatureStore.create(tmp_path / "s", pool, {}, skipped=[])
    with pytest.raises(ActiveDPOError, match=r"for 1 prompts, first that of 'p3'"):
        again.fill(extractor, tokenize_pool(pool, other))
    # The start of a response and the number of responses count, too.
    moved = tokenize_pool(pool, tiny_tokenizer())
    sequence = moved.sequences[4]
    moved.sequences[4] = type(sequence)(sequence.input_ids, sequence.completion_start + 1)
    with pytest.raises(ActiveDPOError, match="first that of 'p1'"):
        again.check_tokens(moved)
    with pytest.raises(ActiveDPOError, match="12 tokenized responses are not the 15"):
        again.check_tokens(tokenize_pool(pool[:4], tiny_tokenizer()))
    (tmp_path / "s" / "tokens.safetensors").unlink()
    with pytest.raises(ActiveDPOError, match="for some prompts"):
        again.check_tokens(moved)
    again.check_tokens(tokens)


@pytest.mark.parametrize("old", [1, 3])
def test_a_store_of_an_older_format_is_refused(tmp_path: Path, old: int) -> None:
    pool = PreferencePool.from_rows(ROWS)
    FeatureStore.create(tmp_path / "s", pool, {}, skipped=[])
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    (tmp_path / "s" / "manifest.json").write_text(json.dumps({**manifest, "format": old}))
    for use in (
        lambda: FeatureStore.open(tmp_path / "s"),
        lambda: FeatureStore.create(tmp_path / "s", pool, {}, skipped=[]),
    ):
        with pytest.raises(ActiveDPOError, match=rf"an older version made \(format {old}, now"):
            use()
