"""Commands in processes of their own that are killed at a chosen moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer

# Kills itself with a signal at the n-th of the calls that change a file or compute a batch.
_CHILD = """
import json, os, signal, sys
when, number, argv = json.loads(sys.argv[1])
count = passes = 0

def step():
    global count
    count += 1
    if count == when:
        print(json.dumps({"steps": count, "passes": passes}), flush=True)
        os.kill(os.getpid(), number)
        if number == signal.SIGTERM:
            signal.sigtimedwait([], 0.01)  # the handler runs between two instructions

def before(name):
    real = getattr(os, name)
    def call(*args, **kwargs):
        step()
        return real(*args, **kwargs)
    setattr(os, name, call)

for name in ("pwrite", "ftruncate", "replace", "rename", "fsync", "unlink"):
    before(name)
from activedpo_fast.gradients import extractor
real_pass = extractor.gradient_pass

def gradient_pass(*args, **kwargs):
    global passes
    step()
    passes += 1
    return real_pass(*args, **kwargs)

extractor.gradient_pass = gradient_pass
import torch
torch.set_num_threads(1)
from activedpo_fast.cli.app import main
for command in argv:
    code = main(command)
    if code:
        break
print(json.dumps({"steps": count, "passes": passes}))
sys.exit(code)
"""


def run(
    commands: list[list[str]], *, when: int = 0, number: int = signal.SIGKILL
) -> tuple[int, dict[str, int], str]:
    """Run commands, killed at step `when` (0: never): exit code, what it counted, its stderr.

    A step is a call that changes a file, or a backward pass.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps([when, int(number), commands])],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    counted = done.stdout.splitlines()[-1:] or ["{}"]
    return done.returncode, json.loads(counted[0]), done.stderr


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


def content(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
