"""Selections as files and as data sets."""

from __future__ import annotations

import json

import numpy
import pytest

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.reading import by_preference, read_labels, read_pending
from activedpo_fast.selection.picks_jsonl import Pick
from activedpo_fast.selection.result import Selection

STRINGS = Selection(
    (
        Pick("a", (0, 2), 1.5, 0, "Say hi.", ("Hi!", "Ahoy\u2028there")),
        Pick("b", (1, 2), 0.1 + 0.2, 1, "Zählen?", ("eins", "zwei\nzwei")),
        Pick("a", (0, 1), 0.25, 2, "Say hi.", ("Hi!", "Hello")),
    ),
    "activedpo",
)


def message(role, content):
    return [{"role": role, "content": content}]


CHAT = Selection(
    (
        Pick(
            "c",
            (0, 1),
            2.0,
            0,
            message("user", "hi"),
            (message("assistant", "hello"), message("assistant", "go away")),
        ),
        Pick(
            "d",
            (0, 1),
            1.0,
            1,
            message("user", "bye"),
            (message("assistant", "ciao"), message("assistant", "no")),
        ),
    ),
    "random",
)


@pytest.mark.parametrize("selection", [STRINGS, CHAT])
def test_jsonl_round_trip(selection, tmp_path):
    path = tmp_path / "picked.jsonl"
    selection.to_jsonl(path)
    assert Selection.from_jsonl(path, strategy=selection.strategy) == selection
    assert Selection.from_jsonl(path).strategy == "unknown"
    records = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert len(records) == len(selection)
    assert list(records[0]) == ["id", "pair", "score", "rank", "prompt", "responses"]
    assert [p.name for p in tmp_path.iterdir()] == ["picked.jsonl"]


def test_it_is_a_sequence():
    assert len(STRINGS) == 3 and STRINGS[1].id == "b" and STRINGS[-1].rank == 2
    assert STRINGS[:2] == Selection(STRINGS.picks[:2], "activedpo")
    assert [pick.id for pick in STRINGS] == ["a", "b", "a"]


