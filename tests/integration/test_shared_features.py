"""`activedpo features` by several processes: the store of one process, whatever happens to them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from activedpo_fast.gradients import extractor
from activedpo_fast.gradients.batches import Batch
from activedpo_fast.store.store import FeatureStore
from tests.support.killing import content, features, project, run, run_together, select
from tests.support.models import tiny_causal_lm, tiny_tokenizer

Result = tuple[int, dict[str, int], str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    project(folder, prompts=7)
    return folder


@pytest.fixture(scope="module")
def alone(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """The files of one process's store and picks, and its backward passes."""
    folder = tmp_path_factory.mktemp("alone")
    code, counts, said = run([features(files, folder), select(folder)])
    assert code == 0, said
    return content(folder), counts["passes"]


def _command(files: Path, output: Path, *options: str) -> list[str]:
    """The command of `features`, which says what it has done."""
    return [*features(files, output)[:-1], *options]


def _said(results: Sequence[Result]) -> list[str]:
    assert all("Traceback" not in said for _, _, said in results), results
    return [said for _, _, said in results]


def _codes(results: Sequence[Result]) -> list[int]:
    return [code for code, _, _ in results]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_store_and_the_picks_are_those_of_one_process(
    files: Path, tmp_path: Path, alone: tuple[dict[str, bytes], int], size: int
) -> None:
    results = run_together([_command(files, tmp_path)] * size)
    assert _codes(results) == [0] * size, results
    first, *others = _said(results)
    assert "14 gradient rows of 7 prompts in " in first and first.count("\n") == 1
    assert others == [""] * (size - 1)
    passes = [counts["passes"] for _, counts, _ in results]
    assert sum(passes) == alone[1] and max(passes) - min(passes) <= 1
    assert run([select(tmp_path)])[0] == 0
    assert content(tmp_path) == alone[0]
    again = run_together([_command(files, tmp_path)] * size)  # loads no model
    assert _codes(again) == [0] * size and "nothing to do" in _said(again)[0]
    assert sum(counts["passes"] for _, counts, _ in again) == 0


def test_any_number_of_processes_goes_on(
    files: Path, tmp_path: Path, alone: tuple[dict[str, bytes], int]
) -> None:
    assert run([features(files, tmp_path)], when=30)[0] == -signal.SIGKILL
    begun = content(tmp_path)
    assert "store/rows-00000.partial" in begun
    command = _command(files, tmp_path)
    killed = run_together([command] * 2, when={1: 2})
    assert _codes(killed) == [2, -signal.SIGKILL]
    first, other = _said(killed)
    assert first.splitlines()[0].startswith("activedpo: continuing ")
    assert first.splitlines()[1:] == [
        "activedpo: error: lost contact with another of the 2 processes; rows that were written "
        "are kept"
    ]
    assert other == "" and content(tmp_path) != begun
    assert run([features(files, tmp_path), select(tmp_path)])[0] == 0
    assert content(tmp_path) == alone[0]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_ends_all_in_one_line(
    files: Path, tmp_path: Path, alone: tuple[dict[str, bytes], int], number: int
) -> None:
    ended = run_together([_command(files, tmp_path)] * 2, when={0: 40}, number=number)
    expected = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}
    code, word = expected[signal.Signals(number)]
    assert _codes(ended) == [code, 2]
    assert _said(ended) == [f"activedpo: {word}\n", ""]
    assert not [name for name in content(tmp_path) if name.endswith(".lock")]
    assert run([features(files, tmp_path), select(tmp_path)])[0] == 0
    assert content(tmp_path) == alone[0]


def test_an_error_of_one_process_ends_all_in_its_line(files: Path, tmp_path: Path) -> None:
    good = _command(files, tmp_path)
    missing = _command(files, tmp_path, f"--adapter={files / 'none'}")

    def said_by(speaker: int, text: str, *commands: list[str]) -> None:
        results = run_together(list(commands))
        assert _codes(results) == [2, 2]
        said = _said(results)
        assert text in said[speaker] and said[speaker].startswith("activedpo: error: ")
        assert said[speaker].count("\n") == 1 and said[1 - speaker] == ""
        assert not list(tmp_path.iterdir())

    said_by(1, "none", good, missing)
    said_by(0, "none", missing, missing)  # all could say it
    said_by(0, "process 1 has another beta than process 0", good, [*good, "--beta=0.2"])

    wide = [*good, "--proj-dim=512"]
    full = run_together([wide] * 2, largest=20_000)
    assert _codes(full) == [2, 2]
    assert "rows-00000.partial cannot be written" in _said(full)[0] and _said(full)[1] == ""
    assert run([wide, select(tmp_path)])[0] == 0


def test_a_process_that_runs_out_of_memory_and_a_response_that_is_not_finite(
    files: Path, tmp_path: Path
) -> None:
    model = tiny_causal_lm("llama")
    token = tiny_tokenizer()(" 3")["input_ids"][-1]
    model.get_input_embeddings().weight.data[token] = torch.nan
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    options = [f"--model={tmp_path / 'model'}", "--max-tokens-per-batch=64", "--skip-non-finite"]
    code, counts, said = run([_command(files, tmp_path, *options)])
    assert code == 0 and counts["passes"] < 14, said
    named = "what the model gives for it is not finite"
    assert said.count(named) == 2  # the prompt has the token

    def short_of_memory(patch: pytest.MonkeyPatch) -> None:
        real = extractor.captured_rows

        def captured_rows(model: Any, trained: Any, plan: Any, batch: Batch, **options: Any) -> Any:
            if len(batch.rows) > 1:
                raise torch.OutOfMemoryError
            return real(model, trained, plan, batch, **options)

        patch.setattr(extractor, "captured_rows", captured_rows)

    (tmp_path / "shared").mkdir()
    command = _command(files, tmp_path / "shared", *options)
    results = run_together([command] * 2, in_last=short_of_memory)
    assert _codes(results) == [0, 0], results
    first, last = _said(results)
    assert "out of memory: going on with batches" in last and "out of memory" not in first
    assert (first + last).count(named) == 2
    wanted, got = (FeatureStore.open(path / "store") for path in (tmp_path, tmp_path / "shared"))
    assert got.non_finite() == wanted.non_finite() == [3]
    torch.testing.assert_close(got.load().gradients, wanted.load().gradients)
    assert "14 rows, 2 of them all zeros" in got.verify()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_launchers(
    files: Path, tmp_path: Path, alone: tuple[dict[str, bytes], int], launcher: list[str]
) -> None:
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # its size
    process = subprocess.Popen(
        [sys.executable, "-m", *launcher, "-m", "activedpo_fast", *_command(files, tmp_path)],
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # all have closed it
        while part := os.read(screen, 2**16):
            shown += part
    os.close(screen)
    said = process.communicate()[0]
    assert process.returncode == 0, shown.decode()
    assert said.count("\n") == 1 and "14 gradient rows" in said
    # One progress bar, over the rows of all.
    assert shown.count(b"gradient features:   0%") == 1 and b" 14/14 " in shown
    assert run([select(tmp_path)])[0] == 0
    assert content(tmp_path) == alone[0]
