"""Commands in processes of their own that are killed at a chosen moment."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForSequenceClassification

from activedpo_fast.cli.app import main
from activedpo_fast.gradients import extractor
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer

_DIFFERENT = ("seconds.json", "record.json", "command.json", "joules.json", "run.yaml")
_STEPS = ("pwrite", "ftruncate", "replace", "rename", "fsync", "unlink")

_LONGEST = 400.0  # seconds that a process may take, on a slow machine


def run(
    commands: list[list[str]],
    *,
    when: int = 0,
    number: int = signal.SIGKILL,
    largest: int = resource.RLIM_INFINITY,
    around: contextlib.AbstractContextManager[Any] | None = None,
) -> tuple[int, dict[str, int], str]:
    """Run commands in a forked process, killed at step `when` (0: never).

    A step is a call that changes a file, or a backward pass. No file may be of more than `largest`
    bytes, which fails as a full disk does: in the middle of a write. `around` is entered in the
    process, before the commands.

    Returns:
        The exit code (the negative signal), the steps and passes that it made, its stderr.
    """
    return _start(commands, when, number, largest, around, False)()


def run_together(
    commands: list[list[str]],
    *,
    when: dict[int, int] | None = None,
    number: int = signal.SIGKILL,
    largest: int = resource.RLIM_INFINITY,
    in_last: Callable[[pytest.MonkeyPatch], None] | None = None,
) -> list[tuple[int, dict[str, int], str]]:
    """Run each command in a process of its own, as a launcher starts them; see `run`.

    Args:
        when: the step at which a process is killed, by its rank. largest: for the first process.
        in_last: changes something in the last process, before its command.

    Returns:
        What `run` does, for each process; with its stdout in its stderr.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = [
        _start(
            [command],
            (when or {}).get(rank, 0),
            number,
            largest if rank == 0 else resource.RLIM_INFINITY,
            _launched(rank, len(commands), port, in_last if rank == len(commands) - 1 else None),
            True,
        )
        for rank, command in enumerate(commands)
    ]
    return [end() for end in started]


@contextlib.contextmanager
def _launched(
    rank: int, size: int, port: int, change: Callable[[pytest.MonkeyPatch], None] | None
) -> Iterator[None]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        for name, value in names.items():
            patch.setenv(name, str(value))
        if change is not None:
            change(patch)
        yield


def _start(
    commands: list[list[str]],
    when: int,
    number: int,
    largest: int,
    around: contextlib.AbstractContextManager[Any] | None,
    show: bool,
) -> Callable[[], tuple[int, dict[str, int], str]]:
    """Start what `run` runs; the function that is returned waits for its end."""
    # Through pipes: limits and rights concern files alone.
    (read_err, err), (read_counts, counts) = os.pipe(), os.pipe()
    for pipe in (err, counts):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 2**20)  # nobody reads before the end
    child = os.fork()
    if child == 0:
        code = 99
        try:
            # A process in the background of a script is started with SIGINT ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
            with around or contextlib.nullcontext():
                code = _child(err, counts, commands, when, number, show)
        finally:
            os._exit(code)
    os.close(err)
    os.close(counts)

    def end() -> tuple[int, dict[str, int], str]:
        status = _status(child)
        with open(read_err, errors="replace") as said, open(read_counts) as told:
            return (
                os.waitstatus_to_exitcode(status),
                json.loads(told.read().splitlines()[-1]),
                said.read(),
            )

    return end


def _status(child: int) -> int:
    """Wait for a process; one that waits for another that never came is killed at last."""
    end = time.monotonic() + _LONGEST
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return found[1]


def send(number: int) -> Callable[[], None]:
    """Return what sends a signal to the process that calls it."""
    return lambda: os.kill(os.getpid(), number)


def disk_full() -> None:
    """Let every write to a file of the process that calls it fail, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def _child(
    err_pipe: int, told: int, commands: list[list[str]], when: int, number: int, show: bool
) -> int:
    counts = {"steps": 0, "passes": 0}

    def tell() -> None:
        os.write(told, json.dumps(counts).encode() + b"\n")

    def step() -> None:
        counts["steps"] += 1
        if counts["steps"] == when:
            tell()
            os.kill(os.getpid(), number)
            time.sleep(0)  # handlers of other signals run between two instructions

    tell()
    with (
        open(err_pipe, "w") as err,
        open(os.devnull, "w") as out,
        contextlib.redirect_stderr(err),
        contextlib.redirect_stdout(err if show else out),
        _counted(step, counts),
    ):
        os.dup2(err.fileno(), 2)
        code = 99
        try:
            code = next((code for command in commands if (code := main(command))), 0)
        except Exception:
            traceback.print_exc()
    tell()
    return code


@contextlib.contextmanager
def _counted(step: Any, counts: dict[str, int]) -> Iterator[None]:
    real_rows = extractor.captured_rows

    def captured_rows(*args: Any, **kwargs: Any) -> Any:
        step()
        counts["passes"] += 1
        return real_rows(*args, **kwargs)

    def before(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            step()
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "captured_rows", captured_rows)
        for name in _STEPS:
            patch.setattr(os, name, before(getattr(os, name)))
        yield


def project(folder: Path, prompts: int = 6) -> None:
    """Files of a tiny model, an adapter and a pool."""
    base = tiny_causal_lm("llama")
    base.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    lora(base, "llama").save_pretrained(str(folder / "adapter"))
    rows: list[dict[str, Any]] = [
        {"id": f"p{n}", "prompt": f"label {n}?", "responses": [f" fox {n}", " dog" * (n + 1)]}
        for n in range(prompts)
    ]
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"id": row["id"], "prompt": row["prompt"]} for row in rows]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))


def features(files: Path, output: Path) -> list[str]:
    """The command that makes a store of the project's pool, in small batches."""
    return [
        "features",
        str(files / "pool.jsonl"),
        f"--model={files / 'model'}",
        f"--adapter={files / 'adapter'}",
        f"--output={output / 'store'}",
        "--proj-dim=16",
        "--device=cpu",
        "--max-tokens-per-batch=16",
        "--no-verify",
        "--quiet",
    ]


def select(output: Path) -> list[str]:
    """The command that picks pairs of that store."""
    picked = output / "picked.jsonl"
    return ["select", str(output / "store"), "--pairs=3", f"--output={picked}", "--quiet"]


def run_file(files: Path, output: Path) -> list[str]:
    """The command of a run of two rounds with a tiny reward model, which also evaluates."""
    config = {
        "model": str(files / "model"),
        "adapter": str(files / "adapter"),
        "prompts": str(files / "prompts.jsonl"),
        "output_dir": str(output / "run"),
        "device": "cpu",
        "selection": {"proj_dim": 16, "verify": False},
        "loop": {"rounds": 2, "batch_size": 2, "prompts_per_round": 2, "max_completion_length": 4},
        "dpo": {"max_steps": 1, "learning_rate": 0.01},
        "oracle": {"kind": "reward_model", "model": str(files / "reward")},
        "evaluate": {"prompts": str(files / "prompts.jsonl"), "max_completion_length": 2},
    }
    path = output / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["run", str(path), "--quiet"]


def reward_model(folder: Path) -> None:
    torch.manual_seed(0)
    LlamaForSequenceClassification(
        LlamaConfig(
            num_labels=1,
            vocab_size=384,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            pad_token_id=tiny_tokenizer().pad_token_id,
        )
    ).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def content(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder, except those that tell the time or the folder's name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in _DIFFERENT
    }
