"""`ActiveDPOLoop`: rounds of generate, select, label and train, with their state on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft import PeftModel, load_peft_weights
from transformers import PreTrainedTokenizerBase

from activedpo_fast._files import write_atomic
from activedpo_fast.data import PreferencePool, Prompt, check_prompts
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.generation import generate_responses
from activedpo_fast.labeling import Oracle
from activedpo_fast.selection.prompts import distinct_prompts, same_prompt
from activedpo_fast.selection.result import SKIP, Selection, by_preference, read_labels
from activedpo_fast.selection.rules import PickRules
from activedpo_fast.selector import ActiveDPOSelector
from activedpo_fast.trl import load_adapter_state, selector_settings, train_dpo

if TYPE_CHECKING:
    from trl import DPOConfig

logger = logging.getLogger(__name__)

START = -1


@dataclass
class RoundRecord:
    """What a round cost and what it led to.

    Attributes:
        round: 0, 1, ...; -1 for the record of the start, before any label.
        labels_total: labels so far, this round's among them, without "no preference".
        metrics: of `evaluate`, after this round's training.
        seconds: by stage: generate, features, select, label, train, evaluate.
        strategy: that made this round's selection.
    """

    round: int
    labels_total: int
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    strategy: str = ""


class ActiveDPOLoop:
    """Rounds of active DPO: sample responses, pick pairs, have them labelled, train, repeat.

    Everything is written under `output_dir` as it comes about: `config.json`, `start/` and
    `round-000/` with `pool.jsonl`, `picked.jsonl`, `labels.jsonl`, `adapter/` and `record.json`.
    `run` continues at the first stage that is not complete, with the results of a run that was
    never interrupted (as far as `oracle` and `evaluate` are reproducible), and from the initial
    adapter on disk. Folders of complete rounds are not written to again; `rounds` may be raised.

    Args:
        model: a PEFT model, adapter "default". Its weights are the policy's start.
        prompts: each round takes `prompts_per_round` of them in a seeded order, going on where the
            last round ended and around. Prompts whose pairs were labelled are offered again only
            where all others do not suffice; a warning says so. Prompts with the same text are one
            (see `PickRules.prompt_by`): it is offered as the first of them.
        oracle: see `activedpo_fast.labeling`. A `LabelsPending` from it passes through `run`. A
            round in which no pair gets a preference is not trained on: its adapter is that before.
        dpo_args: see `activedpo_fast.trl.dpo_config`; the same in each round.
        strategy, selector_options: for `ActiveDPOSelector`. beta, max_length and truncation_mode
            are those of `dpo_args` unless given.
        batch_size: pairs labelled a round (B).
        n_responses, generation: for `generate_responses`.
        rules: what each round's picks have to observe, see `PickRules`; ids, groups and costs are
            those of `prompts`. Prompts to exclude get no responses. A round that the rules leave no
            pair, or none that reaches `min_score`, ends the run with an error.
        train_on: "all" labels so far or the "newest" round's. *The paper does not state it.*
        start_from: each round trains from the "initial" adapter or from the "current" one. *The
            paper does not state it.*
        reference: π_ref, the "initial" policy or that at the start of the "round" (the weights that
            training starts from). *The paper does not state it.*
        evaluate: metrics of the model, taken before the first round and after each.
        seed: of the order of prompts and, with the round's number, of the responses.

    Raises:
        ActiveDPOError: bad options; from `run` also where `output_dir` holds a run with other
            settings (naming the first that differs), and errors of the stages.
    """

    def __init__(
        self,
        model: PeftModel,
        processing_class: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        oracle: Oracle,
        *,
        output_dir: str | Path,
        dpo_args: DPOConfig,
        strategy: str = "activedpo",
        selector_options: dict[str, Any] | None = None,
        batch_size: int = 50,
        rounds: int = 5,
        prompts_per_round: int = 1000,
        n_responses: int = 3,
        generation: dict[str, Any] | None = None,
        rules: PickRules | None = None,
        train_on: Literal["all", "newest"] = "all",
        start_from: Literal["initial", "current"] = "initial",
        reference: Literal["initial", "round"] = "initial",
        evaluate: Callable[[PeftModel], dict[str, float]] | None = None,
        seed: int = 0,
        show_progress: bool | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("rounds", rounds),
                            ("prompts_per_round", prompts_per_round)):
            if value < 1:
                raise ActiveDPOError(f"{name}: {value} is below 1")
        for name, choice, known in (("train_on", train_on, ("all", "newest")),
                                    ("start_from", start_from, ("initial", "current")),
                                    ("reference", reference, ("initial", "round"))):
            if choice not in known:
                raise ActiveDPOError(f"{name}: {choice!r} is none of {', '.join(known)}")
        check_prompts(prompts)
        excluded: set[str] = set()
        if rules is not None:
            rules.check(prompts)
            excluded.update(rules.excluded(prompts))
        self.model = model
        self.processing_class = processing_class
        self.prompts = list(prompts)
        self._prompt_by = None if rules is None else rules.prompt_by
        distinct = distinct_prompts(self.prompts, self._prompt_by)
        if len(distinct) < len(self.prompts):
            logger.info("%d of %d prompts repeat the text of an earlier one: it is offered once, "
                        "as the first", len(self.prompts) - len(distinct), len(self.prompts))
        self._offered = [prompt for prompt in distinct if prompt.id not in excluded]
        if not self._offered:
            raise ActiveDPOError("exclude: no prompt is left")
        self.oracle = oracle
        self.output_dir = Path(output_dir)
        self.dpo_args = dpo_args
        self.batch_size = batch_size
        self.rounds = rounds
        self.prompts_per_round = prompts_per_round
        self.generation = {"n_responses": n_responses, **(generation or {})}
        self.rules = rules
        self.train_on = train_on
        self.start_from = start_from
        self.reference = reference
        self.evaluate = evaluate
        self.seed = seed
        self.show_progress = show_progress
        self.strategy = strategy
        options = {**selector_settings(dpo_args), **(selector_options or {})}
        self.selector = ActiveDPOSelector(
            model, processing_class=processing_class, strategy=strategy, **options)
        self._settings = _plain({
            "model": getattr(model.get_base_model().config, "_name_or_path", ""),
            "strategy": strategy,
            "selector_options": options,
            "batch_size": batch_size,
            "prompts_per_round": prompts_per_round,
            "prompts": _digest([[p.id, p.prompt] for p in self.prompts]),
            "generation": self.generation,
            "rules": rules and {**asdict(rules), "exclude": _digest(sorted(rules.exclude))},
            "train_on": train_on,
            "start_from": start_from,
            "reference": reference,
            "seed": seed,
            "dpo": {name: value for name, value in dpo_args.to_dict().items()
                    if name not in ("output_dir", "logging_dir", "run_name")},
        })

    def run(self) -> list[RoundRecord]:
        """Run what is not on disk yet; the records of the start and of all rounds."""
        self._check_settings()
        start = self.output_dir / "start"
        if not (start / "adapter").exists():
            _save_adapter(self.model, start / "adapter")
        self._initial = load_peft_weights(str(start / "adapter"), device="cpu")
        self._load(start)
        records = [self._record(start, START, 0)]
        history: list[tuple[Selection, list[int | None]]] = []
        for t in range(self.rounds):
            folder = self._folder(t)
            history.append(self._labels(t, folder, history))
            self._train(folder, self._folder(t - 1) if t else start, history)
            self._load(folder)
            total = sum(label is not None for _, labels in history for label in labels)
            records.append(self._record(folder, t, total))
        return records

    # -- stages: each does nothing but read where its result is on disk --------------------------

    def _labels(
        self, t: int, folder: Path, history: list[tuple[Selection, list[int | None]]]
    ) -> tuple[Selection, list[int | None]]:
        path = folder / "labels.jsonl"
        if not path.exists():
            pool = self._pool(t, folder, history)
            picked = self._picked(folder, pool, history)
            with _timed(folder, "label"):
                labels = self.oracle.label(picked, pool)
            picked.to_dataset(labels)  # checks them
            _write_labels(path, picked, labels)
        return read_labels(path, strategy=self.strategy, all_answered=True)

    def _pool(
        self, t: int, folder: Path, history: list[tuple[Selection, list[int | None]]]
    ) -> PreferencePool:
        path = folder / "pool.jsonl"
        if not path.exists():
            asked = same_prompt(self.prompts, {p.id for picks, _ in history for p in picks},
                                self._prompt_by)
            prompts = draw_prompts(self._offered, t, self.prompts_per_round, asked, self.seed)
            seed = int(_digest([self.seed, t])[:12], 16)
            with _timed(folder, "generate"):
                pool = generate_responses(self.model, self.processing_class, prompts, seed=seed,
                                          show_progress=self.show_progress, **self.generation)
            pool.to_jsonl(path)
        # Read back in any case: an interrupted run then sees what an uninterrupted one does.
        return PreferencePool.from_jsonl(path)

    def _picked(
        self, folder: Path, pool: PreferencePool,
        history: list[tuple[Selection, list[int | None]]],
    ) -> Selection:
        path = folder / "picked.jsonl"
        if not path.exists():
            split = [by_preference(*past) for past in history]
            rules = self.rules and self.rules.within(pool)
            picked = self.selector.select(
                pool, self.batch_size, labelled=[with_one for with_one, _ in split],
                asked=[without for _, without in split], rules=rules,
                show_progress=self.show_progress)
            if not picked:
                raise ActiveDPOError(f"{folder.name}: no pair reaches min_score: nothing to label")
            _add_seconds(folder, self.selector.last_timings)
            picked.to_jsonl(path)
        return Selection.from_jsonl(path, strategy=self.strategy)

    def _train(
        self, folder: Path, before: Path, history: list[tuple[Selection, list[int | None]]]
    ) -> None:
        if (folder / "adapter").exists():
            return
        newest = history[-1][1]
        if all(label is None for label in newest):
            logger.info("%s: none of its %d pairs got a preference: there is nothing new to train "
                        "on, and the adapter stays as it was", folder.name, len(newest))
            self._load(before)
            _save_adapter(self.model, folder / "adapter")
            return
        used = history if self.train_on == "all" else history[-1:]
        picks = Selection(tuple(p for selection, _ in used for p in selection), self.strategy)
        dataset = picks.to_dataset([label for _, labels in used for label in labels])
        if self.start_from == "initial":
            load_adapter_state(self.model, self._initial)
        else:
            self._load(before)
        with _timed(folder, "train"):
            train_dpo(self.model, self.processing_class, dataset, self.dpo_args,
                      reference=self.reference, initial_adapter=self._initial,
                      show_progress=self.show_progress)
        _save_adapter(self.model, folder / "adapter")

    def _record(self, folder: Path, t: int, labels_total: int) -> RoundRecord:
        path = folder / "record.json"
        if not path.exists():
            metrics: dict[str, float] = {}
            with _timed(folder, "evaluate"):
                if self.evaluate is not None:
                    metrics = {k: float(v) for k, v in self.evaluate(self.model).items()}
            record = RoundRecord(t, labels_total, metrics, _read_seconds(folder), self.strategy)
            _write_json(path, asdict(record))
        return RoundRecord(**_read_json(path))

    # -- helpers ---------------------------------------------------------------------------------

    def _folder(self, t: int) -> Path:
        return self.output_dir / f"round-{t:03d}"

    def _load(self, folder: Path) -> None:
        weights = load_peft_weights(str(folder / "adapter"), device="cpu")
        load_adapter_state(self.model, weights)

    def _check_settings(self) -> None:
        path = self.output_dir / "config.json"
        if path.exists():
            name = _first_difference(_read_json(path)["settings"], self._settings)
            if name is not None:
                raise ActiveDPOError(f"{self.output_dir} holds a run with other settings: {name} "
                                     "differs; use another output_dir, or the same settings")
        else:
            versions = {name: version(name) for name in ("torch", "transformers", "peft", "trl")}
            _write_json(path, {"settings": self._settings, "versions": versions})


def read_records(output_dir: str | Path) -> list[RoundRecord]:
    """The records of the start and of the complete rounds of a run, in order."""
    folder = Path(output_dir)
    paths = [folder / "start" / "record.json", *sorted(folder.glob("round-*/record.json"))]
    records = [RoundRecord(**_read_json(path)) for path in paths if path.exists()]
    if not records:
        raise ActiveDPOError(f"{folder}: no records of a run")
    return records


def draw_prompts(
    prompts: Sequence[Prompt], t: int, n: int, asked: set[str], seed: int
) -> list[Prompt]:
    """The prompts of round t: up to `n` distinct ones, those in `asked` last.

    The order is a permutation that depends on `seed`, entered at t·n and followed around.
    """
    order = list(prompts)
    random.Random(seed).shuffle(order)
    first = t * n % len(order)
    order = order[first:] + order[:first]
    fresh = [prompt for prompt in order if prompt.id not in asked]
    if len(fresh) < min(n, len(order)):
        logger.warning("round %d: only %d prompts were not labelled yet; %d others are offered "
                       "again", t, len(fresh), min(n, len(order)) - len(fresh))
    return [*fresh, *(prompt for prompt in order if prompt.id in asked)][:n]


def _write_labels(path: Path, picked: Selection, labels: Sequence[int | None]) -> None:
    lines = []
    for pick, label in zip(picked, labels, strict=True):
        answer = SKIP if label is None else label
        lines.append(json.dumps({**asdict(pick), "label": answer}, ensure_ascii=False) + "\n")
    write_atomic(path, "".join(lines))


def _save_adapter(model: PeftModel, folder: Path) -> None:
    """`save_pretrained` into a temporary folder that is then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".adapter-", dir=folder.parent))
    try:
        model.save_pretrained(str(temporary), selected_adapters=["default"],
                              save_embedding_layers=False)
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _timed(folder: Path, stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    _add_seconds(folder, {stage: time.perf_counter() - started})


def _add_seconds(folder: Path, seconds: Mapping[str, float]) -> None:
    _write_json(folder / "seconds.json", {**_read_seconds(folder), **seconds})


def _read_seconds(folder: Path) -> dict[str, float]:
    path = folder / "seconds.json"
    return _read_json(path) if path.exists() else {}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ActiveDPOError(f"{path}: broken JSON: {error}") from error


def _write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """`value` as JSON gives it back; objects (a reference model, say) by the name of their type."""
    return json.loads(json.dumps(value, default=lambda other: type(other).__name__))


def _first_difference(old: Any, new: Any, name: str = "") -> str | None:
    """"name (old, now new)" of the first entry that differs, or None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            found = _first_difference(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
            if found is not None:
                return found
        return None
    return None if old == new else f"{name} ({old!r}, now {new!r})"
