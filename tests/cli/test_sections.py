"""The sections `evaluate` and `generation` of the run file: whole runs of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from activedpo_fast.cli.app import main
from activedpo_fast.training.run_folder import read_records
from tests.support.generation_server import GenerationServer
from tests.support.killing import project, reward_model
from tests.support.models import tiny_causal_lm, tiny_tokenizer
from tests.support.servers import Request, prefers_longer, serving

HELDOUT = [{"prompt": f"The dog {n}"} for n in range(3)]
PAIRS = [
    {"prompt": f"Prefer {n}?", "chosen": f" A sketch {n}.", "rejected": " No."} for n in range(3)
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    project(folder)
    reward_model(folder / "reward")
    for name, rows in (("heldout", HELDOUT), ("pairs", PAIRS), ("none", [])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recorded.jsonl").write_text(
        "".join(json.dumps({**row, "prompt": f"Which {n}?"}) + "\n" for n, row in enumerate(PAIRS))
    )
    (folder / "no_prompt.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    return folder


def _write(files: Path, folder: Path, evaluate: dict[str, Any] | None, **changes: Any) -> str:
    config = {
        "model": str(files / "model"),
        "adapter": str(files / "adapter"),
        "prompts": str(files / "prompts.jsonl"),
        "output_dir": str(folder / "run"),
        "device": "cpu",
        "strategy": "random",
        "loop": {"rounds": 1, "batch_size": 2, "prompts_per_round": 2, "max_completion_length": 4},
        "dpo": {"max_steps": 2, "learning_rate": 0.1},
        "oracle": {"kind": "reward_model", "model": str(files / "reward")},
        "evaluate": evaluate,
        **changes,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "run.yaml")


def test_a_run_with_metrics(files: Path, tmp_path: Path, capsys: Any) -> None:
    evaluate = {
        "prompts": str(files / "heldout.jsonl"),
        "samples": 2,
        "preferences": str(files / "pairs.jsonl"),
    }
    dpo = {"max_steps": 2, "learning_rate": 0.1, "eval_strategy": "steps", "eval_steps": 2}
    assert main(["run", _write(files, tmp_path, evaluate, dpo=dpo)]) == 0
    start, first = read_records(tmp_path / "run")
    assert first.training["eval_margin"] == pytest.approx(first.metrics["margin"], rel=1e-3)
    names = ("reward", "gain", "accuracy", "margin")
    assert start.metrics.keys() == {f"{name}{end}" for name in names for end in ("", "_se")}
    assert start.metrics["gain"] == start.metrics["margin"] == 0
    assert first.metrics["gain"] != 0 and first.metrics["margin"] != 0
    assert first.metrics["reward"] - start.metrics["reward"] == pytest.approx(first.metrics["gain"])
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:6] == ["round", "labels", *names]
    kept = json.loads((tmp_path / "run" / "start" / "heldout.json").read_text())
    assert [len(texts) for texts in kept["responses"]] == [2, 2, 2]
    # As everything else, the metrics are those of an uninterrupted run; what they depend on stays.
    (tmp_path / "run" / "round-000" / "record.json").unlink()
    assert main(["run", str(tmp_path / "run.yaml"), "--quiet"]) == 0
    assert read_records(tmp_path / "run")[1].metrics == first.metrics
    for changes, name in (
        ({"samples": 1}, "evaluate.reward.samples (2, now 1)"),
        ({"preferences": str(files / "recorded.jsonl")}, "eval_dataset ("),
        (
            {"oracle": {"kind": "reward_model", "model": str(files / "reward"), "max_length": 8}},
            "extra_settings.evaluate.oracle.max_length (None, now 8)",
        ),
    ):
        assert main(["run", _write(files, tmp_path, {**evaluate, **changes}, dpo=dpo)]) == 2
        assert name in capsys.readouterr().err
    assert main(["report", str(tmp_path / "run"), "--quiet"]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(f"{name} by labels" in page for name in names)


def test_a_win_rate_by_a_judge_in_a_run_on_recorded_preferences(
    files: Path, tmp_path: Path, capsys: Any
) -> None:
    with serving(prefers_longer) as server:
        judge = {"kind": "judge", "model": "m", "base_url": f"{server.address}/v1", "retries": 0}
        evaluate = {
            "prompts": str(files / "heldout.jsonl"),
            "oracle": judge,
            "max_completion_length": 5,
            "temperature": 0.0,
        }
        path = _write(
            files,
            tmp_path,
            evaluate,
            oracle={"kind": "recorded"},
            prompts=str(files / "recorded.jsonl"),
            loop={"rounds": 1, "batch_size": 2},
        )
        assert main(["run", path]) == 0
    start, first = read_records(tmp_path / "run")
    assert start.metrics == {"win_rate": 0.5, "win_rate_se": 0.0}
    files_ = [tmp_path / "run" / n / "heldout-responses.json" for n in ("start", "round-000")]
    before, after = (
        [len(texts[0]) for texts in json.loads(path.read_text())["responses"]] for path in files_
    )
    wins = [(b > a) + (a == b) / 2 for a, b in zip(before, after, strict=True)]
    assert first.metrics["win_rate"] == pytest.approx(sum(wins) / 3)
    assert (tmp_path / "run" / "evaluation" / "judge.jsonl").exists()
    with serving(prefers_longer) as moved:  # another address is the same run
        evaluate["oracle"] = {**judge, "base_url": f"{moved.address}/v1"}
        config = yaml.safe_load((tmp_path / "run.yaml").read_text())
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({**config, "evaluate": evaluate}))
        assert main(["run", path]) == 0
        evaluate["oracle"]["model"] = "another"
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({**config, "evaluate": evaluate}))
        capsys.readouterr()
        assert main(["run", path]) == 2
    assert "evaluate.win_rate.oracle.request" in capsys.readouterr().err


def _name_of(requests: list[Request], folder: str) -> str:
    """The name under which an adapter's folder was loaded."""
    loads = [r.body for r in requests if r.path == "/v1/load_lora_adapter"]
    (name,) = {body["lora_name"] for body in loads if body["lora_path"] == folder}
    return str(name)


