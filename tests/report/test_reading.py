"""Reading runs: complete, unfinished, broken, and labeled by people."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from activedpo_fast._files import read_checked_json, write_checked_json
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.report.compare import by_seed
from activedpo_fast.report.labels import agreement, label_counts, longer_preferred, pace
from activedpo_fast.report.picks import extremes, measures, prompts_picked
from activedpo_fast.report.reading import read_runs
from activedpo_fast.report.tables import labels_table, rounds_table

Copy = Callable[..., Path]


def test_a_complete_run(runs: tuple[Path, Path]) -> None:
    (run,) = read_runs([runs[0]])
    assert run.missing == []
    assert (run.name, run.strategy, run.metrics) == ("activedpo", "activedpo", ["norm"])
    assert [record.round for record in run.records] == [-1, 0, 1]
    assert [len(data.picks) for data in run.rounds] == [3, 3]
    assert run.tokens is not None and len(run.tokens) == 2
    assert all(stages["select"].backward > 0 for stages in run.tokens)
    assert all(0 < record.training["steps"] <= 2 for record in run.records[1:])
    # No GPU here, so none is named and no energy is made up.
    assert {(r.gpu, r.gpu_seconds, str(r.joules)) for r in run.records} == {("", None, "{}")}
    assert [row[0] for row in rounds_table(run)] == ["round", "start", "0", "1"]
    assert not {"GPU s", "GPU kJ"} & set(rounds_table(run)[0])


def test_picks_beside_the_pool(runs: tuple[Path, Path]) -> None:
    activedpo, random = read_runs(list(runs))
    prompt, response, difference = measures(activedpo)
    assert (len(prompt.pool), len(prompt.picks)) == (8, 6)  # 2 rounds of 4 prompts, one pair each
    assert set(difference.picks) <= set(difference.pool)
    assert prompts_picked(activedpo) == (6, 8)
    most, least = extremes(activedpo, n=4)
    assert [len(most), len(least)] == [4, 2]
    scores = [pick.pick.score for pick in (*most, *least[::-1])]
    assert scores == sorted(scores, reverse=True)
    assert extremes(random, n=4)[1] == []  # it has no scores


@pytest.mark.parametrize(
    ("gone", "what"),
    [
        (["record.json"], "not evaluated"),
        (["record.json", "adapter"], "not trained"),
        (["record.json", "adapter", "labels.jsonl"], "not labeled"),
        (["record.json", "adapter", "labels.jsonl", "picked.jsonl"], "no pairs are picked"),
    ],
)
def test_an_unfinished_run_is_read_as_far_as_it_goes(
    copied: Copy, gone: list[str], what: str
) -> None:
    folder = copied()
    for name in gone:
        path = folder / "round-001" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run,) = read_runs([folder])
    assert len(run.missing) == 1
    assert run.missing[0].startswith("round-001 is unfinished") and what in run.missing[0]
    assert [record.round for record in run.records] == [-1, 0]
    assert label_counts(run.picks)["missing"] == (3 if what == "not labeled" else 0)


@pytest.mark.parametrize("file", ["record.json", "labels.jsonl", "pool.jsonl"])
@pytest.mark.parametrize("content", ["{", "[]", '{"round": 1, "more": 2}', "\x00"])
def test_a_broken_file_is_one_line(copied: Copy, file: str, content: str) -> None:
    folder = copied()
    (folder / "round-001" / file).write_text(content)
    (run,) = read_runs([folder])
    assert run.missing and all("\n" not in line for line in run.missing)
    assert run.records[0].round == -1 and len(run.rounds) == 2
    rounds_table(run), labels_table(run)


def test_without_settings_or_tokenizer_there_is_still_a_report(copied: Copy) -> None:
    folder = copied()
    (folder / "config.json").write_text("{}")
    (run,) = read_runs([folder])
    assert run.tokens is None and len(run.records) == 3
    (folder / "command.json").write_text("{")
    shutil.rmtree(folder / "start")
    (run,) = read_runs([folder])
    assert "start is unfinished: it is not evaluated" in run.missing
    assert run.command is None and any("command.json" in line for line in run.missing)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    with pytest.raises(ActiveDPOError, match="no such folder"):
        read_runs([tmp_path / "none"])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ActiveDPOError, match="not the folder of a run .its config.json is a model"):
        read_runs([tmp_path / "model"])
    with pytest.raises(ActiveDPOError, match="not the folder of a run"):
        read_runs([tmp_path])
    with pytest.raises(ActiveDPOError, match=r"it has these runs: .*activedpo .*random"):
        read_runs([runs[0].parent])
    with pytest.raises(ActiveDPOError, match="twice"):
        read_runs([runs[0], runs[0].parent / "." / runs[0].name])


def test_runs_of_the_same_name_have_their_paths(copied: Copy, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    folders = [copied("same"), tmp_path / "b" / "same"]
    shutil.copytree(folders[0], folders[1])
    assert [run.name for run in read_runs(folders)] == [str(folder) for folder in folders]


def _people(folder: Path, name: str, add: Callable[[dict[str, Any], int], dict[str, Any]]) -> None:
    """Write what people filled in: the lines of the first round with more fields."""
    lines = (folder / "round-000" / "labels.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    (folder / "labeling").mkdir(exist_ok=True)
    written = "".join(json.dumps({**row, **add(row, n)}) + "\n" for n, row in enumerate(rows))
    (folder / "labeling" / name).write_text(written)


def test_answers_of_several_labelers(copied: Copy) -> None:
    folder = copied()
    _people(
        folder,
        "labels-0.jsonl",
        lambda row, n: {
            "answers": [
                {"labeler": "ada", "label": 0, "seconds": 2.0 + n, "time": "2026-01-01T00:00:00"},
                {"labeler": "bo", "label": min(n, 1), "seconds": 9.0},
            ]
        },
    )
    (folder / "labeling" / "labels-0.journal.jsonl").write_text('{"kind": "batch"}\n')
    (run,) = read_runs([folder])
    assert run.missing == []
    found, alpha = agreement(run.picks)
    assert (found.hits, found.total) == (1, 3) and alpha == pytest.approx(1 - 4 / 3.2)
    assert pace(run.picks) == {"ada": (3, 3.0), "bo": (3, 9.0)}


def test_a_tie_is_told_from_a_skip_where_people_did(copied: Copy) -> None:
    folder = copied()
    _people(
        folder,
        "to_label-0.jsonl",
        lambda row, n: {"label": "tie" if row["label"] == "skip" else row["label"]},
    )
    (before,), (after,) = read_runs([copied("other")]), read_runs([folder])
    skipped = label_counts(before.rounds[0].picks)["skip"]
    assert label_counts(after.rounds[0].picks)["tie"] == skipped
    assert agreement(after.picks)[0].total == 0 and pace(after.picks) == {}  # nobody is named


def test_the_longer_response(runs: tuple[Path, Path]) -> None:
    (run,) = read_runs([runs[0]])
    found = longer_preferred(run.picks)
    expected = [
        len(pick.pick.responses[pick.label]) > len(pick.pick.responses[1 - pick.label])
        for pick in run.picks
        if isinstance(pick.label, int)
        and len(pick.pick.responses[0]) != len(pick.pick.responses[1])
    ]
    assert (found.hits, found.total) == (sum(expected), len(expected))


def test_a_copy_of_a_round_is_no_round_and_a_gone_one_shifts_no_number(copied: Copy) -> None:
    run = copied()
    shutil.copytree(run / "round-000", run / "round-000.bak")
    shutil.copytree(run / "round-000", run / "round-0001")
    (run / "round-notes").mkdir()
    (found,) = read_runs([run])
    assert (found.missing, [data.number for data in found.rounds]) == ([], [0, 1])
    assert found.tokens is not None and len(found.tokens) == 2
    shutil.rmtree(run / "round-000")
    (found,) = read_runs([run])
    assert found.missing == ["round-000 is gone"]
    assert [data.number for data in found.rounds] == [record.round for record in found.records[1:]]
    assert found.tokens is None  # the labels of a round enter those of the next


@pytest.mark.parametrize("label", [7, "x", True, [0], {}, ...])
def test_a_label_that_is_none_is_named_and_not_counted(copied: Copy, label: Any) -> None:
    run = copied()
    path = run / "round-000" / "labels.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[:1]:
        row.pop("label") if label is ... else row.update(label=label)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = read_runs([run])
    assert any("line 1: " in line and "'label'" in line for line in found.missing)
    assert any("has changed since the run wrote it" in line for line in found.missing)
    assert label_counts(found.rounds[0].picks)["missing"] == 1


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ([{"label": 0, "labeler": ["x"]}], "'labeler' must be a text"),
        ([{"label": 0, "labeler": 3}], "'labeler' must be a text"),
        ([{"label": 0, "labeler": "a", "seconds": True}], "'seconds' must be a number"),
        ([{"label": 0, "labeler": "a", "seconds": float("nan")}], "'seconds' must be a number"),
        ([{"label": 7, "labeler": "a"}], "'label' must be 0, 1"),
        (5, "'answers' must be a list"),
        ("abc", "'answers' must be a list"),
    ],
)
def test_answers_that_are_none_are_named(copied: Copy, answers: Any, error: str) -> None:
    run = copied()
    rows = (run / "round-000" / "labels.jsonl").read_text().splitlines()
    (run / "labeling").mkdir()
    (run / "labeling" / "labels-x.jsonl").write_text(
        "".join(json.dumps({**json.loads(row), "answers": answers}) + "\n" for row in rows[:1])
    )
    (found,) = read_runs([run])
    (line,) = found.missing
    assert "labels-x.jsonl, line 1: " in line and error in line
    assert pace(found.picks) == {} and agreement(found.picks)[0].total == 0


def test_a_time_of_any_size_is_a_time(copied: Copy) -> None:
    run = copied()
    row = json.loads((run / "round-000" / "labels.jsonl").read_text().splitlines()[0])
    (run / "labeling").mkdir()
    answers = [{"label": 0, "labeler": "a", "seconds": 10**400}]
    (run / "labeling" / "labels-x.jsonl").write_text(json.dumps({**row, "answers": answers}) + "\n")
    (found,) = read_runs([run])
    assert (found.missing, pace(found.picks)) == ([], {"a": (1, 1e9)})


@pytest.mark.parametrize(
    "change", [{"dpo": None}, {"lora": []}, {"extra_settings": "x"}, {"seed": []}, {"strategy": {}}]
)
def test_settings_of_other_kinds(copied: Copy, change: dict[str, Any]) -> None:
    folder = copied()
    config = read_checked_json(folder / "config.json")
    write_checked_json(
        folder / "config.json", {**config, "settings": {**config["settings"], **change}}
    )
    (run,) = read_runs([folder])
    assert len(run.records) == 3
    assert run.missing or change == {"seed": []}
    assert by_seed([run, run], "norm") == []


def test_settings_that_are_none(copied: Copy) -> None:
    folder = copied()
    write_checked_json(folder / "config.json", {"settings": 1, "versions": []})
    (run,) = read_runs([folder])
    assert run.settings == {} and run.versions == {}
    assert f"{folder / 'config.json'}: 'settings' is no object" in run.missing
