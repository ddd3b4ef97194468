"""Any value in the place of any other in what a tool gives back: one clear line, or labels."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.exchange import TOOLS, export_picks, import_answers
from activedpo_fast.selection.picks_jsonl import read_picks
from tests.labels.exchange.answering import fill_in

FIXTURES = Path(__file__).parent / "fixtures"
BATCH = FIXTURES / "batch.jsonl"

_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),  # NaN and infinities too, which Python's JSON has
    st.sampled_from(["", "left", "tie", "\ud800", "\x1b[2J", "\0", "x" * 5000, 10**400]),
)
_values = st.recursive(
    _leaves,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=3,
) | st.just(json.loads("[" * 300 + "]" * 300))


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in inner if isinstance(value, (dict, list)) else ():
        if isinstance(one, (dict, list)):
            yield from _places(one, (*path, key))
        else:
            yield (*path, key)


def _with(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[path[0]] = _with(document[path[0]], path[1:], value)
    return copy


def _answered(tool: str, folder: Path) -> tuple[Path, list[Any]]:
    """Return a file that the tool gives back, and the JSON documents that it holds."""
    exported = folder / f"out{TOOLS[tool].suffix}"
    export_picks(BATCH, tool, exported, seed=None)
    path = fill_in(tool, exported, ["left", "right", "tie", "skip"])
    if path.is_dir():
        path = path / "somebody" / "user_state.json"
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    return path, [json.loads(line) for line in lines]


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool != "csv"])
@settings(max_examples=25)
@given(data=st.data(), value=_values)
def test_one_damaged_value(tool: str, data: st.DataObject, value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, documents = _answered(tool, Path(folder))
        where = data.draw(st.sampled_from(list(_places(documents))[1:]))
        damaged = _with(documents, where, value)
        path.write_text("".join(json.dumps(document) + "\n" for document in damaged))
        aside = Path(folder) / "aside.jsonl"
        labels = Path(folder) / "labels.jsonl"
        try:
            done = import_answers(BATCH, path, tool, labels, set_aside=aside)
        except ActiveDPOError as error:
            assert "\n" not in str(error) and "\x1b" not in str(error)
            assert len(str(error)) < 1000
            return
        found = aside.read_text().splitlines()
        assert len(found) == done.set_aside and all(len(line) < 110_000 for line in found)
        # Never another label than was given, except where the answer itself was replaced.
        others = 0
        for file in done.files.values():
            for given, (_, _, row) in zip((0, 1, "tie", "skip"), read_picks(file), strict=True):
                others += row["label"] not in (None, given)
        assert others <= 1
