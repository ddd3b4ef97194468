"""Files that the tools' own code wrote (see `tools/` and `test_tools.py`) become labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from activedpo_fast import read_labels, read_pending
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.combine import COMBINERS
from activedpo_fast.labels.exchange import export_picks, import_answers
from activedpo_fast.selection.picks_jsonl import read_picks

FIXTURES = Path(__file__).parent / "fixtures"
BATCH = FIXTURES / "batch.jsonl"
# In the exported files, response 1 is on the left, except in the second pair.
ANN, BEN = "00000000-0000-0000-0000-000000000001", "00000000-0000-0000-0000-000000000002"


def _labels(path: Path) -> list[Any]:
    return [record["label"] for _, _, record in read_picks(path)]


@pytest.mark.parametrize(
    ("tool", "file", "expected"),
    [
        ("label-studio", "label_studio.json", {"1": [1, "tie", "skip", 0], "2": [0, "skip", 1]}),
        # JSON_MIN leaves out annotations that were skipped with Label Studio's button.
        ("label-studio", "label_studio_min.json", {"1": [1, "tie", "skip", 0], "2": [0, None, 1]}),
        ("argilla", "argilla.json", {ANN: [1, "tie", "skip", 0], BEN: [0, "skip"]}),
        ("potato", "potato", {"ann": [1, "tie", "skip"], "ben": [0, 0]}),
        ("potato-scale", "potato_scale", {"ann": [1, "tie", 0]}),
        ("potato", "potato_scale/ann/user_state.json", {"ann": [1, "tie", 0]}),
        ("distilabel", "distilabel.jsonl", {"judge-1": [1, "tie", None, 0]}),
    ],
)
def test_labels(tool: str, file: str, expected: dict[str, list[Any]], tmp_path: Path) -> None:
    done = import_answers(BATCH, FIXTURES / file, tool, tmp_path / "labels.jsonl")
    found = {labeler: _labels(path) for labeler, path in done.files.items()}
    assert found == {name: [*some, *[None] * (4 - len(some))] for name, some in expected.items()}
    names = {path.name for path in done.files.values()}
    if len(expected) == 1:
        assert names == {"labels.jsonl"}
    else:
        assert names == {f"labels-{name}.jsonl" for name in expected}
    for path in done.files.values():
        answered, labels = read_labels(path)
        assert len(answered) == len(labels) == 4 - len(read_pending(path))


@pytest.mark.parametrize("combine", ["majority", "dawid-skene"])
def test_several_labelers_answers_become_one_label(combine: str, tmp_path: Path) -> None:
    """The labelers answer 1, tie, skip, 0 and 0, skip, 1, nothing."""
    output = tmp_path / "labels.jsonl"
    done = import_answers(
        BATCH, FIXTURES / "label_studio.json", "label-studio", output, combine=combine
    )
    assert set(done.files.values()) == {output} and list(tmp_path.iterdir()) == [output]
    rows = [record for _, _, record in read_picks(output)]
    given = [{a["labeler"]: a["label"] for a in row["answers"]} for row in rows]
    assert given == [{"1": 1, "2": 0}, {"1": "tie", "2": "skip"}, {"1": "skip", "2": 1}, {"1": 0}]
    combined = COMBINERS[combine](given)
    assert done.combined is not None and done.combined.total() == 4
    assert [(row["label"], row["weight"]) for row in rows] == [
        (found.label, round(found.weight, 6)) for found in combined if found is not None
    ]
    preferences = [row["label"] if row["label"] in (0, 1) else None for row in rows]
    assert read_labels(output)[1] == preferences


def test_what_comes_with_an_answer_is_kept(tmp_path: Path) -> None:
    def first(tool: str, file: str) -> dict[str, Any]:
        done = import_answers(BATCH, FIXTURES / file, tool, tmp_path / f"{tool}.jsonl")
        record = read_picks(min(done.files.values()))[0][2]
        return {name: record[name] for name in record if name not in own}

    own = json.loads(BATCH.read_text().split("\n")[0])
    comment = "=1+1 said \u2028 ann"
    answer = {"label": 1, "labeler": "1", "seconds": 4.25, "comment": comment}
    assert first("label-studio", "label_studio.json") == answer
    answer = {"label": 1, "labeler": ANN, "comment": "=1+1", "strength": 2}
    assert first("argilla", "argilla.json") == answer
    assert first("potato", "potato") == {"label": 1, "labeler": "ann", "comment": "=1+1"}
    assert first("potato-scale", "potato_scale") == {"label": 1, "labeler": "ann", "strength": 2}
    rationales = {"comment": "left: to the point\nright: wrong"}
    assert first("distilabel", "distilabel.jsonl") == {
        "label": 1,
        "labeler": "judge-1",
        **rationales,
    }


def test_the_tools_read_what_is_exported_today(tmp_path: Path) -> None:
    """The fixtures were made from exports that are still written the same."""
    for tool in ("label-studio", "argilla"):
        export_picks(BATCH, tool, tmp_path / tool)
    tasks = json.loads((tmp_path / "label-studio" / "tasks.json").read_text())
    exported = json.loads((FIXTURES / "label_studio.json").read_text())
    assert [task["data"] for task in tasks] == [task["data"] for task in exported]
    records = json.loads((tmp_path / "argilla" / "records.json").read_text())
    nested = json.loads((FIXTURES / "argilla_nested.json").read_text())
    for name in ("id", "fields", "metadata"):
        assert [record[name] for record in records] == [record[name] for record in nested]


def test_argillas_nested_records_do_not_tell_drafts_from_answers(tmp_path: Path) -> None:
    with pytest.raises(ActiveDPOError, match=r"record 1: the status .*to_list\(flatten=True\)"):
        nested = FIXTURES / "argilla_nested.json"
        import_answers(BATCH, nested, "argilla", tmp_path / "labels.jsonl")


def test_potatos_own_shuffling_is_undone(tmp_path: Path) -> None:
    """With `randomize_order` Potato shows each annotator the responses in an order of its own."""
    state = json.loads((FIXTURES / "potato" / "ann" / "user_state.json").read_text())
    first = next(iter(state["instance_id_to_label_to_value"]))
    state["instance_id_to_presentation_order"] = {first: {"better": [1, 0]}}
    state["instance_id_to_behavioral_data"] = {first: {"total_time_ms": 2500}}
    (tmp_path / "user_state.json").write_text(json.dumps(state))
    output = tmp_path / "labels.jsonl"
    import_answers(BATCH, tmp_path / "user_state.json", "potato", output)
    assert _labels(output) == [0, "tie", "skip", None]
    assert read_picks(output)[0][2]["seconds"] == 2.5
    state["instance_id_to_presentation_order"] = {first: {"better": [0]}}
    (tmp_path / "user_state.json").write_text(json.dumps(state))
    with pytest.raises(ActiveDPOError, match=r"the order \[0\] of its responses is unknown"):
        import_answers(BATCH, tmp_path / "user_state.json", "potato", output)


def test_the_older_form_of_arena_rows(tmp_path: Path) -> None:
    """Rows as in lmsys/chatbot_arena_conversations: other names, contents that are texts."""
    exported = tmp_path / "rows.jsonl"
    export_picks(BATCH, "lmarena", exported)
    with open(exported, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    winners = ("model_a", "tie (bothbad)", "tie", "model_b")
    for row, winner in zip(rows, winners, strict=True):
        row |= {"question_id": row.pop("id"), "winner": winner, "judge": "arena_user_9"}
        for side in ("conversation_a", "conversation_b"):
            row[side] = [
                {"role": message["role"], "content": message["content"][0]["text"]}
                for message in row[side]
            ]
    exported.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = import_answers(BATCH, exported, "lmarena", tmp_path / "labels.jsonl")
    assert _labels(done.files["arena_user_9"]) == [1, "tie", "tie", 0]
    comments = [record.get("comment") for _, _, record in read_picks(tmp_path / "labels.jsonl")]
    assert comments == [None, "both bad", None, None]
