"""`ActiveDPOLoop`: rounds of generate, select, label and train, with the state on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from activedpo_fast._files import FilePath
from activedpo_fast._locks import locked_folder
from activedpo_fast.distributed.launcher import require_one_process
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels import Oracle
from activedpo_fast.labels.reading import by_preference, read_labels
from activedpo_fast.models.adapters import adapter_state, load_adapter_state
from activedpo_fast.models.fingerprints import is_untrained, policy_settings
from activedpo_fast.models.named import as_policy
from activedpo_fast.pool.columns import check_json_columns
from activedpo_fast.pool.items import Prompt, check_prompts
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.reading import as_prompts
from activedpo_fast.pool.template import one_setting, own_template_kwargs
from activedpo_fast.selection.prompts import distinct_prompts, same_prompt
from activedpo_fast.selection.result import Selection
from activedpo_fast.selection.rules import PickRules
from activedpo_fast.selection.strategies import STRATEGIES, Strategy
from activedpo_fast.selector import ActiveDPOSelector
from activedpo_fast.training.checksums import check, write_recorded
from activedpo_fast.training.generation import generate_responses
from activedpo_fast.training.rehearsal import rehearse
from activedpo_fast.training.resuming import check_settings, write_settings
from activedpo_fast.training.run_folder import (
    START,
    RoundRecord,
    add_seconds,
    read_adapter,
    read_record,
    read_seconds,
    remove_leftovers,
    save_adapter,
    timed,
    write_labels,
    write_record,
)
from activedpo_fast.training.trl import selector_settings, train_dpo

if TYPE_CHECKING:
    import datasets
    from trl import DPOConfig

logger = logging.getLogger(__name__)


class ActiveDPOLoop:
    """Run rounds of active DPO: sample responses, pick pairs, have them labeled, train, repeat.

    Everything is written under `output_dir` as it happens: `config.json`, `start/` and
    `round-000/` with `pool.jsonl`, `picked.jsonl`, `labels.jsonl`, `adapter/` and `record.json`.
    `run` resumes at the first incomplete stage, from the initial adapter on disk. The results are
    those of an uninterrupted run, as far as `oracle` and `evaluate` are reproducible. Folders of
    complete rounds are not written to again. `rounds` may be increased, and a setting may change
    as long as nothing on disk depends on it (`dpo_args`, for example, until the first round is
    trained). The base model (weights, dtype, config, EOS ids), the LoRA configuration and the
    tokenizer have to be those that the run began with. The adapter has to have the weights of
    `start/` or of a round; it may also be fresh (B = 0) if that of `start/` is. The tokenizer is
    saved next to every adapter.

    Before a run begins, or resumes with changed settings, it is rehearsed: all prompts are encoded,
    and dummy pairs are generated, selected and trained on for one step (see
    `activedpo_fast.training.rehearsal`). Settings that cannot work are refused at that point, and
    nothing is written.

    Args:
        model: a PEFT model with the adapter "default", or the folder or hub name of an adapter, as
            in `ActiveDPOSelector`. Its weights are the initial policy. The trained model is
            `loop.model`.
        processing_class: its tokenizer; None for that of a model given by name.
        prompts: `Prompt`s, or a `datasets.Dataset` with a column `prompt`. Each round takes
            `prompts_per_round` of them in a seeded order, continuing where the last round ended and
            wrapping around. Prompts with labeled pairs are offered again only if the others are not
            enough; this is logged as a warning. Prompts with the same text count as one (see
            `PickRules.prompt_by`), offered as the first of them.
        oracle: see `activedpo_fast.labels`. If it raises `LabelsPending`, so does `run`. A round
            in which no pair gets a preference is not trained on and keeps the previous adapter.
        dpo_args: see `activedpo_fast.training.trl.dpo_config`; the same in each round.
        strategy, selector_options: for `ActiveDPOSelector`; `strategy` may also be a `Strategy`.
            beta, max_length, truncation_mode and length_normalized come from `dpo_args` unless
            given (see `selector_settings`, which also refuses what selection cannot follow);
            ref_model is set by the loop.
        batch_size: pairs labeled per round (B).
        n_responses, generation: for `generate_responses`.
        chat_template_kwargs: passed to the chat template by all stages: generating, selecting and
            training. They may also be in `selector_options` or `generation`, if all given values
            agree.
        rules: constraints on each round's picks, see `PickRules`; ids, groups and costs are
            those of `prompts`. Excluded prompts get no responses. If the rules leave a round no
            pair, or none that reaches `min_score`, the run ends with an error.
        train_on: "all" labels so far or the "newest" round's. *The paper does not state it.*
        start_from: each round trains from the "initial" adapter or from the "current" one. *The
            paper does not state it.*
        reference: π_ref, the "initial" policy or the one at the start of the "round" (the weights
            that training starts from). *The paper does not state it.* Strategies that need π_ref
            use the same one. With "round" and `start_from="current"`, π_ref is the policy itself
            at selection, and all reward differences are 0.
        evaluate: returns metrics of the model; called before the first round and after each.
        seed: for the order of the prompts and, with the round's number, for the responses.
        extra_settings: JSON values that the run depends on and the loop cannot see, for example
            the oracle's. They are compared with the other settings when a run is resumed.

    Raises:
        ActiveDPOError: bad options. From `run` also: `output_dir` holds a run with other settings,
            or with another model, adapter or tokenizer (naming the first difference that matters);
            a launcher has started several processes; errors of the rehearsal, which begin with the
            section at fault; errors of the stages.

    Examples:
        >>> from activedpo_fast import ActiveDPOLoop
        >>> from activedpo_fast.labels import CallableOracle
        >>> oracle = CallableOracle(lambda prompt, a, b: int(len(b) < len(a)))
        >>> loop = ActiveDPOLoop(
        ...     model, tokenizer, prompts, oracle, output_dir="run", dpo_args=dpo_args,
        ...     rounds=2, batch_size=2, generation={"max_new_tokens": 8})
        >>> [record.labels_total for record in loop.run()]
        [0, 2, 4]
    """

    def __init__(
        self,
        model: PeftModel | FilePath,
        processing_class: PreTrainedTokenizerBase | None,
        prompts: Sequence[Prompt] | datasets.Dataset,
        oracle: Oracle,
        *,
        output_dir: str | Path,
        dpo_args: DPOConfig,
        strategy: str | Strategy = "activedpo",
        selector_options: dict[str, Any] | None = None,
        batch_size: int = 50,
        rounds: int = 5,
        prompts_per_round: int = 1000,
        n_responses: int = 3,
        generation: dict[str, Any] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        rules: PickRules | None = None,
        train_on: Literal["all", "newest"] = "all",
        start_from: Literal["initial", "current"] = "initial",
        reference: Literal["initial", "round"] = "initial",
        evaluate: Callable[[PeftModel], dict[str, float]] | None = None,
        seed: int = 0,
        extra_settings: Mapping[str, Any] | None = None,
        show_progress: bool | None = None,
    ) -> None:
        for name, value in (
            ("batch_size", batch_size),
            ("rounds", rounds),
            ("prompts_per_round", prompts_per_round),
        ):
            if value < 1:
                raise ActiveDPOError(f"{name}: {value} is below 1")
        for name, choice, known in (
            ("train_on", train_on, ("all", "newest")),
            ("start_from", start_from, ("initial", "current")),
            ("reference", reference, ("initial", "round")),
        ):
            if choice not in known:
                raise ActiveDPOError(f"{name}: {choice!r} is none of {', '.join(known)}")
        prompts = as_prompts(prompts)
        check_prompts(prompts)
        for n, prompt in enumerate(prompts, start=1):
            check_json_columns(prompt.extra, f"prompt {n}")
        excluded: set[str] = set()
        if rules is not None:
            rules.check(prompts)
            excluded.update(rules.excluded(prompts))
        self.prompts = list(prompts)
        self._prompt_by = None if rules is None else rules.prompt_by
        distinct = distinct_prompts(self.prompts, self._prompt_by)
        if len(distinct) < len(self.prompts):
            logger.info(
                "%d of %d prompts repeat the text of an earlier one: it is offered once, "
                "under its first id",
                len(self.prompts) - len(distinct),
                len(self.prompts),
            )
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
        self.strategy = strategy if isinstance(strategy, str) else strategy.name
        options = {**selector_settings(dpo_args), **(selector_options or {})}
        if "ref_model" in options:
            raise ActiveDPOError(
                "selector_options: 'ref_model' is what the loop trains against; "
                "set reference instead"
            )
        self.chat_template_kwargs = one_setting(
            {
                "chat_template_kwargs": chat_template_kwargs,
                "selector_options.chat_template_kwargs": options.pop("chat_template_kwargs", None),
                "generation.chat_template_kwargs": self.generation.pop(
                    "chat_template_kwargs", None
                ),
            }
        )
        self.model, self.processing_class = as_policy(model, processing_class)  # last: it is slow
        self.selector = ActiveDPOSelector(
            self.model,
            processing_class=self.processing_class,
            strategy=strategy,
            chat_template_kwargs=self.chat_template_kwargs,
            **options,
        )
        if (reference, start_from) == ("round", "current") and "ref_logps" in (
            STRATEGIES[strategy] if isinstance(strategy, str) else strategy
        ).requires:
            logger.warning(
                "strategy %r compares the policy with the reference, but with reference "
                "'round' and start_from 'current' they are the same at selection: "
                "every reward difference is 0",
                self.strategy,
            )
        self._settings = _plain(
            {
                "model": getattr(self.model.get_base_model().config, "_name_or_path", ""),
                "strategy": (
                    strategy
                    if isinstance(strategy, str)
                    else {"name": strategy.name, **vars(strategy)}
                ),
                "chat_template_kwargs": self.chat_template_kwargs,
                "selector_options": options,
                "batch_size": batch_size,
                "prompts_per_round": prompts_per_round,
                "prompts": _digest([_identity(p) for p in self.prompts]),
                "generation": self.generation,
                "rules": rules and {**asdict(rules), "exclude": _digest(sorted(rules.exclude))},
                "train_on": train_on,
                "start_from": start_from,
                "reference": reference,
                "seed": seed,
                "dpo": {
                    name: value
                    for name, value in dpo_args.to_dict().items()
                    if name not in ("output_dir", "logging_dir", "run_name")
                }
                | {"pad_token": dpo_args.pad_token},  # `to_dict` masks it like a secret
                "oracle": _oracle_settings(oracle),
                "extra_settings": dict(extra_settings or {}),
            }
        )

    def run(self) -> list[RoundRecord]:
        """Run what is not on disk yet; return the records of the start and of all rounds."""
        require_one_process("ActiveDPOLoop.run")
        with locked_folder(self.output_dir):
            remove_leftovers(self.output_dir)
            return self._run()

    def _run(self) -> list[RoundRecord]:
        if "strftime_now" in str(self.processing_class.chat_template):
            logger.warning(
                "the chat template uses the current date: rounds on different days have "
                "different prompts"
            )
        settings = self._settings | policy_settings(self.model, self.processing_class)
        mended = check_settings(self.output_dir, settings)
        start = self.output_dir / "start"
        begun = (start / "adapter").exists()
        if begun:
            self._check_adapter(start)
        elif any(self.output_dir.glob("round-*/adapter")):
            raise ActiveDPOError(
                f"{start / 'adapter'} is gone, from which the rounds of "
                f"{self.output_dir} go on: put it back, or use another output_dir"
            )
        if mended or not (self._folder(0) / "pool.jsonl").exists():
            self._rehearse()  # before anything is written
        write_settings(self.output_dir, settings, mended)
        if not begun:
            save_adapter(self.model, self.processing_class, start / "adapter")
        self._initial = read_adapter(start)
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

    # -- stages: each only reads its result if it is already on disk -----------------------------

    def _labels(
        self, t: int, folder: Path, history: list[tuple[Selection, list[int | None]]]
    ) -> tuple[Selection, list[int | None]]:
        path = folder / "labels.jsonl"
        if not path.exists():
            pool = self._pool(t, folder, history)
            picked = self._picked(folder, pool, history)
            with timed(folder, "label"):
                labels = self.oracle.label(picked, pool)
            picked.to_dataset(labels)  # checks them
            write_labels(path, picked, labels)
        check(folder, path.name)
        return read_labels(path, strategy=self.strategy, all_answered=True)

    def _pool(
        self, t: int, folder: Path, history: list[tuple[Selection, list[int | None]]]
    ) -> PreferencePool:
        path = folder / "pool.jsonl"
        if not path.exists():
            asked = same_prompt(
                self.prompts, {p.id for picks, _ in history for p in picks}, self._prompt_by
            )
            prompts = draw_prompts(self._offered, t, self.prompts_per_round, asked, self.seed)
            seed = int(_digest([self.seed, t])[:12], 16)
            with timed(folder, "generate"):
                pool = generate_responses(
                    self.model,
                    self.processing_class,
                    prompts,
                    seed=seed,
                    chat_template_kwargs=self.chat_template_kwargs,
                    show_progress=self.show_progress,
                    **self.generation,
                )
            write_recorded(path, pool.jsonl())
        check(folder, path.name)
        # Always read it back, so that interrupted and uninterrupted runs see the same.
        return self._with_columns_of_now(PreferencePool.from_jsonl(path), folder)

    def _with_columns_of_now(self, pool: PreferencePool, folder: Path) -> PreferencePool:
        """Return the pool with its prompts' current columns, which rules and oracles read."""
        columns = {prompt.id: _plain(prompt.extra) for prompt in self.prompts}
        changed = sorted(
            {
                name
                for item in pool
                for extra in [columns.get(item.id, item.extra)]
                for name in {**item.extra, **extra}
                if item.extra.get(name) != extra.get(name)
            }
        )
        if not changed:
            return pool
        logger.info(
            "%s: columns of the prompts have changed and are read as they are now: %s",
            folder.name,
            ", ".join(changed),
        )
        return PreferencePool(
            replace(item, extra=columns.get(item.id, item.extra)) for item in pool
        )

    def _picked(
        self, folder: Path, pool: PreferencePool, history: list[tuple[Selection, list[int | None]]]
    ) -> Selection:
        path = folder / "picked.jsonl"
        if not path.exists():
            split = [by_preference(*past) for past in history]
            rules = self.rules and self.rules.within(pool)
            self.selector.ref_model = self._reference_weights()
            picked = self.selector.select(
                pool,
                self.batch_size,
                labeled=[with_one for with_one, _ in split],
                asked=[without for _, without in split],
                rules=rules,
                fewer_ok=True,
                show_progress=self.show_progress,
            )
            if not picked:
                raise ActiveDPOError(
                    f"{folder.name}: no pair is left to pick, or none reaches "
                    "min_score: nothing to label"
                )
            add_seconds(folder, self.selector.last_timings)
            write_recorded(path, picked.jsonl())
        check(folder, path.name)
        return Selection.from_jsonl(path, strategy=self.strategy)

    def _train(
        self, folder: Path, before: Path, history: list[tuple[Selection, list[int | None]]]
    ) -> None:
        if (folder / "adapter").exists():
            return
        newest = history[-1][1]
        if all(label is None for label in newest):
            logger.info(
                "%s: none of its %d pairs got a preference: there is nothing new to train "
                "on, and the adapter stays as it was",
                folder.name,
                len(newest),
            )
            self._load(before)
            save_adapter(self.model, self.processing_class, folder / "adapter")
            return
        used = history if self.train_on == "all" else history[-1:]
        picks = Selection(tuple(p for selection, _ in used for p in selection), self.strategy)
        dataset = picks.to_dataset([label for _, labels in used for label in labels])
        if self.start_from == "initial":
            load_adapter_state(self.model, self._initial)
        else:
            self._load(before)
        try:
            with timed(folder, "train"):
                train_dpo(
                    self.model,
                    self.processing_class,
                    dataset,
                    self.dpo_args,
                    reference=self.reference,
                    initial_adapter=self._initial,
                    show_progress=self.show_progress,
                )
            _check_finite(self.model, folder.name)
        except BaseException:
            self._load(before)  # undo partial training: `run` may be called again with this model
            raise
        save_adapter(self.model, self.processing_class, folder / "adapter")

    def _record(self, folder: Path, t: int, labels_total: int) -> RoundRecord:
        path = folder / "record.json"
        if not path.exists():
            metrics: dict[str, float] = {}
            with timed(folder, "evaluate"):
                if self.evaluate is not None:
                    metrics = {k: float(v) for k, v in self.evaluate(self.model).items()}
            record = RoundRecord(t, labels_total, metrics, read_seconds(folder), self.strategy)
            write_record(path, record)
        return read_record(path)

    # -- helpers ---------------------------------------------------------------------------------

    def _reference_weights(self) -> Mapping[str, torch.Tensor]:
        """Return the adapter weights that make the model π_ref in this round's training."""
        if "initial" in (self.reference, self.start_from):
            return self._initial
        return adapter_state(self.model)

    def _folder(self, t: int) -> Path:
        return self.output_dir / f"round-{t:03d}"

    def _load(self, folder: Path) -> None:
        load_adapter_state(self.model, read_adapter(folder))

    def _check_adapter(self, start: Path) -> None:
        """Refuse an adapter in memory unless it is the run's, or fresh like the run's first."""
        own = adapter_state(self.model)
        rounds = sorted(self.output_dir.glob("round-*/adapter"), reverse=True)
        for folder in (start, *(adapter.parent for adapter in rounds)):
            found = read_adapter(folder)
            if found.keys() == own.keys() and all(
                torch.equal(found[name].to(own[name].dtype), own[name].cpu()) for name in own
            ):
                return
            if folder == start and is_untrained(found) and is_untrained(own):
                logger.info(
                    "going on from the fresh adapter in %s instead of the one in memory",
                    folder / "adapter",
                )
                return
        raise ActiveDPOError(
            f"{self.output_dir} holds a run with other settings: the adapter "
            f"differs from {start / 'adapter'}, which the run began with; use "
            "another output_dir, or the same adapter"
        )

    def _rehearse(self) -> None:
        n_responses = self.generation["n_responses"]
        prompts = min(self.prompts_per_round, len(self._offered))
        pairs = prompts * n_responses * (n_responses - 1) // 2
        if n_responses > 1 and pairs < self.batch_size:
            raise ActiveDPOError(
                f"loop.batch_size: {self.batch_size} pairs are to be picked, but "
                f"{prompts} prompts with {n_responses} responses have {pairs}"
            )
        options = {name: value for name, value in self.generation.items() if name != "n_responses"}
        options["chat_template_kwargs"] = self.chat_template_kwargs
        rehearse(
            self.model,
            self.processing_class,
            self._offered,
            self.selector,
            self.dpo_args,
            reference=self.reference,
            batch_size=self.batch_size,
            n_responses=n_responses,
            generation=options,
        )


