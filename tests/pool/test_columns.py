"""Columns that have a meaning in TRL: the package's table against the docs, TRL's source and TRL's
behavior."""

from __future__ import annotations

import datetime
import inspect
import json
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from activedpo_fast.cli.app import main
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels import CallableOracle
from activedpo_fast.pool.columns import DATA_COLUMNS, MESSAGE_KEYS, DataColumn
from activedpo_fast.pool.items import PoolItem, Prompt
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.reading import read_prompts
from activedpo_fast.pool.tokens import tokenize_pool
from activedpo_fast.training import generation
from activedpo_fast.training.generation import generate_responses, respond
from activedpo_fast.training.loop import ActiveDPOLoop
from activedpo_fast.training.trl import dpo_config
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer

pytest.importorskip("trl")
from trl import DPOConfig, DPOTrainer, data_utils  # noqa: E402
from trl.trainer import dpo_trainer  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs" / "trl.md"

_TEMPLATE = (
    "{% if tools %}<tools>{{ tools }}</tools>{% endif %}{{ style }}{% for m in messages %}"
    "<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# A value for each column that has a meaning in TRL, with chat messages.
_MESSAGES = [{"role": "user", "content": "Hello?"}]
VALUES: dict[str, Any] = {
    "chat_template_kwargs": {"style": "brief"},
    "tools": json.dumps([{"type": "function", "function": {"name": "look_up"}}]),
    "image": "cat.png",
    "images": ["cat.png"],
    "ref_chosen_logps": -1.5,
    "ref_rejected_logps": -200.0,
    "prompt_ids": [1, 2, 3],
    "chosen_ids": [4, 5],
    "rejected_ids": [6],
    "messages": _MESSAGES,
    "completion": _MESSAGES,
    "label": True,
    "margin": 2.0,
}
IMAGES = {"image", "images"}
TEXTS = {"id", "prompt", "chosen", "rejected", "responses", "response_a", "response_b"}
OTHERS = {
    "topic": "law",
    "source": None,
    "when": "2024-01-01T00:00:00",
    "tags": ["a", {"b": 1}],
    "system": "Be brief.",
}

_PLAIN = {"prompt": "The quick", "chosen": " fox", "rejected": " dog"}
_CHAT = {
    "prompt": [{"role": "user", "content": "The quick"}],
    "chosen": [{"role": "assistant", "content": "fox"}],
    "rejected": [{"role": "assistant", "content": "dog"}],
}


def _tokenizer(chat: bool) -> Any:
    tokenizer = tiny_tokenizer(chat=chat)
    if chat:
        tokenizer.chat_template = _TEMPLATE
    return tokenizer


def _trained_tokens(rows: list[dict[str, Any]], chat: bool, folder: Path, **options: Any) -> Any:
    config = DPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, **options
    )
    trainer = DPOTrainer(
        model=lora(tiny_causal_lm("llama"), "llama"),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=_tokenizer(chat),
    )
    return [(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in trainer.train_dataset]


def _scored_tokens(pool: PreferencePool) -> Any:
    tokens = tokenize_pool(pool, _tokenizer(pool.is_chat)).sequences
    starts = [t.completion_start for t in tokens]
    return [
        (list(a.input_ids[:s]), list(a.input_ids[s:]), list(b.input_ids[s:]))
        for a, b, s in zip(tokens[::2], tokens[1::2], starts[::2], strict=True)
    ]


# -- the table itself ------------------------------------------------------------------------------


def _documented(heading: str) -> list[list[str]]:
    """The cells of the table in the section "Data columns" whose first column is `heading`."""
    section = DOCS.read_text().split("\n## Data columns\n")[1].split("\n## ")[0]
    table = section.split(f"| {heading} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def _written(column: DataColumn) -> list[str]:
    name = f"`{column.name}`" if column.name.isidentifier() else column.name
    verdict = column.verdict + (" with chat messages" if column.chat else "")
    return [name, column.in_trl, verdict, column.here, column.in_prompts or verdict]


def test_the_docs_have_the_table() -> None:
    assert _documented("column") == [_written(column) for column in DATA_COLUMNS]
    assert _documented("key of a message") == [_written(column)[:4] for column in MESSAGE_KEYS]
    names = [column.name for column in DATA_COLUMNS]
    assert len(set(names)) == len(names)
    assert set(names) == TEXTS | set(VALUES)


def test_the_table_has_every_column_that_trl_reads() -> None:
    trainer = inspect.getsource(dpo_trainer)
    read = set(re.findall(r'\bexample(?:s\[0\])?(?:\.get\(|\.pop\(|\[)"(\w+)"', trainer))
    read |= set(
        re.findall(r'"(\w+)" (?:not )?in (?:examples?\[0\]|dataset_sample|first_example)', trainer)
    )
    for listed in re.findall(r"_signature_columns = \[(.*?)\]", trainer, re.DOTALL):
        read |= set(re.findall(r'"(\w+)"', listed))
    for listed in re.findall(r"supported_keys = \[(.*?)\]", inspect.getsource(data_utils)):
        read |= set(re.findall(r'"(\w+)"', listed))
    assert {
        "prompt",
        "tools",
        "images",
        "chat_template_kwargs",
        "ref_chosen_logps",
        "messages",
    } <= read  # the patterns still match
    assert read <= {column.name for column in DATA_COLUMNS}


# -- each verdict, in a pool -----------------------------------------------------------------------

# Images, which become parts of the prompt, have their own tests: test_images.py.
_NAMED = [column for column in DATA_COLUMNS if column.name in VALUES.keys() - IMAGES]


def _readers(rows: list[dict[str, Any]], folder: Path) -> list[Callable[[], PreferencePool]]:
    table = pa.Table.from_pylist([{name: row.get(name) for name in rows[-1]} for row in rows])
    pq.write_table(table, folder / "pool.parquet")
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = [
        PoolItem(
            str(n),
            row["prompt"],
            (row["chosen"], row["rejected"]),
            {name: value for name, value in row.items() if name in VALUES},
        )
        for n, row in enumerate(rows)
    ]
    return [
        lambda: PreferencePool.from_rows(rows),
        lambda: PreferencePool(items),
        lambda: PreferencePool.load(folder / "pool.jsonl"),
        lambda: PreferencePool.load(folder / "pool.parquet"),
        lambda: PreferencePool.from_dataset(
            Dataset.from_list([{name: row.get(name) for name in rows[-1]} for row in rows])
        ),
    ]


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize("column", _NAMED, ids=lambda column: column.name)
def test_verdict_in_a_pool(column: DataColumn, chat: bool, tmp_path: Path) -> None:
    base = _CHAT if chat else _PLAIN
    other = {**base, "prompt": [{"role": "user", "content": "An"}] if chat else "An"}
    row = {**base, column.name: VALUES[column.name]}
    applies = chat or not column.chat
    places = ["row 2", "item 2", "pool.jsonl, line 2", "pool.parquet, row 2", "data set, row 2"]
    for read, place in zip(_readers([other, row], tmp_path), places, strict=True):
        if column.verdict == "refused" and applies:
            with pytest.raises(ActiveDPOError, match=f"{place}: the column '{column.name}'") as e:
                read()
            assert "\n" not in str(e.value)
            continue
        pool = read()
        assert pool[1].extra == {column.name: VALUES[column.name]}
        without = PreferencePool.from_rows([other, base])
        changed = _scored_tokens(pool) != _scored_tokens(without)
        assert changed == (column.verdict == "used" and applies)


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize("column", _NAMED, ids=lambda column: column.name)
def test_verdict_is_what_trl_does(column: DataColumn, chat: bool, tmp_path: Path) -> None:
    """Carried: the trainer's tokens do not change. Used: they change, and ours are the same.
    Refused: the trainer uses the column, or also refuses it."""
    base = _CHAT if chat else _PLAIN
    value = VALUES[column.name]
    if not chat and column.name in ("messages", "completion"):
        value = "Hello?"
    row = {**base, column.name: value}
    without = _trained_tokens([base], chat, tmp_path)
    assert without == _scored_tokens(PreferencePool.from_rows([base]))
    if column.verdict == "carried" or (column.chat and not chat):
        assert _trained_tokens([row], chat, tmp_path) == without
    elif column.verdict == "used":
        tokens = _trained_tokens([row], chat, tmp_path)
        assert tokens != without
        assert tokens == _scored_tokens(PreferencePool.from_rows([row]))
    else:
        with pytest.raises(ValueError, match="duplicated columns"):
            _trained_tokens([row], chat, tmp_path, precompute_ref_log_probs=True)


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
def test_empty_cells_and_all_other_columns_stay(chat: bool, tmp_path: Path) -> None:
    empty = {name: None for name in VALUES if name != "messages"} | {"image": float("nan")}
    base = _CHAT if chat else _PLAIN
    pool = PreferencePool.from_rows([{**base, **empty, **OTHERS}])
    assert {name: pool[0].extra[name] for name in OTHERS} == OTHERS
    assert _scored_tokens(pool) == _scored_tokens(PreferencePool.from_rows([base]))
    pool.to_jsonl(tmp_path / "pool.jsonl")
    again = PreferencePool.load(tmp_path / "pool.jsonl")
    assert {name: again[0].extra[name] for name in OTHERS} == OTHERS


# -- keys of messages ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"role": "user", "content": ["Hi"]}, "'content' has the part str 'Hi'; a part is"),
        ({"role": "user", "content": [{"type": "video"}]}, "'content' has the part .*; a part is"),
        ({"role": "user", "content": [{"type": "text"}]}, "type 'text' whose 'text' is no string"),
        ({"role": "user", "content": [{"type": "text", "text": " "}]}, "is empty"),
        ({"role": "user", "content": 3}, "'content' is not a string.*or a list of parts"),
        ({"role": "user", "content": None}, "without 'content'"),
        ({"role": "assistant", "content": "", "tool_calls": []}, "is empty"),
        ({"role": "assistant", "tool_calls": "f()"}, "'tool_calls' is not a list.*a list of calls"),
        ({"role": "assistant", "tool_calls": 3}, "'tool_calls' is not a list.*a list of calls"),
        ({"role": "assistant", "tool_calls": [{"name": 3}]}, "'tool_calls' has .*; a call is"),
        ({"role": "assistant", "tool_calls": [{"function": "f"}]}, "'tool_calls' has .*; a call"),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": {1, 2}}}]},
            "'tool_calls' is no JSON value",
        ),
        ({"role": "user", "content": "x", "weight": 0}, "'weight'.*make it a string"),
    ],
)
def test_message_keys_that_are_refused(message: dict[str, Any], fault: str) -> None:
    for name in ("prompt", "chosen"):
        with pytest.raises(ActiveDPOError, match=f"^row 1: .*{fault}"):
            PreferencePool.from_rows([{**_CHAT, name: [message]}])
    with pytest.raises(ActiveDPOError, match=f"^prompt 1: .*{fault}"):
        generate_responses(_model(), _tokenizer(True), [Prompt("a", [message])])


