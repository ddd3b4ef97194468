"""Any value in the place of any other in what a tool gives back: one clear line, or labels."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.exchange import TOOLS, export_picks, import_answers
from activedpo_fast.selection.picks_jsonl import read_picks
from tests.labels.exchange.answering import fill_in
from tests.support.damage import examples, places, values, with_value

FIXTURES = Path(__file__).parent / "fixtures"
BATCH = FIXTURES / "batch.jsonl"


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
@examples(25)
@given(data=st.data(), value=values)
def test_one_damaged_value(tool: str, data: st.DataObject, value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, documents = _answered(tool, Path(folder))
        where = data.draw(st.sampled_from(list(places(documents))[1:]))
        damaged = with_value(documents, where, value)
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