def _check_finite(model: PeftModel, name: str) -> None:
    """Refuse an adapter with NaN or infinite weights."""
    for weight, tensor in adapter_state(model).items():
        if not tensor.isfinite().all():
            raise ActiveDPOError(
                f"{name}: training has diverged, {weight!r} is not finite: nothing of it is kept; "
                "use a smaller learning_rate, or a smaller max_grad_norm"
            )


def draw_prompts(
    prompts: Sequence[Prompt], t: int, n: int, asked: set[str], seed: int
) -> list[Prompt]:
    """Return the prompts of round t: up to `n` distinct ones, those in `asked` last.

    The order is a permutation that depends on `seed`, starting at t·n and wrapping around.
    """
    order = list(prompts)
    random.Random(seed).shuffle(order)
    first = t * n % len(order)
    order = order[first:] + order[:first]
    fresh = [prompt for prompt in order if prompt.id not in asked]
    if len(fresh) < min(n, len(order)):
        logger.warning(
            "round %d: only %d prompts have no labels yet; %d others are offered again",
            t,
            len(fresh),
            min(n, len(order)) - len(fresh),
        )
    return [*fresh, *(prompt for prompt in order if prompt.id in asked)][:n]


def _identity(prompt: Prompt) -> list[Any]:
    """Return the id of a prompt and everything its tokens depend on."""
    own = None if isinstance(prompt.prompt, str) else own_template_kwargs(prompt.extra)
    return [prompt.id, prompt.prompt, *([] if own is None else [own])]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _oracle_settings(oracle: Oracle) -> dict[str, Any]:
    """Return the class of an oracle, and its public attributes that are numbers or texts."""
    own = {
        name: value
        for name, value in getattr(oracle, "__dict__", {}).items()
        if not name.startswith("_") and isinstance(value, (int, float, str, type(None)))
    }
    return {"class": type(oracle).__name__, **own}


def _plain(value: Any) -> Any:
    """Return `value` after a JSON round trip; objects (a reference model) become type names."""
    return json.loads(json.dumps(value, default=lambda other: type(other).__name__))
