"""The command `activedpo demo`: strategies side by side, on real text and a real model."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from activedpo_fast._files import check_folder_target, write_atomic
from activedpo_fast.demo.language_model import load_base, read_prompts, with_fresh_lora
from activedpo_fast.demo.report import draw, table, verdict
from activedpo_fast.demo.reviews import Rating, load_review_model, read_review_prompts
from activedpo_fast.demo.settings import SETTINGS, DemoSettings
from activedpo_fast.demo.similarity import SynopsisSimilarity
from activedpo_fast.distributed.launcher import require_one_process
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels import Oracle, Reward, RewardOracle
from activedpo_fast.labels.page.oracle import PageOracle
from activedpo_fast.pool.items import Prompt
from activedpo_fast.training.evaluation import HeldoutReward
from activedpo_fast.training.loop import ActiveDPOLoop
from activedpo_fast.training.run_folder import RoundRecord
from activedpo_fast.training.trl import dpo_config

_PERSON_LABELS = 20  # pairs that `--label` asks

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


class _Task(NamedTuple):
    """A model's task: a loader of the fresh model, its prompts, and the reward in `unit`.

    `question` is what a person is asked to judge by.
    """

    load: Callable[[], Loaded]
    prompts: list[Prompt]
    heldout: list[Prompt]
    reward: Reward
    unit: str
    question: str

    @classmethod
    def of(cls, model: str, settings: DemoSettings) -> _Task:
        if model == "reviews":
            pool, heldout = (read_review_prompts(split) for split in ("pool", "heldout"))
            return cls(
                load_review_model,
                pool,
                heldout[: settings.heldout],
                Rating(),
                "rating from −4 to 4",
                "Which review is more favorable?",
            )
        pool, heldout = (
            read_prompts(split, model, max_words=settings.max_words)
            for split in ("pool", "heldout")
        )
        return cls(
            lambda: load_base(model),
            pool,
            heldout[: settings.heldout],
            SynopsisSimilarity(),
            "cosine to the true synopsis",
            "Which is the better synopsis?",
        )


def run_demo(
    *,
    model: str = "reviews",
    output: str | Path = "runs/demo",
    rounds: int | None = None,
    seed: int = 0,
    fresh: bool = False,
    label: bool = False,
    show_progress: bool | None = None,
) -> dict[str, list[RoundRecord]]:
    """Run all strategies from the same start; print the table and write the picture.

    Args:
        model: "reviews" (5.8 million parameters; finishes reviews), or a model that writes
            synopses: "small" (4.2 million parameters) or "smollm2".
        output: a folder; an interrupted demo continues from its contents.
        rounds: overrides the number of rounds.
        seed: seed of everything: adapter, prompts, responses, labels, selection, training.
        fresh: delete the results of an earlier demo in `output`.
        label: a person labels 20 pairs a round in the page of `activedpo label`, one round unless
            `rounds` is given, with ActiveDPO alone.

    Returns:
        The records of the rounds by strategy. The first record is the start, before any label.

    Raises:
        LabelsPending: the person ended before all pairs were labeled.
    """
    require_one_process("activedpo demo")
    if model not in SETTINGS:
        raise ActiveDPOError(f"unknown demo model {model!r}; known: {', '.join(SETTINGS)}")
    check_folder_target(output)
    settings = SETTINGS[model]
    output = Path(output)
    if label:
        output /= "labeled"  # next to a demo without people
        only = {"activedpo": settings.strategies["activedpo"]}
        settings = replace(settings, rounds=1, batch_size=_PERSON_LABELS, strategies=only)
    if rounds is not None:
        settings = replace(settings, rounds=rounds)
    folders = {strategy: output / strategy for strategy in settings.strategies}
    if fresh:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)

    started = time.perf_counter()
    task = _Task.of(model, settings)
    runs: dict[str, list[RoundRecord]] = {}
    for strategy, folder in folders.items():
        print(
            f"\n== {strategy}: {settings.rounds} rounds of {settings.batch_size} labels", flush=True
        )
        oracle = (
            PageOracle(folder / "labeling", question=task.question, ready=_announce)
            if label
            else RewardOracle(task.reward, temperature=settings.temperature, seed=seed)
        )
        runs[strategy] = _run_strategy(
            strategy, settings, task, oracle, folder, seed, show_progress
        )

    text, said = table(runs), verdict(runs, folders)
    write_atomic(output / "table.md", f"{text}\n\n{said}\n")
    title = f"{model} model, seed {seed}, {len(task.heldout)} held-out prompts"
    picture = output / "curves.png"
    draw(runs, picture, title, task.unit)
    print(
        f"\n{text}\n\n{said}\n\ntable: {output / 'table.md'}   picture: {picture}   "
        f"{time.perf_counter() - started:.0f} s in all"
    )
    return runs


def _announce(address: str) -> None:
    print(
        f"Your turn: label the pairs at {address}\n(every answer is saved; press Finish there "
        "when all are done)",
        flush=True,
    )


def _run_strategy(
    strategy: str,
    settings: DemoSettings,
    task: _Task,
    oracle: Oracle,
    folder: Path,
    seed: int,
    show_progress: bool | None,
) -> list[RoundRecord]:
    base, tokenizer = task.load()
    evaluation = HeldoutReward(
        task.heldout,
        task.reward,
        output_dir=folder,
        processing_class=tokenizer,
        show_progress=show_progress,
        **settings.evaluation,
    )

    def evaluate(model: object) -> dict[str, float]:
        metrics = evaluation(model)  # type: ignore[arg-type]
        if show_progress is not False:
            print(
                f"   held-out reward {metrics['reward']:.3f}, over the start "
                f"{metrics['gain']:+.3f} ± {metrics['gain_se']:.3f}",
                flush=True,
            )
        return metrics

    return ActiveDPOLoop(
        with_fresh_lora(base, settings, seed),
        tokenizer,
        task.prompts,
        oracle,
        output_dir=folder,
        dpo_args=dpo_config(output_dir=str(folder / "trainer"), seed=seed, **settings.dpo),
        strategy=strategy,
        selector_options={**settings.selection, **settings.strategies[strategy], "seed": seed},
        batch_size=settings.batch_size,
        rounds=settings.rounds,
        prompts_per_round=settings.prompts_per_round,
        num_generations=settings.num_generations,
        **settings.generation,
        evaluate=evaluate,
        seed=seed,
        show_progress=show_progress,
    ).run()
