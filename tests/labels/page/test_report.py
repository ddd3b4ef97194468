"""The report: counts, sides, pace and agreement."""

from __future__ import annotations

from pathlib import Path

from activedpo_fast.labels.page.report import report
from activedpo_fast.labels.page.session import Session
from tests.support.labeling import open_labeling, plain_picks, write_picks


def test_report_of_two_labelers(tmp_path: Path) -> None:
    path = write_picks(tmp_path / "picked.jsonl", plain_picks(10))
    given = {
        "ann": [0, 0, 0, 1, 1, 1, 0, 1, "tie", "skip"],
        "ben": [0, 0, 1, 1, 1, 1, 1, 1, "tie", 0],
    }
    for name, labels in given.items():
        one = Session(open_labeling(path, overlap=100), name)
        for pair, label in enumerate(labels):
            side = "left" if one.left(pair) == label else "right"
            choice = label if isinstance(label, str) else side
            one.answer(pair, choice, seconds=pair + 0.5)  # type: ignore[arg-type]
    said = report(open_labeling(path)).splitlines()
    assert said[0] == f"{path}: 10 of 10 pairs have a label"
    ann, ben = (line.split() for line in said[2:4])
    assert said[1].split()[:5] == ["labeler", "0", "1", "tie", "skip"]
    assert (ann[:5], ann[-1]) == (["ann", "4", "4", "1", "1"], "5.0")
    assert (ben[:5], ben[-1]) == (["ben", "3", "6", "1", "0"], "5.0")
    lefts = sum(Session(open_labeling(path), "ann").left(n) == given["ann"][n] for n in range(8))
    assert ann[5:8] == [str(lefts), "of", "8,"]
    # 9 pairs with both: 7 the same. p_e = (4*2 + 4*6 + 1*1) / 81
    assert said[4] == "ann and ben: the same answer to 7 of 9 pairs, Cohen's kappa 0.62"
    # Coincidences: 0 six, 1 ten, tie two; n = 18, D = 4: 1 - 17 * 4 / (324 - 36 - 100 - 4)
    assert said[5] == ("all: 9 pairs with two or more answers, Krippendorff's alpha (nominal) 0.63")
    assert said[6] == "2 pairs are split and count as ties: p2, p6"


def test_report_without_shared_pairs(tmp_path: Path) -> None:
    path = write_picks(tmp_path / "picked.jsonl", plain_picks(3))
    assert report(open_labeling(path)) == f"{path}: 0 of 3 pairs have a label"
    for name in ("ann", "ben"):
        one = Session(open_labeling(path), name)
        pair = one.current()
        assert pair is not None
        one.answer(pair, "skip", seconds=1)
    said = report(open_labeling(path)).splitlines()
    assert said[-1] == "agreement: no pair has answers of two labelers (see --overlap)"
    assert said[2].split() == ["ann", "0", "0", "0", "1", "1.0"]
