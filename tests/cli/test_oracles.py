"""`activedpo run` with sources of labels that need nobody: whole runs of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from activedpo_fast.cli.app import main
from tests.support.label_studio import LEGACY, LabelStudio
from tests.support.models import saved_model
from tests.support.servers import Reply, Request, chat_reply, prefers_longer, serving

KEY = "sk-secret-0123456789"


def _write(folder: Path, oracle: dict[str, Any], rows: list[dict[str, Any]], **changes: Any) -> str:
    """Write a run file of two rounds of two labels, and return its path."""
    if not (folder / "model").exists():
        saved_model(folder)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": str(folder / "model"),
        "adapter": str(folder / "adapter"),
        "prompts": str(folder / "prompts.jsonl"),
        "output_dir": str(folder / "run"),
        "device": "cpu",
        "selection": {"proj_dim": 32, "verify": False},
        "loop": {
            "rounds": 2,
            "batch_size": 2,
            "prompts_per_round": 4,
            "num_generations": 2,
            "max_completion_length": 6,
        },
        "dpo": {"learning_rate": 1e-3, "max_steps": 1, "per_device_train_batch_size": 2},
        "oracle": oracle,
        **changes,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "run.yaml")


def _labels(folder: Path, t: int) -> list[dict[str, Any]]:
    path = folder / "run" / f"round-{t:03d}" / "labels.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


PROMPTS = [{"id": f"p{n}", "prompt": f"The prompt {n}"} for n in range(8)]


def _judge(address: str, **options: Any) -> dict[str, Any]:
    return {
        "kind": "judge",
        "model": "some/model",
        "base_url": f"{address}/v1",
        "api_key_env": "JUDGE_KEY",
        "retries": 0,
        **options,
    }


def test_a_run_with_a_judge(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(prefers_longer) as server:
        assert main(["run", _write(tmp_path, _judge(server.address), PROMPTS)]) == 0
        assert len(server.requests) == 1 + 2 * 2 * 2  # the rehearsal's, and both orders of each
    output = capsys.readouterr()
    for t in range(2):
        for line in _labels(tmp_path, t):
            lengths = [len(text) for text in line["responses"]]
            expected = "skip" if lengths[0] == lengths[1] else int(lengths[1] > lengths[0])
            assert line["label"] == expected
    entries = (tmp_path / "run" / "labeling" / "judge.jsonl").read_text().splitlines()
    assert len(entries) == 8
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert settings["extra_settings"]["oracle"] == {"kind": "judge"}
    assert json.loads(settings["oracle"]["request"])["model"] == "some/model"
    assert KEY not in output.out + output.err
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()
    # The judge moved, and its server takes other limits: the same run, complete already.
    with serving(prefers_longer) as moved:
        oracle = _judge(moved.address, concurrency=1, timeout=3.0, api_key_env="OTHER_KEY")
        monkeypatch.setenv("OTHER_KEY", KEY)
        assert main(["run", _write(tmp_path, oracle, PROMPTS)]) == 0
        assert not moved.requests
        oracle["model"] = "other/model"
        assert main(["run", _write(tmp_path, oracle, PROMPTS)]) == 2
    assert "oracle.request" in capsys.readouterr().err


def test_a_judge_that_cannot_be_asked_is_found_out_before_the_run(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(lambda request: Reply({"error": f"bad key {KEY}"}, 401)) as server:
        assert main(["run", _write(tmp_path, _judge(server.address), PROMPTS)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the key is missing or refused (status 401: bad key ***)" in error
    assert not (tmp_path / "run" / "round-000").exists()
    monkeypatch.delenv("JUDGE_KEY")
    assert main(["run", str(tmp_path / "run.yaml")]) == 2
    assert "oracle.api_key_env: the environment variable" in capsys.readouterr().err


def test_a_run_goes_on_with_the_answers_that_it_has(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    asked: list[str] = []

    def answer(request: Request) -> Reply:
        asked.append(request.body["messages"][0]["content"])
        return Reply({}, 503) if len(asked) == 4 else chat_reply("A")

    with serving(answer) as server:
        path = _write(tmp_path, _judge(server.address, concurrency=1), PROMPTS)
        assert main(["run", path]) == 2
        assert "status 503" in capsys.readouterr().err
        assert main(["run", path]) == 0
    # Two rounds of four questions and the rehearsal's; one was asked again.
    assert len(asked) == 10 and len(set(asked)) == 9
    assert [line["label"] for t in range(2) for line in _labels(tmp_path, t)] == ["skip"] * 4


ROWS = [
    {"prompt": f"The prompt {n}", "chosen": f" a good answer {n}", "rejected": f" the bad one {n}"}
    for n in range(8)
]
_ROUNDS = {"rounds": 2, "batch_size": 2}


def test_a_run_on_recorded_preferences(tmp_path: Path, capsys: Any) -> None:
    path = _write(tmp_path, {"kind": "recorded"}, ROWS, loop=_ROUNDS)
    assert main(["run", path]) == 0
    for t in range(2):
        for line in _labels(tmp_path, t):
            assert line["responses"][line["label"]].startswith(" a good answer")
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]
    _write(tmp_path, {"kind": "recorded"}, swapped, loop=_ROUNDS)
    assert main(["run", path]) == 2
    assert "oracle.preferences" in capsys.readouterr().err


def test_a_judge_of_given_responses(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    loop = {**_ROUNDS, "responses": "given"}
    rows = [
        {"prompt": f"p{n}", "responses": [" short", f" longer {n}", " longest of all"]}
        for n in range(4)
    ]
    with serving(prefers_longer) as server:
        assert main(["run", _write(tmp_path, _judge(server.address), rows, loop=loop)]) == 0
    for t in range(2):
        for line in _labels(tmp_path, t):
            assert line["label"] == int(len(line["responses"][1]) > len(line["responses"][0]))


def test_recorded_preferences_need_both_columns(tmp_path: Path, capsys: Any) -> None:
    assert main(["run", _write(tmp_path, {"kind": "recorded"}, PROMPTS, loop=_ROUNDS)]) == 2
    assert "line 1: recorded preferences need the columns" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_labeled_in_label_studio(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("TOKEN", LEGACY)
    studio = LabelStudio()
    loop = {"rounds": 1, "batch_size": 2, "responses": "given"}
    with serving(studio) as server:
        oracle = {"kind": "people", "via": "label_studio", "api_key_env": "TOKEN"}
        oracle["base_url"] = server.address
        path = _write(tmp_path, oracle, ROWS, loop=loop)
        assert main(["run", path]) == 3
        assert f"label them at {server.address}/projects/7" in capsys.readouterr().err
        studio.annotate(lambda data: "left" if "good" in data["left"] else "right")
        assert main(["run", path]) == 0
    assert studio.projects[7]["title"] == "activedpo: run"
    for line in _labels(tmp_path, 0):
        assert line["responses"][line["label"]].startswith(" a good answer")
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or LEGACY.encode() not in file.read_bytes()
