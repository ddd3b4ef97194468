"""Calls of tools, tools, and contents in parts: read, tokenized as TRL does, handed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Json, List, Value

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.messages import without_nulls
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.reading import read_prompts
from activedpo_fast.pool.template import own_template_kwargs
from activedpo_fast.pool.tokens import tokenize_pool
from activedpo_fast.selection.picks_jsonl import Pick
from activedpo_fast.selection.prompts import PoolPrompts
from activedpo_fast.selection.result import Selection
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer

# In the manner of Qwen's: calls as JSON, contents that may be missing or in parts.
TEMPLATE = """\
{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{%- if m.content is string %}{{ m.content }}
{%- elif m.content %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}
{%- for call in m.tool_calls or [] %}<call>{{ (call.function or call) | tojson }}</call>{% endfor %}
{%- if m.tool_call_id %}({{ m.tool_call_id }}){% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"""


def _call(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    return {**more, "type": "function", "function": {"name": name, "arguments": arguments}}


def _tool(name: str, **properties: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in properties.items()},
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


WEATHER, SUM = _tool("get_weather", city="string"), _tool("sum", a="number", b="number")
ROWS: list[dict[str, Any]] = [
    {
        "id": "before",
        "prompt": [
            {"role": "system", "content": [{"type": "text", "text": "Use the tools."}]},
            {"role": "user", "content": "Weather in Paris?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [_call("get_weather", {"city": "Paris", "day": None}, id="c1")],
            },
            {"role": "tool", "content": "rain, 12", "tool_call_id": "c1"},
        ],
        "chosen": [{"role": "assistant", "content": "Rain at 12 degrees."}],
        "rejected": [{"role": "assistant", "content": "Sun."}],
        "tools": [WEATHER, SUM],
    },
    {
        "id": "calls",
        "prompt": [{"role": "user", "content": "What is 2 + 3?"}],
        "chosen": [{"role": "assistant", "tool_calls": [_call("sum", {"a": 2, "b": 3})]}],
        "rejected": [
            {
                "role": "assistant",
                "content": "I add.",
                "tool_calls": [{"name": "sum", "arguments": '{"a": 2}'}],
            },
            {"role": "tool", "content": "?"},
            {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
        ],
        "tools": json.dumps([SUM]),
        "chat_template_kwargs": {"style": "brief"},
    },
    {
        "id": "none",
        "prompt": [{"role": "user", "content": "Say hello."}],
        "chosen": [{"role": "assistant", "content": "Hello!"}],
        "rejected": [{"role": "assistant", "content": "Go away."}],
    },
]


def tokenizer() -> Any:
    made = tiny_tokenizer(chat=True)
    made.chat_template = TEMPLATE
    return made


def _scored(pool: PreferencePool) -> list[Any]:
    tokens = tokenize_pool(pool, tokenizer(), max_length=None).sequences
    return [
        (list(a.input_ids[: a.completion_start]), list(a.input_ids), list(b.input_ids))
        for a, b in zip(tokens[::2], tokens[1::2], strict=True)
    ]


def _trained(dataset: Dataset, folder: Path) -> list[Any]:
    trl = pytest.importorskip("trl")
    config = trl.DPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], max_length=None
    )
    trainer = trl.DPOTrainer(
        model=lora(tiny_causal_lm("llama"), "llama"),
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer(),
    )
    return [
        (r["prompt_ids"], r["prompt_ids"] + r["chosen_ids"], r["prompt_ids"] + r["rejected_ids"])
        for r in trainer.train_dataset
    ]


def _as_json(rows: list[dict[str, Any]]) -> Dataset:
    """Rows as TRL gets them without loss: a table of objects would fill keys up with null."""
    types = {"id": Value("string"), "tools": Json(), "chat_template_kwargs": Json()}
    messages = List(Json())
    names = list(ROWS[1])
    columns = {name: [row.get(name) for row in rows] for name in names}
    columns["chat_template_kwargs"] = [row.get("chat_template_kwargs", {}) for row in rows]
    columns["tools"] = [
        json.loads(tools) if isinstance(tools, str) else tools for tools in columns["tools"]
    ]
    features = Features({name: types.get(name, messages) for name in names})
    return Dataset.from_dict(columns, features=features)


def _picked(pool: PreferencePool) -> Selection:
    return Selection(
        tuple(
            Pick(
                item.id,
                (0, 1),
                1.0,
                rank,
                item.prompt,
                (item.responses[0], item.responses[1]),
                own_template_kwargs(item.extra),
                own_template_kwargs(item.extra),
            )
            for rank, item in enumerate(pool)
        ),
        "random",
    )


def test_tokens_are_those_of_trl_before_and_after_a_selection(tmp_path: Path) -> None:
    pool = PreferencePool.from_rows(ROWS)
    scored = _scored(pool)
    assert _trained(_as_json(ROWS), tmp_path) == scored
    _picked(pool).to_jsonl(tmp_path / "picks.jsonl")
    picked = Selection.from_jsonl(tmp_path / "picks.jsonl", strategy="random")
    assert picked == _picked(pool)
    dataset = picked.to_dataset([0, 0, 0])
    assert dataset.column_names == [
        *("id", "prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
    ]
    assert dataset["tools"][:] == [[WEATHER, SUM], [SUM], None]
    assert dataset["chat_template_kwargs"][:] == [{}, {"style": "brief"}, {}]
    for name in ("prompt", "chosen", "rejected"):
        expected = [[without_nulls(message) for message in row[name]] for row in ROWS]
        assert dataset[name][:] == expected
    assert _trained(dataset, tmp_path) == scored
    assert _scored(picked.as_pool()) == scored  # as history


def test_every_part_has_tokens() -> None:
    """What tools and calls say is in the tokens: nothing is left out on the way."""
    texts = [
        tokenizer().decode(ids) for row in _scored(PreferencePool.from_rows(ROWS)) for ids in row
    ]
    assert '"city": "Paris", "day": null' in texts[0] and "(c1)" in texts[0]
    assert "<tools>" in texts[0] and '"city": {"type": "string"}' in texts[0]
    assert "Use the tools." in texts[0] and "assistant<call>" in texts[0]
    assert '<call>{"name": "sum", "arguments": {"a": 2, "b": 3}}' in texts[4]
    assert '\\"a\\": 2' in texts[5] and texts[5].endswith("two<|im_end|>\n")
    assert "<tools>" in texts[3] and "<tools>" not in texts[6]


def test_every_source_gives_the_same_pool(tmp_path: Path) -> None:
    pool = PreferencePool.from_rows(ROWS)
    pool.to_jsonl(tmp_path / "pool.jsonl")
    assert list(PreferencePool.load(tmp_path / "pool.jsonl")) == list(pool)
    data = PreferencePool.from_dataset(_as_json(ROWS))
    assert [(i.prompt, i.responses) for i in data] == [(i.prompt, i.responses) for i in pool]
    assert _scored(data) == _scored(pool)
    _as_json(ROWS).save_to_disk(tmp_path / "saved")
    _as_json(ROWS).to_parquet(tmp_path / "pool.parquet")
    for name in ("saved", "pool.parquet"):
        again = PreferencePool.load(tmp_path / name)
        assert list(again) == list(data)


def test_tables_fill_keys_up_with_null_and_the_pool_has_none_of_them(tmp_path: Path) -> None:
    """In Arrow every message has all keys of its column, and every part and call, too."""
    rows = [
        {
            "prompt": [
                {"role": "user", "content": "2 + 3?", "tool_calls": None},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        _call("sum", {"a": 2, "b": 3}, id=None),
                        _call("sum", None, id="x"),
                    ],
                },
            ],
            "chosen": [
                {"role": "assistant", "content": [{"type": "text", "text": "5", "image": None}]}
            ],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "6"}]}],
        }
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pool.parquet")
    for pool in (
        PreferencePool.load(tmp_path / "pool.parquet"),
        PreferencePool.from_dataset(Dataset.from_list(rows)),
    ):
        user, assistant = pool[0].prompt
        assert user == {"role": "user", "content": "2 + 3?"}
        assert "content" not in assistant
        assert assistant["tool_calls"][0] == _call("sum", {"a": 2, "b": 3})
        assert assistant["tool_calls"][1]["function"] == {"name": "sum"}
        assert pool[0].responses[0][0]["content"] == [{"type": "text", "text": "5"}]


def test_tools_of_a_row_yield_to_its_template_arguments(tmp_path: Path) -> None:
    """As in DPOTrainer."""
    row = {**ROWS[2], "tools": [SUM], "chat_template_kwargs": {"tools": [WEATHER]}}
    pool = PreferencePool.from_rows([row])
    assert _scored(pool) == _trained(_as_json([row]), tmp_path)
    assert _picked(pool).to_dataset([0])["tools"][:] == [[WEATHER]]


def test_prompts_with_other_tools_are_other_prompts() -> None:
    rows = [{**ROWS[2], "id": str(n), "tools": tools} for n, tools in enumerate(([SUM], [WEATHER]))]
    pool = PreferencePool.from_rows(rows)
    assert PoolPrompts.of(pool).of_item.tolist() == [0, 1]
    as_text = PreferencePool.from_rows([{**row, "tools": json.dumps(row["tools"])} for row in rows])
    assert as_text.fingerprint() == pool.fingerprint()
    assert (
        pool.fingerprint()
        != PreferencePool.from_rows([rows[0], {**rows[1], "tools": None}]).fingerprint()
    )


@pytest.mark.parametrize("tools", ["{", "{}", 3, ["f"], [{"x": float("nan")}], {"name": "f"}])
def test_what_are_no_tools(tools: Any, tmp_path: Path) -> None:
    with pytest.raises(ActiveDPOError, match="^row 1: the column 'tools': expected a list of JSON"):
        PreferencePool.from_rows([{**ROWS[2], "tools": tools}])
    plain = {"prompt": "a", "chosen": "b", "rejected": "c", "tools": tools}
    assert PreferencePool.from_rows([plain])[0].extra == {"tools": tools}  # TRL does not read it


def test_prompts_to_sample_for_have_tools_and_calls(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    row = {name: ROWS[0][name] for name in ("id", "prompt", "tools")}
    path.write_text(json.dumps(row) + "\n")
    [prompt] = read_prompts(path)
    assert prompt.prompt == [without_nulls(message) for message in row["prompt"]]
    assert own_template_kwargs(prompt.extra) == {"tools": [WEATHER, SUM]}


def test_a_template_that_leaves_tools_out_is_told(caplog: pytest.LogCaptureFixture) -> None:
    blind = tiny_tokenizer(chat=True)
    rows = [ROWS[2], *ROWS[:2]]
    rows[2] = {**rows[2], "chosen": [{**rows[2]["chosen"][0], "content": "Five."}]}
    rows[1] = {**rows[1], "prompt": rows[1]["prompt"][:2]}
    tokenize_pool(PreferencePool.from_rows(rows), blind)
    told = [record.getMessage() for record in caplog.records if "render" in record.getMessage()]
    assert [message.partition(":")[0] for message in told] == [
        "the chat template does not render tools (first",
        "the chat template does not render contents in parts (first",
        "the chat template does not render calls of tools (first",
    ]
    assert "item 'before'" in told[0] and "item 'before'" in told[1] and "item 'calls'" in told[2]
    caplog.clear()
    tokenize_pool(PreferencePool.from_rows(ROWS), tokenizer())
    assert "render" not in caplog.text
