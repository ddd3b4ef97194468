"""Labelers at work: order, sides, undo, sharing, and what is on disk at every moment."""

from __future__ import annotations

import json
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels import FileOracle, LabelsPending
from activedpo_fast.labels.files import labels_file
from activedpo_fast.labels.labeled_pairs import read_labeled_pairs
from activedpo_fast.labels.page import answers, session
from activedpo_fast.labels.page.session import AlreadyAnswered, Session
from activedpo_fast.labels.reading import read_labels
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.selection.result import Selection
from tests.support.faults import largest_file
from tests.support.labeling import open_labeling, plain_picks, write_picks


def _session(path: Path, labeler: str = "ann", **options: object) -> Session:
    """A fresh start of the command."""
    return Session(open_labeling(path, **options), labeler)


def _answer(one: Session, choice: str = "left", **more: object) -> int:
    pair = one.current()
    assert pair is not None
    one.answer(pair, choice, seconds=2.0, **more)  # type: ignore[arg-type]
    return pair


@pytest.fixture
def picks(tmp_path: Path) -> Path:
    return write_picks(tmp_path / "picked.jsonl", plain_picks(12))


def test_pairs_come_best_first_and_a_new_start_goes_on(picks: Path) -> None:
    assert [_answer(_session(picks)) for _ in range(12)] == list(range(12))
    assert _session(picks).current() is None
    assert _session(picks).progress() == (12, 0, 2.0)


def test_a_label_is_the_position_in_responses_whatever_the_side(tmp_path: Path) -> None:
    path = write_picks(tmp_path / "picked.jsonl", plain_picks(40))
    one = _session(path)
    lefts = [one.left(pair) for pair in range(40)]
    assert 8 < sum(lefts) < 32
    assert lefts == [_session(path).left(pair) for pair in range(40)]
    assert lefts != [_session(path, "ben").left(pair) for pair in range(40)]
    for pair in range(40):
        # The good response is response 0, on whichever side it is.
        assert _answer(one, "left" if lefts[pair] == 0 else "right") == pair
    assert {(a.label, a.left) for a in one.labeling.answers.all()} == {(0, 0), (0, 1)}
    one.labeling.write_labels()
    selection, labels = read_labels(labels_file(path))
    assert labels == [0] * 40
    assert [pick.responses[0] for pick in selection] == [f"Good {n}." for n in range(40)]


def test_every_answer_is_on_disk_with_all_that_was_said(picks: Path) -> None:
    one = _session(picks)
    one.answer(0, "right", seconds=1.2341, strength=3, comment=" clearer\n")
    one.answer(1, "tie", seconds=1, strength=2)
    one.answer(2, "skip", seconds=1)
    entries = [json.loads(line) for line in one.labeling.journal.path.read_text().splitlines()]
    first, tie, skip = (entry for entry in entries if entry["kind"] == "answer")
    time = first.pop("time")
    assert time.endswith("+00:00")
    assert first == {
        "kind": "answer",
        "pair": 0,
        "labeler": "ann",
        "label": 1 - one.left(0),
        "left": one.left(0),
        "seconds": 1.234,
        "strength": 3,
        "comment": "clearer",
    }
    assert (tie["label"], tie["strength"], skip["label"]) == ("tie", None, "skip")


def test_undo_takes_back_one_answer_after_the_other_and_stays_in_the_journal(picks: Path) -> None:
    one = _session(picks)
    for _ in range(3):
        _answer(one)
    undone = one.undo()
    assert undone is not None and (undone.pair, one.current()) == (2, 2)
    undone = _session(picks).undo()  # after another start
    assert undone is not None and undone.pair == 1
    assert [_answer(_session(picks), "right"), _answer(_session(picks), "right")] == [1, 2]
    again = _session(picks)
    assert [a.label == 1 - a.left for a in again.labeling.answers.all()] == [False, True, True]
    kinds = Counter(json.loads(s)["kind"] for s in again.labeling.journal.path.open())
    assert (kinds["answer"], kinds["undo"]) == (5, 2)
    for _ in range(3):
        assert again.undo() is not None
    assert again.undo() is None


