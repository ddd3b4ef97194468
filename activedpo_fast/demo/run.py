"""`activedpo demo`: ActiveDPO and random selection side by side, on real text and a real model."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from activedpo_fast._files import write_atomic
from activedpo_fast.data import Prompt
from activedpo_fast.demo.language_model import load_base, read_prompts, with_fresh_lora
from activedpo_fast.demo.report import draw, table
from activedpo_fast.demo.settings import SETTINGS, DemoSettings
from activedpo_fast.demo.similarity import SynopsisSimilarity
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.generation import respond
from activedpo_fast.labeling import RewardOracle
from activedpo_fast.loop import ActiveDPOLoop, RoundRecord
from activedpo_fast.processes import require_one_process
from activedpo_fast.trl import dpo_config

STRATEGIES = ("activedpo", "random")


def run_demo(
    *,
    model: str = "small",
    output: str | Path = "runs/demo",
    rounds: int | None = None,
    seed: int = 0,
    fresh: bool = False,
    show_progress: bool | None = None,
) -> dict[str, list[RoundRecord]]:
    """Run both strategies from the same start; print the table and write the picture.

    Args:
        model: "small", the vendored model, or "smollm2".
        output: a folder; an interrupted demo continues from what is in it.
        rounds: overrides the number of rounds.
        seed: of everything: adapter, prompts, responses, labels, selection, training.
        fresh: delete what an earlier demo left in `output`.

    Returns:
        The records of the rounds by strategy; the first is the start, before any label.
    """
    require_one_process("activedpo demo")
    if model not in SETTINGS:
        raise ActiveDPOError(f"unknown demo model {model!r}; known: {', '.join(SETTINGS)}")
    settings = SETTINGS[model]
    if rounds is not None:
        settings = replace(settings, rounds=rounds)
    folder = Path(output)
    if fresh:
        for strategy in STRATEGIES:
            shutil.rmtree(folder / strategy, ignore_errors=True)

    started = time.perf_counter()
    similarity = SynopsisSimilarity()
    pool = read_prompts("pool", model, max_words=settings.max_words)
    heldout = read_prompts("heldout", model, max_words=settings.max_words)[: settings.heldout]
    runs: dict[str, list[RoundRecord]] = {}
    for strategy in STRATEGIES:
        print(f"\n== {strategy}: {settings.rounds} rounds of {settings.batch_size} labels",
              flush=True)
        runs[strategy] = _run_strategy(
            strategy, model, settings, pool, heldout, similarity, folder, seed, show_progress
        )

    text = table(runs)
    write_atomic(folder / "table.md", text + "\n")
    title = f"{model} model, seed {seed}, {settings.heldout} held-out prompts"
    draw(runs, folder / "curves.png", title)
    print(f"\n{text}\n\ntable: {folder / 'table.md'}   picture: {folder / 'curves.png'}   "
          f"{time.perf_counter() - started:.0f} s in all")
    return runs


def _run_strategy(
    strategy: str,
    model_name: str,
    settings: DemoSettings,
    prompts: list[Prompt],
    heldout: list[Prompt],
    similarity: SynopsisSimilarity,
    folder: Path,
    seed: int,
    show_progress: bool | None,
) -> list[RoundRecord]:
    base, tokenizer = load_base(model_name)
    run_folder = folder / strategy
    loop = ActiveDPOLoop(
        with_fresh_lora(base, settings, seed),
        tokenizer,
        prompts,
        RewardOracle(similarity, temperature=settings.temperature, seed=seed),
        output_dir=run_folder,
        dpo_args=dpo_config(output_dir=str(run_folder / "trainer"), seed=seed, **settings.dpo),
        strategy=strategy,
        selector_options={**settings.selection, "seed": seed},
        batch_size=settings.batch_size,
        rounds=settings.rounds,
        prompts_per_round=settings.prompts_per_round,
        n_responses=settings.n_responses,
        generation=settings.generation,
        evaluate=_evaluation(tokenizer, heldout, similarity, settings, show_progress),
        seed=seed,
        show_progress=show_progress,
    )
    return loop.run()


def _evaluation(
    tokenizer: PreTrainedTokenizerBase,
    heldout: list[Prompt],
    similarity: SynopsisSimilarity,
    settings: DemoSettings,
    show_progress: bool | None,
) -> Callable[[PeftModel], dict[str, float]]:
    def evaluate(model: PeftModel) -> dict[str, float]:
        responses = respond(
            model,
            tokenizer,
            heldout,
            max_new_tokens=settings.generation["max_new_tokens"],
            batch_size=settings.generation["batch_size"],
            show_progress=show_progress,
        )
        rewards = np.array(
            similarity([p.prompt for p in heldout], responses, [p.extra for p in heldout])
        )
        reward = float(rewards.mean())
        error = float(rewards.std(ddof=1) / np.sqrt(len(rewards)))
        if show_progress is not False:
            print(f"   held-out reward {reward:.4f} ± {error:.4f}", flush=True)
        return {"reward": reward, "reward_se": error}

    return evaluate
