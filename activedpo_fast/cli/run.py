"""The command `activedpo run`: runs the rounds that a YAML file describes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activedpo_fast._files import check_folder_target
from activedpo_fast._locks import locked_folder
from activedpo_fast.cli.evaluation import make_evaluation, read_heldout, trainer_dataset
from activedpo_fast.cli.run_file import RunConfig, load_config
from activedpo_fast.distributed.launcher import own_device
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels import (
    FileOracle,
    JudgeOracle,
    LabelsPending,
    LabelStudioOracle,
    Oracle,
    RecordedOracle,
    RewardModel,
    RewardModelOracle,
)
from activedpo_fast.models.file_fingerprints import fingerprint_adapter, fingerprint_model
from activedpo_fast.models.loading import load_policy, load_reward_model
from activedpo_fast.pool.items import Prompt
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.reading import read_prompts
from activedpo_fast.report.reading import metric_names, round_name
from activedpo_fast.report.tables import TIMED, aligned, with_error
from activedpo_fast.selection.rules import PickRules
from activedpo_fast.selection.strategies import RewardGap, Strategy
from activedpo_fast.training.data_parallel import require_whole_model
from activedpo_fast.training.loop import ActiveDPOLoop
from activedpo_fast.training.processes import RunProcesses
from activedpo_fast.training.run_folder import RoundRecord, write_command
from activedpo_fast.training.server import ServerGeneration
from activedpo_fast.training.trl import dpo_config, selector_settings

if TYPE_CHECKING:
    import torch.distributed as dist
    from trl import DPOConfig


def run_rounds(
    path: Path,
    *,
    command: str | None = None,
    show_progress: bool | None = None,
    group: dist.ProcessGroup | None = None,
) -> str | None:
    """Run or continue the rounds that a YAML file describes, and return a table of them.

    With a `group`, all of its processes call this, each with a GPU of its own if there are any; the
    others than the first return None. `command` is the command line that does it, which the run's
    folder records.

    Raises:
        LabelsPending: the run waits for labels from people.
        ActiveDPOError: bad input, or another process failed; nothing new is written then, unless a
            stage was already running.
    """
    require_whole_model()
    processes = RunProcesses(group)
    config = processes.check(lambda: load_config(path))
    config = processes.check(lambda: replace(config, device=own_device(config.device)))
    output = Path(config.output_dir)
    processes.by_first(lambda: check_folder_target(output))
    if processes.rank > 0:
        command = None
    with processes.in_first(lambda: locked_folder(output)):  # before minutes of loading
        loop = processes.check(lambda: _loop(config, output, show_progress))
        try:
            records = loop.run()
        except BaseException as error:
            # A run that waits for labels or is interrupted is continued, too.
            if not isinstance(error, ActiveDPOError) or isinstance(error, LabelsPending):
                with suppress(ActiveDPOError, OSError):  # a full disk: say what failed first
                    _record_command(output, command)
            raise
        _record_command(output, command)
        return _table(records) if processes.rank == 0 else None


def _record_command(output: Path, command: str | None) -> None:
    if command is not None and (output / "config.json").exists():
        write_command(output, command)


def _loop(config: RunConfig, output: Path, show_progress: bool | None) -> ActiveDPOLoop:
    """Check the settings, read the prompts and load the models."""
    dpo_args = _dpo_args(config, output)
    prompts, recorded = _prompts(config)
    strategy = _strategy(config, show_progress)
    heldout = read_heldout(config, prompts)
    generate = _generation(config, show_progress)
    oracle = recorded or _oracle(config, config.oracle, output / "labeling", show_progress)
    scorer = _scorer(config, oracle, output, show_progress)
    model, tokenizer = load_policy(
        config.model,
        adapter=config.adapter,
        lora=config.lora,
        dtype=config.dtype,
        device=config.device,
        gguf_file=config.gguf_file,
        seed=config.seed,
        tokenizer=config.tokenizer,
    )
    return ActiveDPOLoop(
        model,
        tokenizer,
        prompts,
        oracle,
        output_dir=output,
        dpo_args=dpo_args,
        strategy=strategy,
        selector_options={"seed": config.seed, **config.selection},
        chat_template_kwargs=config.chat_template_kwargs,
        eval_dataset=trainer_dataset(config, heldout, dpo_args),
        generate=generate,
        evaluate=make_evaluation(
            config, heldout, scorer, generate, tokenizer, dpo_args, show_progress
        ),
        rules=PickRules(seed=config.seed, **config.rules) if config.rules else None,
        seed=config.seed,
        extra_settings=_extra_settings(config),
        show_progress=show_progress,
        **config.loop,
    )


def _strategy(config: RunConfig, show_progress: bool | None) -> str | Strategy | None:
    """Return the strategy, with its reward model if it has one."""
    if config.reward is None:
        return config.strategy
    options = {k: v for k, v in config.reward.items() if k != "model"}
    model, tokenizer = load_reward_model(config.reward["model"], config.device)
    try:
        reward = RewardModel(model, tokenizer, show_progress=show_progress, **options)
    except ActiveDPOError as error:
        raise ActiveDPOError(f"reward: {error}") from None
    return RewardGap(reward)


def _dpo_args(config: RunConfig, output: Path) -> DPOConfig:
    try:
        dpo_args = dpo_config(
            **{"output_dir": str(output / "trainer"), "seed": config.seed, **config.dpo}
        )
    except ActiveDPOError:
        raise
    except Exception as error:  # missing files, packages too old, ...
        raise ActiveDPOError(f"dpo: {' '.join(str(error).split())}") from error
    try:
        selector_settings(dpo_args)  # refuses settings before a model is loaded
    except ActiveDPOError as error:
        raise ActiveDPOError(f"dpo: {error}") from error
    return dpo_args


def _prompts(config: RunConfig) -> tuple[Sequence[Prompt] | PreferencePool, RecordedOracle | None]:
    """Read the prompts, or the pool that has their responses, or recorded preferences."""
    if config.oracle["kind"] == "recorded":
        recorded = RecordedOracle(config.prompts)
        return recorded.pool, recorded
    given = config.loop.get("responses") == "given"
    return PreferencePool.load(config.prompts) if given else read_prompts(config.prompts), None


def _scorer(
    config: RunConfig, oracle: Oracle, output: Path, show_progress: bool | None
) -> Oracle | None:
    """Return what scores responses to held-out prompts: the run's oracle if it is the same."""
    own = (config.evaluate or {}).get("oracle")
    if own is None:
        return None
    if own == config.oracle and own["kind"] == "reward_model":
        return oracle
    return _oracle(config, own, output / "evaluation", show_progress, "evaluate.oracle")