def test_two_tabs_do_not_overwrite_each_other(picks: Path) -> None:
    tab, other = _session(picks), _session(picks)
    assert tab.current() == other.current() == 0
    tab.answer(0, "left", seconds=1)
    with pytest.raises(AlreadyAnswered, match="another tab"):
        other.answer(0, "right", seconds=1)
    assert other.current() == 1
    assert [a.label for a in other.labeling.answers.all()] == [tab.left(0)]


def test_labelers_at_the_same_time_get_different_pairs(picks: Path) -> None:
    ann, ben = _session(picks, "ann"), _session(picks, "ben")
    assert (ann.current(), ben.current()) == (0, 1)
    found = {"ann": [_answer(ann)], "ben": [_answer(ben)]}
    while ann.current() is not None:
        found["ann"].append(_answer(ann))
        if ben.current() is not None:
            found["ben"].append(_answer(ben))
    assert sorted(found["ann"] + found["ben"]) == list(range(12))
    assert len(found["ben"]) == 6
    # Two who look at the last pair: both answers count.
    assert ann.undo() is not None
    assert ben.current() == ann.current() == found["ann"][-1]


def test_a_pair_that_was_left_open_goes_to_others_after_a_while(
    picks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _session(picks, "ann").current() == 0
    assert _session(picks, "ben").current() == 1
    started = answers.now()
    monkeypatch.setattr(session, "now", lambda: started + timedelta(minutes=16))
    assert _session(picks, "cleo").current() == 0


@pytest.mark.parametrize(("overlap", "shared"), [(0, 0), (25, 3), (30, 4), (100, 12)])
def test_overlap_goes_to_every_labeler(picks: Path, overlap: float, shared: int) -> None:
    for labeler in ("ann", "ben", "cleo"):
        one = _session(picks, labeler, overlap=overlap if labeler == "ann" else None)
        if labeler == "ann":  # she answers half of them
            for _ in range(6):
                _answer(one)
        while one.current() is not None:
            _answer(one)
        assert one.progress().done == (12 if labeler == "ann" else shared)
    votes = one.labeling.answers.votes()
    assert sorted(map(len, votes)) == [1] * (12 - shared) + [3] * shared


def test_settings_that_all_labelers_share_stay(picks: Path) -> None:
    assert Session(open_labeling(picks, overlap=20.0, seed=3), "ann").current() == 0
    assert open_labeling(picks).overlap == 20.0
    assert open_labeling(picks, overlap=20.0, seed=3).seed == 3
    with pytest.raises(ActiveDPOError, match="--overlap 30: this labeling began with --overlap 20"):
        open_labeling(picks, overlap=30.0)
    with pytest.raises(ActiveDPOError, match="--seed 0: this labeling began with --seed 3"):
        open_labeling(picks, seed=0)


@pytest.mark.parametrize("overlap", [-1.0, 101.0, float("nan")])
def test_an_overlap_that_is_no_percentage_begins_nothing(picks: Path, overlap: float) -> None:
    with pytest.raises(ActiveDPOError, match="--overlap .*: a percentage from 0 to 100"):
        _session(picks, overlap=overlap)
    _answer(_session(picks))


def test_two_first_starts_with_different_settings(picks: Path) -> None:
    ann, ben = _session(picks, "ann", overlap=50.0), _session(picks, "ben")
    assert ann.current() == 0
    with pytest.raises(ActiveDPOError, match="began with other settings: run the command again"):
        ben.current()
    assert _session(picks, "ben").labeling.overlap == 50.0


def test_files_that_do_not_belong_together_are_refused(picks: Path, tmp_path: Path) -> None:
    one = _session(picks)
    for _ in range(3):
        _answer(one)
    before = labels_file(picks).with_name("labels-picked.journal.jsonl").read_bytes()
    for count in (11, 1):
        write_picks(picks, plain_picks(count))
        with pytest.raises(ActiveDPOError, match="has answers to other pairs"):
            open_labeling(picks)
    assert labels_file(picks).with_name("labels-picked.journal.jsonl").read_bytes() == before
    other = write_picks(tmp_path / "other.jsonl", plain_picks(2))
    write_picks(labels_file(other), plain_picks(2), label=1)  # somebody's work
    with pytest.raises(ActiveDPOError, match="was not written by this command"):
        open_labeling(other)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ActiveDPOError, match="no pairs to label"):
        open_labeling(tmp_path / "empty.jsonl")