def test_message_keys_that_are_used(tmp_path: Path) -> None:
    row = {**_CHAT, "prompt": [{"role": "user", "name": "ann", "content": "The quick"}]}
    tokens = _scored_tokens(PreferencePool.from_rows([row]))
    assert tokens == _trained_tokens([row], True, tmp_path)
    assert tokens != _scored_tokens(PreferencePool.from_rows([_CHAT]))


# -- prompts: before anything is sampled -----------------------------------------------------------


@lru_cache
def _model() -> Any:
    return lora(tiny_causal_lm("llama"), "llama")


def _entrances(prompts: list[Prompt], chat: bool, folder: Path) -> list[Callable[[], Any]]:
    options: dict[str, Any] = dict(
        output_dir=folder / "run", dpo_args=dpo_config(output_dir=str(folder / "trainer"))
    )
    return [
        lambda: generate_responses(_model(), _tokenizer(chat), prompts, max_completion_length=2),
        lambda: ActiveDPOLoop(
            _model(), _tokenizer(chat), prompts, CallableOracle(lambda *_: 0), **options
        ),
    ]


@pytest.fixture
def no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: Any, **options: Any) -> None:
        raise AssertionError("responses are sampled")

    monkeypatch.setattr(generation.Sampler, "run", run)


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize("column", DATA_COLUMNS, ids=lambda column: column.name)
def test_verdict_in_prompts(
    column: DataColumn, chat: bool, tmp_path: Path, no_sampling: None
) -> None:
    if column.name in ("id", "prompt"):
        return  # the columns of a prompt
    text: Any = _CHAT["prompt"] if chat else _PLAIN["prompt"]
    value = VALUES.get(column.name, _CHAT["chosen"] if chat else _PLAIN["chosen"])
    rows = [{"id": "a", "prompt": text}, {"id": "b", "prompt": text, column.name: value}]
    prompts = [
        Prompt(
            row["id"],
            row["prompt"],
            {k: v for k, v in row.items() if k in (VALUES.keys() | TEXTS - {"id", "prompt"})},
        )
        for row in rows
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(
        pa.Table.from_pylist([{k: row.get(k) for k in rows[1]} for row in rows]),
        tmp_path / "prompts.parquet",
    )
    refused = (column.in_prompts or column.verdict) == "refused" and (chat or not column.chat)
    if refused:
        for call in [
            *_entrances(prompts, chat, tmp_path),
            lambda: respond(_model(), _tokenizer(chat), prompts),
        ]:
            with pytest.raises(ActiveDPOError, match=f"^prompt 2: the column '{column.name}'"):
                call()
        for file, place in (("prompts.jsonl", "line 2"), ("prompts.parquet", "row 2")):
            with pytest.raises(
                ActiveDPOError, match=f"{file}, {place}: the column '{column.name}'"
            ):
                read_prompts(tmp_path / file)
    else:
        for call in _entrances(prompts, chat, tmp_path)[:1]:
            with pytest.raises(AssertionError, match="responses are sampled"):
                call()
        _entrances(prompts, chat, tmp_path)[1]()
        for file in ("prompts.jsonl", "prompts.parquet"):
            assert read_prompts(tmp_path / file)[1].extra == prompts[1].extra


def test_a_null_response_column_of_a_prompt_file_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "The", "chosen": None, "topic": None}) + "\n")
    assert read_prompts(path)[0].extra == {"topic": None}