def _oracle(
    config: RunConfig,
    given: Mapping[str, Any],
    folder: Path,
    show_progress: bool | None,
    section: str = "oracle",
) -> Oracle:
    """Make an oracle of a section of the run file; `folder` has what it writes."""
    if given["kind"] == "people":
        return _people(given, folder)
    options = {k: v for k, v in given.items() if k not in ("kind", "model")}
    if given["kind"] == "judge":
        with _named(section):
            return JudgeOracle(
                given["model"],
                journal=folder / "judge.jsonl",
                show_progress=show_progress,
                **options,
            )
    return RewardModelOracle(
        *load_reward_model(given["model"], config.device),
        seed=config.seed,
        show_progress=show_progress,
        **options,
    )


def _generation(config: RunConfig, show_progress: bool | None) -> ServerGeneration | None:
    if config.generation is None:
        return None
    with _named("generation"):
        return ServerGeneration(show_progress=show_progress, **config.generation)


def _people(oracle: Mapping[str, Any], folder: Path) -> Oracle:
    if oracle.get("via") != "label_studio":
        return FileOracle(folder, via=oracle.get("via", "page"))
    with _named("oracle"):
        return LabelStudioOracle(
            folder,
            base_url=oracle["base_url"],
            api_key_env=oracle["api_key_env"],
            title=f"activedpo: {folder.parent.name}",
        )


@contextmanager
def _named(section: str) -> Iterator[None]:
    """Have an error about an option name the section that it is in."""
    try:
        yield
    except ActiveDPOError as error:
        raise ActiveDPOError(f"{section}.{error}") from None


def _extra_settings(config: RunConfig) -> dict[str, Any]:
    """Return what the loop's own arguments do not show: the given adapter, and the oracles."""
    scorer = (config.evaluate or {}).get("oracle")
    found = {
        "adapter": None if config.adapter is None else fingerprint_adapter(config.adapter),
        "oracle": _identity(config.oracle),
        "evaluate": None if scorer is None else {"oracle": _identity(scorer, drawn=False)},
    }
    if config.reward is not None:
        reward = {"max_length": None, **config.reward}
        reward.pop("batch_size", None)
        found["reward"] = {**reward, "model": fingerprint_model(reward["model"])}
    return found


def _identity(given: Mapping[str, Any], *, drawn: bool = True) -> dict[str, Any]:
    """Return the options of an oracle that its labels depend on; its scores, if none are drawn."""
    oracle = dict(given)
    if oracle["kind"] in ("judge", "people"):  # what matters they show themselves, no address
        oracle = {"kind": oracle["kind"]}
    if oracle["kind"] == "reward_model":
        options = inspect.signature(RewardModelOracle).parameters
        oracle = {
            "temperature": options["temperature"].default,
            "max_length": options["max_length"].default,
            **oracle,
            "model": fingerprint_model(oracle["model"]),
        }
        oracle.pop("batch_size", None)
        if not drawn:
            oracle.pop("temperature")
    return oracle


def _table(records: Sequence[RoundRecord]) -> str:
    """Format one line per round: labels so far, the metrics, and the seconds of its stages."""
    metrics = metric_names(records)
    stages = TIMED if metrics else TIMED[:-1]  # there is no evaluation without metrics
    lines = [["round", "labels", *metrics, *(f"{stage} s" for stage in stages)]]
    for r in records:
        found = [with_error(r.metrics, name) for name in metrics]
        seconds = [f"{r.seconds[stage]:.1f}" if stage in r.seconds else "" for stage in stages]
        lines.append([round_name(r.round), str(r.labels_total), *found, *seconds])
    return aligned(lines)
