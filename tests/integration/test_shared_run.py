"""`activedpo run` by several processes: the run of one process, whatever happens to them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load

from activedpo_fast.training.run_folder import read_records
from tests.support.killing import content, project, reward_model, run, run_file, run_together

Result = tuple[int, dict[str, int], str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert pytest.importorskip("trl").DPOTrainer  # imported once, and not by each process
    folder = tmp_path_factory.mktemp("project")
    project(folder)
    reward_model(folder / "reward")
    return folder


def command(files: Path, output: Path, **changed: Any) -> list[str]:
    """The command of a run with several batches of responses, and 4 pairs in a training step."""
    output.mkdir(exist_ok=True)
    argv = run_file(files, output)[:-1]
    path = output / "run.yaml"
    config = yaml.safe_load(path.read_text())
    config["loop"] |= {"batch_size": 4, "prompts_per_round": 4, "generation_batch_size": 3}
    config["dpo"] |= {"per_device_train_batch_size": 4}
    path.write_text(yaml.safe_dump(config | changed))
    return argv


@pytest.fixture(scope="module")
def alone(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process."""
    folder = tmp_path_factory.mktemp("alone")
    code, _, said = run([command(files, folder)])
    assert code == 0, said
    return folder / "run"


def _said(results: Sequence[Result], codes: list[int]) -> list[str]:
    """The lines of each process, without those of PyTorch, which a real start turns off."""
    assert [code for code, _, _ in results] == codes, results
    assert all("Traceback" not in said for _, _, said in results), results
    return [
        "".join(line for line in said.splitlines(True) if line.startswith(("activedpo", "round")))
        for _, _, said in results
    ]


def _like(got: Path, wanted: Path) -> None:
    """Compare two runs: what does not follow from gradients by its bytes."""
    mine, theirs = content(got), content(wanted)
    assert sorted(mine) == sorted(theirs)
    for name in mine:
        if name.endswith("safetensors"):
            torch.testing.assert_close(load(mine[name]), load(theirs[name]), rtol=0, atol=1e-6)
        elif name.endswith(("picked.jsonl", "labels.jsonl")):
            rows, others = (
                [json.loads(line) for line in found[name].splitlines()] for found in (mine, theirs)
            )
            scores, expected = ([row.pop("score") for row in part] for part in (rows, others))
            assert rows == others and scores == pytest.approx(expected, rel=1e-4)
        elif not any(part in name for part in ("checksums", "training", "heldout")):
            assert mine[name] == theirs[name], name  # responses and settings, for example
    for a, b in zip(read_records(got), read_records(wanted), strict=True):
        assert a.seconds.keys() == b.seconds.keys() and a.labels_total == b.labels_total
        assert a.metrics == pytest.approx(b.metrics, abs=1e-4)
        assert a.training == pytest.approx(b.training, abs=1e-5)


def test_two_processes_do_what_one_does(files: Path, tmp_path: Path, alone: Path) -> None:
    first, other = _said(run_together([command(files, tmp_path)] * 2), [0, 0])
    assert "round  labels" in first and first.count("rehearsed generation") == 1 and other == ""
    _like(tmp_path / "run", alone)
    shared = content(tmp_path)
    code, _, said = run([command(files, tmp_path)])  # any other number goes on, with nothing to do
    assert code == 0 and content(tmp_path) == shared, said


def _failing_trainer(patch: pytest.MonkeyPatch) -> None:
    """Let the second training, which is that of the first round, fail."""
    from trl import DPOTrainer

    real, trainings = DPOTrainer.training_step, []

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        trainings.append(1)
        if len(trainings) == 2:
            raise OSError(28, "No space left on device")
        return real(self, *args, **kwargs)

    patch.setattr(DPOTrainer, "training_step", training_step)


def test_an_error_of_one_process_ends_all_in_its_line(
    files: Path, tmp_path: Path, alone: Path
) -> None:
    good = command(files, tmp_path)
    failed = run_together([good] * 2, in_last=_failing_trainer)  # while the first waits for it
    first, other = _said(failed, [2, 2])
    assert "activedpo: error" not in first
    assert other.startswith("activedpo: error: ") and "no space left" in other.lower()
    assert other.count("\n") == 1
    assert not [name for name in content(tmp_path) if name.endswith(".lock")]
    assert "round-000/labels.jsonl" in content(tmp_path / "run")  # kept
    assert run([good])[0] == 0
    _like(tmp_path / "run", alone)


def test_labels_from_people_end_all(files: Path, tmp_path: Path) -> None:
    people = command(files, tmp_path, oracle={"kind": "people", "via": "files"}, evaluate=None)
    first, other = _said(run_together([people] * 2), [3, 3])
    assert "4 of 4 pairs have no label yet" in first and other == ""
    assert "activedpo run" in (tmp_path / "run" / "command.json").read_text()
    assert (tmp_path / "run" / "round-000" / "picked.jsonl").exists()


def test_settings_that_differ_and_engines_that_cannot_work(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = command(files, tmp_path / "a")
    other = command(files, tmp_path / "b", seed=1, output_dir=str(tmp_path / "a" / "run"))
    before = sorted(tmp_path.rglob("*"))
    said = _said(run_together([good, other]), [2, 2])
    assert "process 1 has another selector_options than process 0: all must be" in said[0]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    said = _said(run_together([good] * 2), [2, 2])
    assert "error: FSDP leaves each process parts of the model" in said[0]
    assert said[0].count("\n") == 1 and said[1] == "" and sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_ends_ends_all(
    files: Path, tmp_path: Path, alone: Path, killed: int, number: int
) -> None:
    good = command(files, tmp_path)
    when = {0: 60, 1: 4}[killed]
    results = run_together([good] * 2, when={killed: when}, number=number)
    code = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}[signal.Signals(number)]
    said = _said(results, [2, 2][:killed] + [code] + [2, 2][killed + 1 :])
    lines = [line for line in said[0].splitlines() if "rehearsed" not in line]
    if killed == 1:
        assert lines[-1].startswith("activedpo: error: lost contact with another of the 2")
    elif number == signal.SIGINT:
        assert lines[-1] == "activedpo: interrupted"
    assert said[1] == ""
    assert run([good])[0] == 0
    _like(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node=3"],
        ["accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_launchers(files: Path, tmp_path: Path, alone: Path, launcher: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "activedpo_fast", *command(files, tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("round  labels") == 1
    assert done.stderr.count("rehearsed") == 1 and "reducer.cpp" not in done.stderr
    # 3 processes do not divide the 4 pairs of a step, and train another adapter.
    said = "training steps are on 3 pairs in place of 4"
    if "torch.distributed.run" in launcher:
        assert done.stderr.count(said) == 2  # rounds
    else:
        assert said not in done.stderr
    path = "round-000/pool.jsonl"
    assert (tmp_path / "run" / path).read_bytes() == (alone / path).read_bytes()
