"""What the comparisons of `benchmarks.fidelity` start from, and where they keep finished parts."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from activedpo_fast import PreferencePool
from activedpo_fast._files import write_atomic
from activedpo_fast.demo.language_model import load_base, read_prompts, with_fresh_lora
from activedpo_fast.demo.similarity import SynopsisSimilarity
from activedpo_fast.labels import RewardOracle
from activedpo_fast.pool.tokens import tokenize_pool
from activedpo_fast.training.generation import generate_responses
from activedpo_fast.training.loop import ActiveDPOLoop
from activedpo_fast.training.prompts import draw_prompts
from activedpo_fast.training.trl import dpo_config
from benchmarks.fidelity.measures import DEMO, SEED, Case, Record
from benchmarks.machine import describe_run


def prepare(name: str, n_prompts: int, folder: Path) -> Case:
    """The policy `name` of CASES with a pool of its own responses, from disk if they exist."""
    model, tokenizer = policy(name, folder)
    path = folder / f"prompts-{n_prompts}" / f"pool-{name}.jsonl"
    if not path.exists():
        prompts = read_prompts("pool", max_words=DEMO.max_words)
        drawn = draw_prompts(prompts, 0, n_prompts, set(), SEED)
        generate_responses(
            model,
            tokenizer,
            drawn,
            num_generations=DEMO.num_generations,
            seed=SEED,
            **DEMO.generation,
        ).to_jsonl(path)
    pool = PreferencePool.from_jsonl(path)
    tokens = tokenize_pool(pool, tokenizer, max_length=DEMO.dpo["max_length"])
    return Case(name, model, pool, tokens)


def policy(name: str, folder: Path) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The policy `name` of CASES; its round of DPO is read from `folder`, or run there."""
    base, tokenizer = load_base("small")
    model = with_fresh_lora(base, DEMO, SEED)
    if name == "trained":
        prompts = read_prompts("pool", max_words=DEMO.max_words)
        _one_round(model, tokenizer, prompts, folder / "dpo")
    return model, tokenizer


def _one_round(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], folder: Path
) -> None:
    """One round of the demo with random pairs; the model is left with the trained adapter."""
    ActiveDPOLoop(
        model,
        tokenizer,
        prompts,
        RewardOracle(SynopsisSimilarity(), temperature=DEMO.temperature, seed=SEED),
        output_dir=folder,
        dpo_args=dpo_config(output_dir=str(folder / "trainer"), seed=SEED, **DEMO.dpo),
        strategy="random",
        selector_options={"seed": SEED},
        batch_size=DEMO.batch_size,
        rounds=1,
        prompts_per_round=DEMO.prompts_per_round,
        num_generations=DEMO.num_generations,
        **DEMO.generation,
        seed=SEED,
    ).run()


class Part:
    """Records on disk with the key that they were made for; None if the key differs."""

    def __init__(self, path: Path, key: list[Any]) -> None:
        self._path, self._key = path, json.dumps(key)
        found = json.loads(path.read_text()) if path.exists() else {}
        self.records: Record | None = found["records"] if found.get("key") == self._key else None

    def write(self, records: Record) -> None:
        self.records = records
        write_json(self._path, {"key": self._key, "records": records})


def environment() -> Record:
    """The machine and the versions that the figures were made with."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parents[2],
            text=True,
            capture_output=True,
            check=False,
        ).stdout.strip()

    changed = bool(git("status", "--porcelain", "--", "activedpo_fast", "csrc"))
    return {
        **describe_run(),
        "date": date.today().isoformat(),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": changed,
    }


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