def test_a_score_that_json_cannot_hold_leaves_no_file(tmp_path):
    bad = Selection((Pick("a", (0, 1), float("nan"), 0, "p", ("x", "y")),), "s")
    with pytest.raises(ActiveDPOError, match="score is nan"):
        bad.to_jsonl(tmp_path / "picked.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_dataset_of_strings():
    dataset = STRINGS.to_dataset([1, None, 0])
    assert dataset.column_names == ["id", "prompt", "chosen", "rejected"]
    assert dataset.to_list() == [
        {"id": "a", "prompt": "Say hi.", "chosen": "Ahoy\u2028there", "rejected": "Hi!"},
        {"id": "a", "prompt": "Say hi.", "chosen": "Hi!", "rejected": "Hello"},
    ]


def test_dataset_of_chat_messages():
    dataset = CHAT.to_dataset([0, 1])
    assert dataset[1] == {
        "id": "d",
        "prompt": message("user", "bye"),
        "chosen": message("assistant", "no"),
        "rejected": message("assistant", "ciao"),
    }


def test_dataset_without_any_preference_has_its_columns():
    dataset = STRINGS.to_dataset([None, None, None])
    assert len(dataset) == 0
    assert dataset.column_names == ["id", "prompt", "chosen", "rejected"]


@pytest.mark.parametrize(
    "labels, fault",
    [
        ([1, 0], "2 labels for 3 picks"),
        ([1, True, 0], r"label 1 \(id 'b'\).*True"),
        ([1, 2, 0], "not 2"),
        ([1, -1, 0], "not -1"),
        ([1, "0", 0], "not '0'"),
        ([1, 1.0, 0], "not 1.0"),
        ([numpy.bool_(True), 0, 0], "label 0"),
    ],
)
def test_labels_that_are_none(labels, fault):
    with pytest.raises(ActiveDPOError, match=fault):
        STRINGS.to_dataset(labels)


def test_integers_of_numpy_are_labels():
    assert len(STRINGS.to_dataset(list(numpy.array([0, 1, 1])))) == 3


def test_strings_and_messages_do_not_mix():
    with pytest.raises(ActiveDPOError, match="pick 3 .*mixed"):
        Selection(STRINGS.picks + CHAT.picks, "s").to_dataset([0] * 5)


@pytest.mark.parametrize("selection", [STRINGS, CHAT])
def test_as_pool_has_one_item_per_pick(selection):
    pool = selection.as_pool()
    assert len(pool) == len(selection) and len(set(pool.ids)) == len(pool)
    assert pool.pairs().tolist() == [[2 * i, 2 * i + 1] for i in range(len(selection))]
    for item, pick in zip(pool, selection, strict=True):
        assert (item.prompt, item.responses) == (pick.prompt, pick.responses)


def labeled_file(tmp_path, labels, **first_line):
    path = tmp_path / "labels.jsonl"
    STRINGS.to_jsonl(path)
    records = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    for record, label in zip(records, labels, strict=True):
        record["label"] = label
    records[0].update(first_line)
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_read_labels(tmp_path):
    selection, labels = read_labels(labeled_file(tmp_path, [1, "skip", 0], annotator="ann"))
    assert selection.picks == STRINGS.picks and labels == [1, None, 0]


def test_null_or_missing_is_not_labeled_yet_and_skip_or_tie_is_an_answer(tmp_path, caplog):
    caplog.set_level("INFO", logger="activedpo_fast")
    path = labeled_file(tmp_path, [None, "tie", 1.0])  # tables write 1.0 beside null
    selection, labels = read_labels(path)
    assert selection.picks == STRINGS.picks[1:] and labels == [None, 1]
    assert [r.getMessage() for r in caplog.records] == [
        f"{path}: 1 of 3 pairs have no label yet and are left out"
    ]
    assert read_pending(path).picks == STRINGS.picks[:1]
    assert by_preference(selection, labels) == (
        Selection(STRINGS.picks[2:], "unknown"),
        Selection(STRINGS.picks[1:2], "unknown"),
    )
    for wrong in ([1, None, 0], [1], [0, "skip"], [0, 2], [True, None]):
        with pytest.raises(ActiveDPOError, match="label"):
            by_preference(selection, wrong)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    del records[0]["label"]
    path.write_text("\n".join(map(json.dumps, records)))
    assert read_labels(path) == (selection, labels)
    assert read_pending(path).picks == STRINGS.picks[:1]


def test_nulls_in_a_fully_answered_file_are_no_preference_and_logged(tmp_path, caplog):
    caplog.set_level("INFO", logger="activedpo_fast")
    path = labeled_file(tmp_path, [None, 0, None])
    assert read_labels(path, all_answered=True) == (
        Selection(STRINGS.picks, "unknown"),
        [None, 0, None],
    )
    (record,) = caplog.records
    assert '2 labels are null, which is read as "skip"' in record.getMessage()
    path.unlink()
    caplog.clear()
    read_labels(labeled_file(tmp_path, ["skip", 0, 1]), all_answered=True)
    assert not caplog.records


def test_lines_may_be_reordered_dropped_blank_and_begin_with_a_byte_order_mark(tmp_path):
    path = labeled_file(tmp_path, [1, "skip", 0])
    lines = path.read_text().split("\n")
    path.write_text("\ufeff" + lines[2] + "\r\n\n" + lines[0] + "\n", newline="")
    selection, labels = read_labels(path)
    assert [pick.rank for pick in selection] == [2, 0] and labels == [0, 1]


def test_the_same_pair_with_other_responses_is_another_round(tmp_path):
    path = labeled_file(tmp_path, [1, 0, 1], pair=[0, 1])
    assert len(Selection.from_jsonl(path)) == 3


@pytest.mark.parametrize("label", [2, True, "1", 0.5, [0], "Skip"])
def test_bad_label_in_a_file(tmp_path, label):
    with pytest.raises(ActiveDPOError, match="line 2: 'label' must be 0, 1, .skip., .tie. or null"):
        read_labels(labeled_file(tmp_path, [1, label, 0]))


@pytest.mark.parametrize(
    "change, fault",
    [
        (dict(id=3), "'id'"),
        (dict(pair=[0]), "'pair'"),
        (dict(pair=[1, 1]), "'pair'"),
        (dict(pair=[0, -1]), "'pair'"),
        (dict(pair=[False, True]), "'pair'"),
        (dict(pair="01"), "'pair'"),
        (dict(score="1"), "'score'"),
        (dict(score=True), "'score'"),
        (dict(score=float("nan")), "'score'"),
        (dict(score=10**400), "'score'"),
        (dict(score=None), "'score'"),
        (dict(rank=1.0), "'rank'"),
        (dict(rank=-1), "'rank'"),
        (dict(prompt=None), "'prompt'"),
        (dict(prompt=[]), "'prompt'"),
        (dict(prompt=[{"role": "user"}]), "'prompt'"),
        (dict(responses=["one"]), "'responses'"),
        (dict(responses="ab"), "'responses'"),
        (dict(responses=["a", 1]), "'responses'"),
        (dict(responses=["a", [{"role": "assistant", "content": "b"}]]), "'responses'"),
    ],
)
def test_bad_field_in_a_file(tmp_path, change, fault):
    path = labeled_file(tmp_path, [1, 0, 1], **change)
    with pytest.raises(ActiveDPOError, match=f"labels.jsonl, line 1: {fault}") as caught:
        Selection.from_jsonl(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, fault",
    [
        (b"{}\n", "line 1: no 'id', 'pair', 'score', 'rank', 'prompt', 'responses'"),
        (b"[1]\n", "line 1: not a JSON object"),
        (b"\n{nope}\n", "line 2: broken JSON"),
        (b'{"id": "\xff"}', "not UTF-8"),
    ],
)
def test_broken_files(tmp_path, content, fault):
    path = tmp_path / "picked.jsonl"
    path.write_bytes(content)
    with pytest.raises(ActiveDPOError, match=fault):
        Selection.from_jsonl(path)


def test_no_labels_no_file_and_duplicate_lines(tmp_path):
    path = tmp_path / "picked.jsonl"
    with pytest.raises(ActiveDPOError, match="picked.jsonl: no such file"):
        Selection.from_jsonl(path)
    STRINGS.to_jsonl(path)
    with pytest.raises(ActiveDPOError, match="none of its 3 lines has a 'label' yet"):
        read_labels(path)
    path.write_text(path.read_text() + path.read_text().split("\n")[1] + "\n")
    with pytest.raises(ActiveDPOError, match=r"line 4: pair \[1, 2\] of id 'b' .* on line 2"):
        Selection.from_jsonl(path)
