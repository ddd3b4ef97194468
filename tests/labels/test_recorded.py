"""Recorded preferences: hidden in the pool, revealed for picks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels import RecordedOracle
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.selection.picks_jsonl import Pick
from activedpo_fast.selection.result import Selection

ROWS = [
    {"prompt": f"prompt {n}", "chosen": f" good {n}", "rejected": f" bad {n}", "topic": n % 2}
    for n in range(40)
]


def _all(pool: PreferencePool, *, swapped: bool = False) -> Selection:
    order = (1, 0) if swapped else (0, 1)
    return Selection(
        tuple(
            Pick(item.id, order, 0.0, n, item.prompt, tuple(item.responses[o] for o in order))
            for n, item in enumerate(pool)
        ),
        "random",
    )


def test_the_chosen_response_is_revealed_in_either_order() -> None:
    oracle = RecordedOracle(ROWS)
    for swapped in (False, True):
        picked = _all(oracle.pool, swapped=swapped)
        for row in picked.to_dataset(oracle.label(picked)):
            assert row["chosen"].startswith(" good") and row["rejected"].startswith(" bad")


def test_the_pool_does_not_show_which_response_was_chosen() -> None:
    oracle = RecordedOracle(ROWS)
    places = Counter(item.responses[0].startswith(" good") for item in oracle.pool)
    assert 10 <= places[True] <= 30
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]
    other = RecordedOracle(swapped)
    assert list(other.pool) == list(oracle.pool)  # the ids, too
    assert other.preferences != oracle.preferences
    assert {tuple(item.extra) for item in oracle.pool} == {("topic",)}


def test_every_source_reads_the_same(tmp_path: Path) -> None:
    chat = [
        {
            "id": f"c{n}",
            "prompt": [{"role": "user", "content": f"prompt {n}"}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        }
        for n in range(6)
    ]
    for rows in (ROWS, chat):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        dataset = datasets.Dataset.from_list(rows)
        dataset.save_to_disk(str(tmp_path / "saved"))
        dataset.to_parquet(str(tmp_path / "rows.parquet"))
        sources = [rows, path, str(path), dataset, tmp_path / "saved", tmp_path / "rows.parquet"]
        found = [RecordedOracle(source) for source in sources]
        assert len({oracle.preferences for oracle in found}) == 1
        picked = _all(found[0].pool)
        assert len({tuple(oracle.label(picked)) for oracle in found}) == 1


def test_rows_without_a_pair_of_their_own_are_left_out(caplog: Any) -> None:
    first = ROWS[0]
    opposite = {**first, "chosen": first["rejected"], "rejected": first["chosen"], "id": "other"}
    same = {**ROWS[1], "rejected": ROWS[1]["chosen"]}
    oracle = RecordedOracle([*ROWS, dict(first), dict(first), opposite, same])
    assert oracle.preferences == RecordedOracle(ROWS).preferences
    assert "left out 1 rows whose responses are the same, 2 that repeat" in caplog.text
    assert "1 that repeat one with the opposite preference" in caplog.text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there are no pairs"),
        ([{"prompt": "p", "chosen": "a", "rejected": "a"}], "there are no pairs"),
        ([{"prompt": "p", "responses": ["a", "b"]}], "row 1: .* 'chosen' and 'rejected'"),
        ([{"prompt": "p", "chosen": "a", "rejected": None}], "row 1: .*'rejected'"),
        ([{"prompt": "p", "chosen": "a", "rejected": " "}], "row 1: response 2 is empty"),
        ([ROWS[0], {"chosen": "a", "rejected": "b"}], "row 2: missing column 'prompt'"),
        ([ROWS[0], "x"], "row 2: recorded preferences"),
        ([{**ROWS[0], "id": 1}, {**ROWS[1], "id": 1}], "row 2: id '1' is already that of row 1"),
        ("none.jsonl", "none.jsonl: no such file"),
        (5, "expected a path, .* got int"),
    ],
)
def test_bad_sources_are_refused_by_row(rows: Any, message: str) -> None:
    with pytest.raises(ActiveDPOError, match=message):
        RecordedOracle(rows)


def test_picks_of_another_pool_are_refused() -> None:
    oracle = RecordedOracle(ROWS)
    item = oracle.pool[0]
    for pick in (
        Pick("unknown", (0, 1), 0.0, 0, item.prompt, item.responses),
        Pick(item.id, (0, 1), 0.0, 0, "another prompt", item.responses),
        Pick(item.id, (0, 1), 0.0, 0, item.prompt, (item.responses[0], " new")),
    ):
        with pytest.raises(ActiveDPOError, match="has no recorded preference"):
            oracle.label(Selection((pick,), "random"))


def test_a_pool_is_not_a_source() -> None:
    pool = RecordedOracle(ROWS).pool
    with pytest.raises(ActiveDPOError, match="does not say which response is preferred"):
        RecordedOracle(pool)  # type: ignore[arg-type]
