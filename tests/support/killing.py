"""Commands in processes of their own that are killed at a chosen moment."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import tempfile
import time
from collections.abc import Iterator
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


def run(
    commands: list[list[str]],
    *,
    when: int = 0,
    number: int = signal.SIGKILL,
    largest: int = resource.RLIM_INFINITY,
) -> tuple[int, dict[str, int], str]:
    """Run commands in a forked process, killed at step `when` (0: never).

    A step is a call that changes a file, or a backward pass. No file may be of more than `largest`
    bytes, which fails as a full disk does: in the middle of a write.

    Returns:
        The exit code (the negative signal), the steps and passes that it made, its stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        if child == 0:
            code = 99
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
                code = _child(Path(folder), commands, when, number)
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        counts = json.loads((Path(folder) / "counts").read_text())
        return os.waitstatus_to_exitcode(status), counts, (Path(folder) / "err").read_text()


def _child(folder: Path, commands: list[list[str]], when: int, number: int) -> int:
    counts = {"steps": 0, "passes": 0}

    def tell() -> None:
        (folder / "counts").write_text(json.dumps(counts))

    def step() -> None:
        counts["steps"] += 1
        if counts["steps"] == when:
            tell()
            os.kill(os.getpid(), number)
            time.sleep(0)  # handlers of other signals run between two instructions

    tell()
    with (
        open(folder / "err", "w") as err,
        open(os.devnull, "w") as out,
        contextlib.redirect_stderr(err),
        contextlib.redirect_stdout(out),
        _counted(step, counts),
    ):
        os.dup2(err.fileno(), 2)
        code = next((code for command in commands if (code := main(command))), 0)
    tell()
    return code


@contextlib.contextmanager
def _counted(step: Any, counts: dict[str, int]) -> Iterator[None]:
    real_pass = extractor.gradient_pass

    def gradient_pass(*args: Any, **kwargs: Any) -> Any:
        step()
        counts["passes"] += 1
        return real_pass(*args, **kwargs)

    def before(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            step()
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "gradient_pass", gradient_pass)
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


def run_file(files: Path, output: Path) -> list[str]:
    """The command of a run of two rounds with a tiny reward model."""
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