# -- what is no JSON value -------------------------------------------------------------------------

_WHEN = datetime.datetime(2024, 1, 1)


def test_a_timestamp_of_prompts_is_named_before_anything_is_sampled(
    tmp_path: Path, no_sampling: None
) -> None:
    prompts = [Prompt("a", "The", {"when": "today"}), Prompt("b", "A", {"when": _WHEN})]
    for call in _entrances(prompts, False, tmp_path):
        with pytest.raises(ActiveDPOError, match="^prompt 2: the column 'when' is no JSON value"):
            call()
    assert not (tmp_path / "run").exists()
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"prompt": ["The", "A"], "when": [None, _WHEN]}), path)
    with pytest.raises(ActiveDPOError, match="prompts.parquet, row 2: the column 'when'"):
        read_prompts(path)


def test_a_timestamp_of_a_pool_is_named_before_features_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pool.parquet"
    pq.write_table(
        pa.table({"id": ["a"], "prompt": ["The"], "responses": [["x", "y"]], "when": [_WHEN]}), path
    )
    pool = PreferencePool.load(path)  # in memory it is harmless
    assert pool[0].extra == {"when": _WHEN}
    with pytest.raises(ActiveDPOError, match="item 'a': the column 'when' is no JSON value"):
        pool.to_jsonl(tmp_path / "pool.jsonl")
    # The model is not even searched for.
    assert (
        main(
            [
                "features",
                str(path),
                "--model",
                str(tmp_path / "none"),
                "--adapter",
                str(tmp_path / "none"),
                "--output",
                str(tmp_path / "store"),
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert "item 'a': the column 'when' is no JSON value" in error
    assert len(error.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["pool.parquet"]
