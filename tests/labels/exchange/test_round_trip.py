"""Whatever the texts are, they go out and come back as they were, for every tool."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activedpo_fast.labels import FileOracle
from activedpo_fast.labels.exchange import TOOLS, export_picks, import_answers
from activedpo_fast.labels.reading import read_label
from activedpo_fast.selection.picks_jsonl import Pick, read_picks
from activedpo_fast.selection.result import Selection
from tests.labels.exchange.answering import WITHOUT_SKIP, fill_in

_AWKWARD = (
    "=1+1",
    "'",
    "'=x",
    '"a","b"',
    "a\r\nb",
    "\r",
    "\u2028\x85",
    "\x1b[31m",
    "-1",
    "@x",
    ";",
)
_words = st.one_of(
    st.sampled_from(_AWKWARD),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
)
_texts = st.lists(_words, min_size=1, max_size=3).map("".join)
_messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": _texts}),
    min_size=1,
    max_size=2,
)


def _pair(texts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    # Equal texts with another prompt are different pairs, equal pairs are refused.
    return st.tuples(texts, st.lists(texts, min_size=2, max_size=2, unique_by=json.dumps))


_pairs = st.one_of(_pair(_texts), _pair(_messages))


@pytest.mark.parametrize("tool", TOOLS)
@settings(max_examples=20)
@given(
    pairs=st.lists(_pairs, min_size=1, max_size=4),
    data=st.data(),
    seed=st.one_of(st.none(), st.integers()),
)
def test_labels_come_back_to_the_right_response(
    tool: str, pairs: list[Any], data: st.DataObject, seed: int | None
) -> None:
    picks = Selection(
        tuple(
            Pick(f"../{n}", (1, 0), 0.5, n, prompt, (responses[0], responses[1]))
            for n, (prompt, responses) in enumerate(pairs)
        ),
        "random",
    )
    choices = [data.draw(st.sampled_from(["left", "right", "tie", "skip"])) for _ in pairs]
    if tool in WITHOUT_SKIP and set(choices) == {"skip"}:
        choices[0] = "left"
    with tempfile.TemporaryDirectory() as folder:
        batch, output = Path(folder) / "batch.jsonl", Path(folder) / "labels.jsonl"
        exported = Path(folder) / f"out{TOOLS[tool].suffix}"
        picks.to_jsonl(batch)
        export_picks(batch, tool, exported, seed=seed)
        if tool.startswith("potato"):  # the only one whose answers have no texts
            with open(exported / "picks.jsonl", encoding="utf-8") as lines:
                items = [json.loads(line) for line in lines]
            shown = [[item["prompt"], sorted(item["responses"])] for item in items]
            assert shown == [
                [_shown(pick.prompt), sorted(map(_shown, pick.responses))] for pick in picks
            ]
        done = import_answers(batch, fill_in(tool, exported, choices), tool, output)
        assert list(done.files) == ["ann"] and done.set_aside == 0
        rows = read_picks(output)
        assert [pick for _, pick, _ in rows] == list(picks)
        ids = _record_ids(tool, exported)
        for choice, record_id, (_, _, row) in zip(choices, ids, rows, strict=True):
            on_left = int(record_id[-2])
            sides = {"left": on_left, "right": 1 - on_left, "tie": "tie", "skip": "skip"}
            no_answer = choice == "skip" and tool in WITHOUT_SKIP
            assert row["label"] == (None if no_answer else sides[choice])
        if all(row["label"] is not None for _, _, row in rows):
            expected = [read_label(row, "") for _, _, row in rows]
            labels = FileOracle(output).label(picks)
            assert labels == [None if label == "skip" else label for label in expected]


def _shown(text: Any) -> str:
    if isinstance(text, str):
        return text
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in text)


def _record_ids(tool: str, exported: Path) -> list[str]:
    if tool == "label-studio":
        tasks = json.loads((exported / "tasks.json").read_text())
        return [task["data"]["activedpo_id"] for task in tasks]
    if tool == "argilla":
        return [record["id"] for record in json.loads((exported / "records.json").read_text())]
    if tool == "csv":
        import csv

        with open(exported, newline="", encoding="utf-8") as file:
            return [row["id"] for row in csv.DictReader(file)]
    path = exported / "picks.jsonl" if exported.is_dir() else exported
    with open(path, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [row.get("activedpo_id", row.get("id")) for row in rows]
