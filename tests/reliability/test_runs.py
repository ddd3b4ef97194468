"""A run on disk that is not what was written is named, and so is training that has diverged."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from activedpo_fast._locks import locked_folder
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.reward import RewardOracle
from activedpo_fast.models.adapters import adapter_state
from activedpo_fast.pool.items import Prompt
from activedpo_fast.training.loop import ActiveDPOLoop
from activedpo_fast.training.run_folder import read_records
from activedpo_fast.training.trl import dpo_config
from tests.support.killing import content, run, run_file
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer
from tests.support.rehearsals import rehearsed_once  # noqa: F401

PROMPTS = [Prompt(f"p{n}", f"The {word}", {}) for n, word in enumerate("fox dog sketch".split())]


def _length(prompts: Any, responses: Any, extras: Any) -> list[float]:
    return [float(len(response)) for response in responses]


def _loop(folder: Path, *, temperature: float = 0.5, rounds: int = 1, lr: float = 1e-2) -> Any:
    return ActiveDPOLoop(
        lora(tiny_causal_lm("llama"), "llama"),
        tiny_tokenizer(),
        PROMPTS,
        RewardOracle(_length, temperature=temperature),
        output_dir=folder,
        dpo_args=dpo_config(
            output_dir=str(folder / "trainer"),
            learning_rate=lr,
            max_steps=2,
            max_grad_norm=1e30,
            per_device_train_batch_size=2,
        ),
        selector_options={"proj_dim": 16, "verify": False},
        batch_size=2,
        rounds=rounds,
        prompts_per_round=2,
        max_completion_length=4,
        show_progress=False,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run"
    _loop(folder).run()
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "start/checksums.json",
        "start/adapter/adapter_model.safetensors",
        "start/record.json",
        "round-000/pool.jsonl",
        "round-000/picked.jsonl",
        "round-000/labels.jsonl",
        "round-000/adapter/adapter_model.safetensors",
        "round-000/adapter/adapter_config.json",
        "round-000/record.json",
    ],
)
def test_a_flipped_bit_is_named(folder: Path, name: str) -> None:
    path, loop = folder / name, _loop(folder)
    whole = path.read_bytes()
    random.seed(name)
    for n in random.sample(range(len(whole)), 3):
        flipped = bytearray(whole)
        flipped[n] ^= 1 << random.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(ActiveDPOError, match=Path(name).name):
            loop.run()
    path.write_bytes(whole)
    assert loop.run() == read_records(folder)


@pytest.mark.parametrize("keep", [0, 1])
def test_labels_that_were_emptied_or_shortened(folder: Path, keep: int) -> None:
    path = folder / "round-000" / "labels.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:keep]))
    with pytest.raises(ActiveDPOError, match=f"{path} has changed since the run wrote it: put it"):
        _loop(folder, rounds=2).run()


def test_another_temperature_of_the_oracle(folder: Path) -> None:
    with pytest.raises(ActiveDPOError, match=r"oracle\.temperature \(0\.5, now 0\.25\) differs"):
        _loop(folder, temperature=0.25, rounds=2).run()


def test_a_config_that_is_gone(folder: Path) -> None:
    shutil.rmtree(folder / "round-000")
    (folder / "config.json").unlink()
    with pytest.raises(ActiveDPOError, match=r"config\.json is gone"):
        _loop(folder).run()


def test_two_runs_on_one_folder(folder: Path, tmp_path: Path) -> None:
    # Neither a model nor prompts: the lock is what is tried first.
    before = content(folder)
    with locked_folder(folder):
        code, _, said = run([run_file(tmp_path, tmp_path)])
    assert code == 2 and "is being written to by process" in said
    assert content(folder) == before


def test_training_that_diverges(tmp_path: Path) -> None:
    loop = _loop(tmp_path / "run", lr=1e38)
    before = adapter_state(loop.model)
    with pytest.raises(ActiveDPOError, match="round-000: training has diverged, .* is not finite"):
        loop.run()
    assert not (tmp_path / "run" / "round-000" / "adapter").exists()
    after = adapter_state(loop.model)
    assert all((after[name] == before[name]).all() for name in before)
    assert len(_loop(tmp_path / "run").run()) == 2  # what was labeled is kept
