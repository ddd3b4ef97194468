"""Several processes are refused where they would mix their files, before anything is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from activedpo_fast.cli.app import main
from activedpo_fast.distributed.launcher import launched_rank, own_device, require_one_process
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.sketch import Sketch
from activedpo_fast.labels import CallableOracle
from activedpo_fast.pool.items import Prompt
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.tokens import tokenize_pool
from activedpo_fast.store.store import FeatureStore
from activedpo_fast.training.loop import ActiveDPOLoop
from activedpo_fast.training.trl import dpo_config
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer

ARGV = {
    "features": ["{tmp}/no.jsonl", "--model={tmp}/no", "--adapter={tmp}/no", "--output={tmp}/s"],
    "select": ["{tmp}/no", "--output={tmp}/picked.jsonl"],
    "run": ["{tmp}/no.yaml"],
    "demo": ["--output={tmp}/demo"],
}
TOGETHER = ("features", "run", "select")  # what several processes do together


@pytest.mark.parametrize("command", sorted(ARGV.keys() - set(TOGETHER)))
@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_commands_are_refused_first(
    tmp_path: Path,
    command: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, "2")
    argv = [argument.replace("{tmp}", str(tmp_path)) for argument in ARGV[command]]
    assert main([command, *argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(
        f"activedpo: error: {name} is 2: activedpo {command} works in one process only"
    )
    assert captured.err.count("\n") == 1 and captured.out == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", TOGETHER)
def test_processes_that_are_not_connected_are_refused(
    tmp_path: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [argument.replace("{tmp}", str(tmp_path)) for argument in ARGV[command]]
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, expected in (
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE is 2, but WORLD_SIZE is not set: start"),
        ("WORLD_SIZE", "WORLD_SIZE is 2, but the processes cannot be connected (use torchrun"),
    ):
        monkeypatch.setenv(name, "2")
        assert main([command, *argv]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"activedpo: error: {expected}")
        assert captured.err.count("\n") == 1 and captured.out == "" and not list(tmp_path.iterdir())


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "3")
    assert own_device("auto") == "auto" and launched_rank() == 0  # no launcher
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert own_device("auto") == own_device("cuda") == "cuda:1" and launched_rank() == 3
    assert own_device("cuda:0") == "cuda:0" and own_device("cpu") == "cpu"
    monkeypatch.delenv("LOCAL_RANK")  # one machine, then
    with pytest.raises(ActiveDPOError, match="no GPU for process 3 of this machine, which has 2"):
        own_device("auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device("auto") == "auto"


def test_a_launcher_with_one_process_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in ("1", "", "0"):
        monkeypatch.setenv("WORLD_SIZE", size)
        require_one_process("x")


def test_several_processes_are_refused_in_python_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = lora(tiny_causal_lm("llama"), "llama"), tiny_tokenizer()
    pool = PreferencePool.from_rows([{"prompt": "x", "responses": ["a", "b"]}])
    store = FeatureStore.create(tmp_path / "s", pool, {}, skipped=[])
    loop = ActiveDPOLoop(
        model,
        tokenizer,
        [Prompt("a", "The fox")],
        CallableOracle(lambda *_: 0),
        output_dir=tmp_path / "run",
        dpo_args=dpo_config(output_dir=str(tmp_path / "trainer")),
    )
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ActiveDPOError, match="FeatureStore.create works in one process"):
        FeatureStore.create(tmp_path / "t", pool, {}, skipped=[])
    with pytest.raises(ActiveDPOError, match="FeatureStore.fill works in one process"):
        store.fill(FeatureExtractor(model, Sketch("sjlt", 8)), tokenize_pool(pool, tokenizer))
    with pytest.raises(
        ActiveDPOError, match="WORLD_SIZE is 2, but the processes are not connected"
    ):
        loop.run()
    assert sorted(tmp_path.rglob("*")) == before