def test_a_journal_that_was_edited_is_one_clear_error(picks: Path) -> None:
    labeling = _session(picks).labeling
    _answer(_session(picks))
    with labeling.journal.path.open("a") as file:
        file.write('{"kind": "undo", "pair": 3, "labeler": "ann", "time": "x"}\n')
    with pytest.raises(ActiveDPOError, match="not understood.*put the file back"):
        open_labeling(picks)


_ENTRY = {
    **{"kind": "answer", "pair": 1, "labeler": "ann", "label": 0, "left": 0, "seconds": 1.0},
    **{"time": "2026-01-01T00:00:00+00:00", "strength": None, "comment": ""},
}


@pytest.mark.parametrize(
    "changed",
    [
        *({"pair": pair} for pair in (-1, 12, "1", 1.0, True, None)),
        *({"label": label} for label in (2, "left", None, True, [0])),
        *({"labeler": name} for name in ("", 3, None, "a\x1b[31m")),
        *({"seconds": seconds} for seconds in (-1.0, "1", None, float("nan"))),
        {"time": "no"},
        {"time": 5},
        {"left": 2},
        {"strength": 4},
        {"comment": None},
        {"kind": "shown", "time": "2026-01-01T00:00:00"},
        {"kind": "shown", "pair": 12},
    ],
    ids=str,
)
def test_an_entry_that_the_page_does_not_write_never_becomes_a_label(
    picks: Path, changed: dict
) -> None:
    labeling = _session(picks).labeling
    _answer(_session(picks))
    with labeling.journal.path.open("a") as file:
        file.write(json.dumps({**_ENTRY, **changed}) + "\n")
    with pytest.raises(ActiveDPOError, match="not understood.*put the file back"):
        open_labeling(picks)


@pytest.mark.parametrize(
    "changed", [{"seed": "x"}, {"seed": None}, {"overlap": 101}, {"overlap": "x"}, {"pairs": 1}]
)
def test_a_journal_with_an_edited_head_is_one_clear_error(picks: Path, changed: dict) -> None:
    labeling = _session(picks).labeling
    _answer(_session(picks))
    head, *rest = labeling.journal.path.read_text().splitlines(keepends=True)
    labeling.journal.path.write_text(
        json.dumps({**json.loads(head), **changed}) + "\n" + "".join(rest)
    )
    with pytest.raises(ActiveDPOError, match="not understood"):
        open_labeling(picks)


@pytest.mark.parametrize("name", ["", " ", "a\nb", "x" * 65])
def test_bad_names_are_refused(picks: Path, name: str) -> None:
    with pytest.raises(ActiveDPOError, match="1 to 64 characters"):
        _session(picks, name)


def test_pairs_that_the_file_labels_are_not_asked(tmp_path: Path) -> None:
    path = tmp_path / "picked.jsonl"
    lines = write_picks(path, plain_picks(4)).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    records[0]["label"], records[2]["label"] = 1, "tie"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    one = _session(path)
    assert [_answer(one, "skip"), _answer(one, "tie"), one.current()] == [1, 3, None]
    one.labeling.write_labels()
    written = [json.loads(line) for line in labels_file(path).open()]
    assert [record["label"] for record in written] == [1, "skip", "tie", "tie"]


