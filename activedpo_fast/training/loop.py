"""`ActiveDPOLoop`: rounds of generate, select, label and train, with the state on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback

from activedpo_fast._locks import locked_folder
from activedpo_fast.distributed.launcher import group_of_all
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels import Oracle
from activedpo_fast.labels.reading import by_preference, read_labels
from activedpo_fast.models.adapters import adapter_state, load_adapter_state
from activedpo_fast.models.encoder_decoder import refuse_encoder_decoder
from activedpo_fast.models.fingerprints import policy_settings
from activedpo_fast.models.named import GivenModel, as_policy
from activedpo_fast.pool.items import Prompt
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.selection.prompts import same_prompt
from activedpo_fast.selection.result import Selection
from activedpo_fast.selection.rules import PickRules
from activedpo_fast.selection.strategies import Strategy
from activedpo_fast.selector import ActiveDPOSelector
from activedpo_fast.settings import LoopConfig, read_settings
from activedpo_fast.training.arguments import (
    check_oracle,
    learn_reward,
    selection_settings,
    warn_of_the_date,
    warn_of_the_policy_as_reference,
)
from activedpo_fast.training.checksums import check, write_recorded
from activedpo_fast.training.data_parallel import require_whole_model
from activedpo_fast.training.energy import gpu_name
from activedpo_fast.training.generation import generate_responses
from activedpo_fast.training.generators import Generate, check_generate, generated_responses
from activedpo_fast.training.processes import RunProcesses
from activedpo_fast.training.prompts import (
    check_pairs,
    draw_items,
    draw_prompts,
    read_and_offer,
    with_columns_of_now,
)
from activedpo_fast.training.recorded import digest, recorded_settings
from activedpo_fast.training.rehearsal import rehearse
from activedpo_fast.training.resuming import Change, check_adapter, check_settings, write_settings
from activedpo_fast.training.run_folder import (
    START,
    WEIGHTS,
    RoundRecord,
    add_numbers,
    add_seconds,
    measured,
    read_numbers,
    read_record,
    read_weights,
    remove_leftovers,
    round_folder,
    save_adapter,
    steps_before,
    timed,
    write_labels,
    write_record,
)
from activedpo_fast.training.trl import (
    NOT_TRAINED,
    check_callbacks,
    check_eval_dataset,
    check_finite,
    dpo_config,
    train_dpo,
)

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

    Under torchrun or `accelerate launch`, every process makes the loop with the same arguments,
    each with a model on its own GPU, and calls `run`. The first process has the run's folder: it
    alone calls `oracle`, `generate` and `evaluate`. Responses, picks and labels are those of one
    process; adapters and scores are so up to rounding, if the pairs of a training step divide (see
    `train_dpo`). Any other number of processes may go on with the run.

    Args:
        model: a PEFT model with the adapter "default", or the folder or hub name of an adapter, as
            in `ActiveDPOSelector`; with `peft_config`, a model without one. The adapter's weights
            are the initial policy. The trained model is `loop.model`.
        processing_class: its tokenizer; None for that of a model given by name.
        prompts: `Prompt`s, or a `datasets.Dataset` with a column `prompt`. Each round takes
            `prompts_per_round` of them in a seeded order, continuing where the last round ended and
            wrapping around. Prompts with labeled pairs are offered again only if the others are not
            enough; this is logged as a warning. Prompts with the same text count as one (see
            `PickRules.prompt_by`), offered as the first of them. With `responses="given"`, a
            `PreferencePool`, or a data set with its rows: the pairs of `prompts_per_round` rows are
            a round's candidates, and rows whose pairs are all labeled are left out.
        oracle: see `activedpo_fast.labels`. If it raises `LabelsPending`, so does `run`. Its method
            `rehearse`, if it has one, is part of the rehearsal. A round in which no pair gets a
            preference is not trained on and keeps the previous adapter.
        args: the settings. Or give them as keyword options, by the names of `LoopConfig`. Only
            `output_dir` has to be given.
        dpo_args: a `trl.DPOConfig`, the same in each round. Default: TRL's values, for short rounds
            (see `activedpo_fast.training.trl.dpo_config`). The selector gets beta, max_length,
            truncation_mode and length_normalized from it, unless `selector_options` has them (see
            `selector_settings`, which also refuses what selection cannot follow).
        strategy: the name of one, a setting like the others, or a `Strategy`.
        rules: constraints on each round's picks, see `PickRules`; ids, groups and costs are
            those of `prompts`. Excluded prompts get no responses. If the rules leave a round no
            pair, or none that reaches `min_score`, the run ends with an error.
        generate: samples the responses in place of `generate_responses`: a function, see
            `activedpo_fast.training.generators.Generate`, or a `ServerGeneration`.
        evaluate: returns metrics of the model; called before the first round and after each. See
            `activedpo_fast.training.evaluation` for some. Its method `rehearse`, if it has one, is
            called with the model in the rehearsal. Its attribute `settings`, if it has one, JSON
            values by name, is compared like the other settings.
        eval_dataset: for each round's `DPOTrainer`, which evaluates on it as `dpo_args` says
            (`eval_strategy`): rows with prompt, chosen and rejected. The last of its values are in
            `RoundRecord.training`.
        callbacks: for each round's `DPOTrainer`. One that stops the training ends that of the
            round alone. If one raises, so does `run`; nothing of the training is kept, and the next
            `run` trains the round again.
        peft_config: of a fresh adapter for a model without one, as in `ActiveDPOSelector`.
        extra_settings: JSON values that the run depends on and the loop cannot see, for example
            the oracle's. They are compared with the other settings when a run is resumed.
        options: the fields of `LoopConfig`. `chat_template_kwargs` are for all stages; if
            `selector_options` has them too, they have to agree. Strategies that need π_ref use the
            one of `reference`. With `reference="round"` and `start_from="current"` that is the
            policy itself at selection, and all reward differences are 0.

    Raises:
        ActiveDPOError: bad options. From `run` also: `output_dir` holds a run with other settings,
            or with another model, adapter or tokenizer (naming the first difference that matters);
            another process has other settings, has failed or is gone; an engine that splits the
            model (FSDP, DeepSpeed); errors of the rehearsal, which begin with the section at fault;
            errors of the stages.

    Examples:
        >>> from activedpo_fast import ActiveDPOLoop
        >>> from activedpo_fast.labels import CallableOracle
        >>> oracle = CallableOracle(lambda prompt, a, b: int(len(b) < len(a)))
        >>> loop = ActiveDPOLoop(
        ...     model, tokenizer, prompts, oracle, output_dir="run", dpo_args=dpo_args,
        ...     rounds=2, batch_size=2, max_completion_length=8)
        >>> [record.labels_total for record in loop.run()]
        [0, 2, 4]
    """

    def __init__(
        self,
        model: GivenModel,
        processing_class: PreTrainedTokenizerBase | None,
        prompts: Sequence[Prompt] | datasets.Dataset,
        oracle: Oracle,
        *,
        args: LoopConfig | None = None,
        dpo_args: DPOConfig | None = None,
        strategy: str | Strategy | None = None,
        rules: PickRules | None = None,
        generate: Generate | None = None,
        evaluate: Callable[[PeftModel], dict[str, float]] | None = None,
        eval_dataset: datasets.Dataset | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
        extra_settings: Mapping[str, Any] | None = None,
        show_progress: bool | None = None,
        **options: Any,
    ) -> None:
        self.args, strategy = read_settings(LoopConfig, args, options, strategy)
        self.output_dir = Path(self.args.output_dir)
        self.prompts, self._offered = read_and_offer(
            prompts, rules, given=self.args.responses == "given"
        )
        check_oracle(oracle)
        check_generate(generate, given=self.args.responses == "given")
        check_callbacks(callbacks)
        check_eval_dataset(eval_dataset)
        self.oracle = oracle
        if dpo_args is None:
            dpo_args = dpo_config(output_dir=str(self.output_dir / "trainer"), seed=self.args.seed)
        self.dpo_args = dpo_args
        self.rules = rules
        self.generate = generate
        self.evaluate = evaluate
        self.eval_dataset = eval_dataset
        self.callbacks = callbacks
        self.show_progress = show_progress
        self.strategy: str = strategy if isinstance(strategy, str) else strategy.name
        selection, self.chat_template_kwargs = selection_settings(self.args, self.dpo_args)
        self._processes = RunProcesses(None)
        self.model, self.processing_class = as_policy(  # late: it is slow
            model, processing_class, peft_config=peft_config, seed=self.args.seed
        )
        refuse_encoder_decoder(self.model, NOT_TRAINED)
        self.selector = ActiveDPOSelector(
            self.model,
            processing_class=self.processing_class,
            strategy=strategy,
            chat_template_kwargs=self.chat_template_kwargs,
            **selection,
        )
        warn_of_the_policy_as_reference(self.args, strategy)
        self._settings = recorded_settings(
            self.args,
            self.dpo_args,
            model=getattr(self.model.get_base_model().config, "_name_or_path", ""),
            strategy=strategy,
            selector_options=selection,
            chat_template_kwargs=self.chat_template_kwargs,
            prompts=self.prompts,
            rules=rules,
            oracle=oracle,
            generate=generate,
            eval_dataset=eval_dataset,
            evaluate=evaluate,
            extra_settings=extra_settings or {},
        )

    def run(self) -> list[RoundRecord]:
        """Run what is not on disk yet; return the records of the start and of all rounds.

        Of several processes, all call it and all return the same.
        """
        require_whole_model(self.dpo_args)
        with group_of_all() as group:
            processes = self._processes = RunProcesses(group)
            with (
                processes.one_says_it(),
                processes.in_first(lambda: locked_folder(self.output_dir)),
            ):
                return self._run()

    def _run(self) -> list[RoundRecord]:
        start = self.output_dir / "start"
        self._begin(start)
        self._initial = self._adapter_of(start)
        load_adapter_state(self.model, self._initial)
        records = [self._record(start, START, 0)]
        history: list[tuple[Selection, list[int | None]]] = []
        for t in range(self.args.rounds):
            folder = self._folder(t)
            history.append(self._labels(t, folder, history))
            self._train(folder, self._before(t), history)
            self._load(folder)
            total = sum(label is not None for _, labels in history for label in labels)
            records.append(self._record(folder, t, total))
        return records

    def _begin(self, start: Path) -> None:
        """Check what is on disk, rehearse if nothing was generated yet, and write the start."""
        processes = self._processes
        settings = processes.check(
            lambda: self._settings | policy_settings(self.model, self.processing_class)
        )
        processes.require_same_settings({**settings, "rounds": self.args.rounds})
        mended: list[Change] = []

        def open_folder() -> list[int]:
            remove_leftovers(self.output_dir)
            warn_of_the_date(self.processing_class)
            mended.extend(check_settings(self.output_dir, settings))
            begun = check_adapter(self.output_dir, adapter_state(self.model))
            return [begun, bool(mended) or not (self._folder(0) / "pool.jsonl").exists()]

        def write_start() -> None:
            write_settings(self.output_dir, settings, mended)
            if not begun:
                save_adapter(self.model, self.processing_class, start / "adapter")

        begun, rehearse_first = processes.of_first(open_folder)
        if rehearse_first:
            self._rehearse()  # before anything is written
        processes.by_first(write_start)

    # -- stages: each only reads its result if it is already on disk -----------------------------

    def _labels(
        self, t: int, folder: Path, history: list[tuple[Selection, list[int | None]]]
    ) -> tuple[Selection, list[int | None]]:
        path = folder / "labels.jsonl"
        if self._processes.lacks(path):
            pool = self._pool(t, folder, history)
            picked = self._picked(folder, pool, history)

            def label() -> None:
                with timed(folder, "label"):
                    labels = self.oracle.label(picked, pool)
                picked.to_dataset(labels)  # checks them
                write_labels(path, picked, labels)

            self._processes.by_first(label)
        # What the labels are of, too, even if it is not read again.
        checked = ("pool.jsonl", "picked.jsonl", path.name)
        with self._file(path, *checked) as found:
            return read_labels(found, strategy=self.strategy, all_answered=True)

    def _pool(
        self, t: int, folder: Path, history: list[tuple[Selection, list[int | None]]]
    ) -> PreferencePool:
        processes, path = self._processes, folder / "pool.jsonl"
        wanted = processes.lacks(path)
        if wanted and self.args.responses == "given":
            picks = [pick for picked, _ in history for pick in picked]
            given = draw_items(self._offered, t, picks, self.args)
            processes.by_first(lambda: write_recorded(path, given.jsonl()))
        elif wanted:
            asked = same_prompt(
                self.prompts,
                {p.id for picks, _ in history for p in picks},
                None if self.rules is None else self.rules.prompt_by,
            )
            prompts = draw_prompts(
                self._offered, t, self.args.prompts_per_round, asked, self.args.seed
            )
            seed = int(digest([self.args.seed, t])[:12], 16)
            with self._timed(folder, "generate"):
                sampled = self._sampled(prompts, seed, self._before(t))

            def write() -> None:
                assert sampled is not None  # in the first process
                write_recorded(path, sampled.jsonl())

            processes.by_first(write)
        # Always read it back, so that interrupted and uninterrupted runs see the same.
        with self._file(path, path.name) as found:
            pool = PreferencePool.from_jsonl(found)
        return with_columns_of_now(pool, self.prompts, folder.name)

    def _sampled(self, prompts: Sequence[Prompt], seed: int, policy: Path) -> PreferencePool | None:
        """Return responses of the current policy, whose adapter is in the folder `policy`.

        The function `generate` is asked in the first process alone, and the others get None.
        """
        if (generate := self.generate) is None:
            return generate_responses(
                self.model,
                self.processing_class,
                prompts,
                seed=seed,
                chat_template_kwargs=self.chat_template_kwargs,
                group=self._processes.group,
                show_progress=self.show_progress,
                **self.args.sampling,
            )
        return self._processes.in_first_alone(
            lambda: generated_responses(
                generate,
                self.model,
                self.processing_class,
                prompts,
                adapter=policy / "adapter",
                seed=seed,
                sampling=self.args.sampling,
                common_template_kwargs=self.chat_template_kwargs,
            )
        )

    def _picked(
        self, folder: Path, pool: PreferencePool, history: list[tuple[Selection, list[int | None]]]
    ) -> Selection:
        processes, path = self._processes, folder / "picked.jsonl"
        if processes.lacks(path):
            self.selector.ref_model = self._reference_weights()
            processes.check(lambda: learn_reward(self.selector.strategy, history))
            measuring = measured(folder, "select", self.model.device)
            with measuring if processes.rank == 0 else nullcontext():
                if len(pool) < processes.size:  # not a prompt for each
                    picked = processes.in_first_alone(lambda: self._select(pool, history, None))
                else:
                    picked = self._select(pool, history, processes.group)

            def write() -> None:
                if not picked:
                    raise ActiveDPOError(
                        f"{folder.name}: no pair is left to pick, or none reaches "
                        "min_score: nothing to label"
                    )
                add_seconds(folder, self.selector.last_timings)
                write_recorded(path, picked.jsonl())

            processes.by_first(write)
        with self._file(path, path.name) as found:
            return Selection.from_jsonl(found, strategy=self.strategy)

    def _select(
        self,
        pool: PreferencePool,
        history: list[tuple[Selection, list[int | None]]],
        group: dist.ProcessGroup | None,
    ) -> Selection:
        split = [by_preference(*past) for past in history]
        return self.selector.select(
            pool,
            self.args.batch_size,
            labeled=[with_one for with_one, _ in split],
            asked=[without for _, without in split],
            rules=self.rules and self.rules.within(pool),
            group=group,
            show_progress=self.show_progress,
        )

    def _train(
        self, folder: Path, before: Path, history: list[tuple[Selection, list[int | None]]]
    ) -> None:
        processes = self._processes
        if not processes.lacks(folder / "adapter"):
            return
        weights = self._adapter_of(before)
        newest = history[-1][1]
        if all(label is None for label in newest):
            logger.info(
                "%s: none of its %d pairs got a preference: there is nothing new to train "
                "on, and the adapter stays as it was",
                folder.name,
                len(newest),
            )
            load_adapter_state(self.model, weights)
            processes.by_first(lambda: self._save(folder))
            return
        used = history if self.args.train_on == "all" else history[-1:]
        picks = Selection(tuple(p for selection, _ in used for p in selection), self.strategy)
        dataset = picks.to_dataset([label for _, labels in used for label in labels])
        begin = self._initial if self.args.start_from == "initial" else weights
        load_adapter_state(self.model, begin)
        (steps,) = processes.of_first(lambda: [steps_before(self.output_dir, len(history) - 1)])
        try:
            with self._timed(folder, "train"):
                trained = train_dpo(
                    self.model,
                    self.processing_class,
                    dataset,
                    self.dpo_args,
                    reference=self.args.reference,
                    initial_adapter=self._initial,
                    callbacks=self.callbacks,
                    eval_dataset=self.eval_dataset,
                    show_progress=self.show_progress,
                    steps_before=steps,
                )
            check_finite(self.model, folder.name)
        except BaseException:
            # Undo partial training: `run` may be called again with this model.
            load_adapter_state(self.model, weights)
            raise
        del trained["seconds"]  # those of the stage are in seconds.json

        def save() -> None:
            add_numbers(folder / "training.json", trained)
            self._save(folder)

        processes.by_first(save)

    def _save(self, folder: Path) -> None:
        save_adapter(self.model, self.processing_class, folder / "adapter")

    def _record(self, folder: Path, t: int, labels_total: int) -> RoundRecord:
        path = folder / "record.json"

        def record() -> None:
            if path.exists():
                return
            metrics: dict[str, float] = {}
            with timed(folder, "evaluate", self.model.device):
                if self.evaluate is not None:
                    metrics = {k: float(v) for k, v in self.evaluate(self.model).items()}
            found = RoundRecord(
                t,
                labels_total,
                metrics,
                read_numbers(folder / "seconds.json"),
                self.strategy,
                training=read_numbers(folder / "training.json"),
                gpu=gpu_name(self.model.device),
                joules=read_numbers(folder / "joules.json"),
            )
            write_record(path, found)

        self._processes.by_first(record)
        with self._processes.file_of_first(path, lambda: None) as copy:
            return read_record(copy)

    # -- helpers ---------------------------------------------------------------------------------

    def _reference_weights(self) -> Mapping[str, torch.Tensor]:
        """Return the adapter weights that make the model π_ref in this round's training."""
        if "initial" in (self.args.reference, self.args.start_from):
            return self._initial
        return adapter_state(self.model)

    def _folder(self, t: int) -> Path:
        return round_folder(self.output_dir, t)

    def _before(self, t: int) -> Path:
        """Return the folder of the policy that round t begins with."""
        return self._folder(t - 1) if t else self.output_dir / "start"

    def _load(self, folder: Path) -> None:
        load_adapter_state(self.model, self._adapter_of(folder))

    def _adapter_of(self, folder: Path) -> dict[str, torch.Tensor]:
        """Return the weights that `_save` wrote to a folder, on the CPU."""
        whole = partial(check, folder, "adapter")
        with self._processes.file_of_first(folder / WEIGHTS, whole) as found:
            return read_weights(found)

    def _file(self, path: Path, *checked: str) -> AbstractContextManager[Path]:
        """Give a file of the run, or a copy of it, once it and others of its folder are checked."""
        return self._processes.file_of_first(path, lambda: check(path.parent, *checked))

    def _timed(self, folder: Path, stage: str) -> AbstractContextManager[None]:
        first = self._processes.rank == 0
        return timed(folder, stage, self.model.device) if first else nullcontext()

    def _rehearse(self) -> None:
        args = self.args
        check_pairs(self._offered, args)
        self._processes.by_first(self._rehearse_sources)
        rehearse(
            self.model,
            self.processing_class,
            self._offered,
            self.selector,
            self.dpo_args,
            reference=args.reference,
            batch_size=args.batch_size,
            generation=None
            if args.responses == "given"
            else {**args.sampling, "chat_template_kwargs": self.chat_template_kwargs},
            generate=self.generate,
            eval_dataset=self.eval_dataset,
            processes=self._processes,
        )

    def _rehearse_sources(self) -> None:
        if callable(rehearse_oracle := getattr(self.oracle, "rehearse", None)):
            rehearse_oracle()
        if callable(rehearse_evaluate := getattr(self.evaluate, "rehearse", None)):
            try:
                rehearse_evaluate(self.model)
            except ActiveDPOError as error:
                raise ActiveDPOError(f"evaluate: {error}") from error