def test_responses_from_a_server(files: Path, tmp_path: Path, capsys: Any) -> None:
    behind = GenerationServer(tiny_causal_lm("llama"), tiny_tokenizer())
    with serving(behind) as server:
        generation = {"model": "base", "base_url": f"{server.address}/v1"}
        heldout = {"prompts": str(files / "heldout.jsonl"), "samples": 2}
        path = _write(files, tmp_path, heldout, generation=generation)
        config = yaml.safe_load(Path(path).read_text())
        assert main(["run", path, "--quiet"]) == 0
    # The start's is made room for; the last is there for its evaluation.
    assert list(behind.adapters.values()) == [str(tmp_path / "run" / "round-000" / "adapter")]
    for name in ("start", "round-000"):
        kept = json.loads((tmp_path / "run" / name / "heldout.json").read_text())["responses"]
        at = _name_of(server.requests, str(tmp_path / "run" / name / "adapter"))
        said = {prompt: texts for model, prompt, texts in behind.answers if model == at}
        assert kept == [said[row["prompt"]] for row in HELDOUT]
    sampled = {text for _, _, texts in behind.answers[1:] for text in texts}
    rows = [
        json.loads(line)
        for line in (tmp_path / "run" / "round-000" / "pool.jsonl").read_text().splitlines()
    ]
    assert rows and all(text in sampled for row in rows for text in row["responses"])
    # The server is gone; what it answered is there.
    assert main(["run", path, "--quiet"]) == 0
    Path(path).write_text(yaml.safe_dump({**config, "generation": {**generation, "model": "b"}}))
    assert main(["run", path]) == 2
    assert "generate.model ('base', now 'b') differs" in capsys.readouterr().err
    Path(path).write_text(yaml.safe_dump({**config, "generation": {**generation, "base_url": "h"}}))
    assert main(["run", path]) == 2
    assert "generation.base_url: expected an address" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"prompts": "gone.jsonl"}, "evaluate.prompts: gone.jsonl: no such file"),
        ({"prompts": "none.jsonl"}, "evaluate.prompts: none.jsonl: no rows"),
        ({"prompts": "no_prompt.jsonl"}, "evaluate.prompts: no_prompt.jsonl, line 2: no 'prompt'"),
        ({"preferences": "none.jsonl"}, "evaluate.preferences: recorded preferences: there are no"),
        ({"preferences": "heldout.jsonl"}, "need the columns 'chosen' and 'rejected'"),
        ({"prompts": "heldout.jsonl", "oracle": {"kind": "reward_model", "model": "gone"}}, "gone"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line_before_the_run(
    files: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: Any,
    evaluate: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(files)
    assert main(["run", _write(files, tmp_path, evaluate)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not (tmp_path / "run").exists()


def test_prompts_that_are_not_held_out_are_counted(
    files: Path, tmp_path: Path, capsys: Any
) -> None:
    pairs = [*PAIRS, {**PAIRS[0], "prompt": "label 0?"}]  # a prompt of the run
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    evaluate = {"preferences": str(tmp_path / "pairs.jsonl")}
    assert main(["run", _write(files, tmp_path, evaluate, oracle={"kind": "people"})]) == 3
    said = capsys.readouterr().err
    assert "evaluate.preferences: 1 of 4 are prompts of the run, too, and so not held out" in said