def test_the_labels_file_is_what_the_loop_waits_for(tmp_path: Path) -> None:
    selection = Selection(tuple(plain_picks(3)), "activedpo")
    oracle = FileOracle(tmp_path, via="page")
    with pytest.raises(LabelsPending, match="3 of 3 pairs.*activedpo label .*to_label-.*again"):
        oracle.label(selection)
    to_label, labels = oracle.paths(selection)
    one = _session(to_label)
    _answer(one, "left" if one.left(0) == 1 else "right")
    one.labeling.write_labels()
    with pytest.raises(LabelsPending, match=f"2 of 3 pairs.*activedpo label {to_label}"):
        oracle.label(selection)
    _answer(one, "tie")
    _answer(one, "left" if one.left(2) == 0 else "right")
    one.labeling.write_labels()
    assert oracle.label(selection) == [1, None, 0]
    # The next selection gets the pairs in their place in V.
    pool = PreferencePool.from_rows(
        [
            {"id": p.id, "prompt": p.prompt, "responses": [p.responses[0], "?", p.responses[1]]}
            for p in selection
        ]
    )
    decided, asked = read_labeled_pairs(labels, pool)
    assert (decided.tolist(), asked.tolist()) == ([[0, 2], [6, 8]], [[3, 5]])


def test_several_answers_become_one_label_with_a_weight(tmp_path: Path) -> None:
    path = write_picks(tmp_path / "picked.jsonl", plain_picks(6))
    given = {"ann": [0, 0, 1, 1, 0, 1], "ben": [0, 0, 1, 1, 1, 1], "cleo": [0, 1, 0, 1, 0, 1]}
    for labeler, labels in given.items():
        one = _session(path, labeler, overlap=100)
        for pair, label in enumerate(labels):
            one.answer(pair, "left" if one.left(pair) == label else "right", seconds=1)
    for combine in ("majority", "dawid-skene"):
        labeling = open_labeling(path, combine=combine)
        labeling.write_labels()
        records = [json.loads(line) for line in labels_file(path).open()]
        assert [record["label"] for record in records] == [0, 0, 1, 1, 0, 1]
        assert [len(record["answers"]) for record in records] == [3] * 6
        weights = [record["weight"] for record in records]
        assert weights[0] == pytest.approx(1, abs=0.01) and all(0.5 < w <= 1 for w in weights)
        if combine == "majority":
            assert weights == pytest.approx([1, 2 / 3, 2 / 3, 1, 2 / 3, 1], abs=1e-6)


def test_an_answer_that_just_fits_on_the_disk_is_saved(picks: Path) -> None:
    one = _session(picks)
    _answer(one)
    journal = one.labeling.journal.path
    size, entry = journal.stat().st_size, len(journal.read_text().splitlines()[2])
    assert one.current() == 1
    with largest_file(size + entry + 1):  # not what is shown next
        assert one.answer(1, "left", seconds=2.0) == 2
        with pytest.raises(ActiveDPOError, match="file too large"):
            one.answer(2, "left", seconds=2.0)
        with pytest.raises(ActiveDPOError, match="file too large"):
            one.undo()
    assert [given.pair for given in _session(picks).labeling.answers.all()] == [0, 1]
    assert _answer(one) == 2


def test_a_start_that_nobody_answered_in_can_be_repeated(picks: Path) -> None:
    for _ in range(2):
        labeling = _session(picks).labeling
        labeling.write_labels()
        assert not labels_file(picks).exists()
    session = _session(picks)
    _answer(session)
    session.labeling.write_labels()
    assert labels_file(picks).exists()
    _answer(_session(picks))


def test_labels_that_the_picks_have_are_written_without_an_answer(picks: Path) -> None:
    write_picks(picks, plain_picks(2), label=1)
    for _ in range(2):
        open_labeling(picks).write_labels()
        lines = labels_file(picks).read_text().splitlines()
        assert [json.loads(line)["label"] for line in lines] == [1, 1]
