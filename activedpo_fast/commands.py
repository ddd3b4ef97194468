"""What `activedpo features`, `select` and `run` do, with plain arguments."""

from __future__ import annotations

import inspect
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from activedpo_fast import __version__
from activedpo_fast._files import check_file_target, check_folder_target, reason_of
from activedpo_fast._tables import placed_rows
from activedpo_fast._texts import check_text, content_id
from activedpo_fast.columns import (
    RESPONSE_COLUMNS,
    check_columns,
    check_json_columns,
    is_absent,
)
from activedpo_fast.config import RunConfig
from activedpo_fast.data import (
    PreferencePool,
    Prompt,
    check_prompt_row,
    check_prompts,
    id_of,
    jsonl_rows,
    plain_text,
)
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.features.extractor import FeatureExtractor
from activedpo_fast.features.sketch import Sketch
from activedpo_fast.features.store import FeatureStore
from activedpo_fast.features.stored_rows import StoredRows
from activedpo_fast.labeling import FileOracle, Oracle, RewardModelOracle
from activedpo_fast.labeling.labelled_pairs import read_labelled_pairs
from activedpo_fast.loop import START, ActiveDPOLoop, RoundRecord
from activedpo_fast.models import (
    NO_ADAPTER,
    fingerprint_adapter,
    fingerprint_model,
    fingerprint_tokenizer,
    load_policy,
    load_reward_model,
    resolve_device,
    resolve_dtype,
    resolve_source,
    tokenizer_source,
)
from activedpo_fast.processes import ONE_PROCESS, require_one_process
from activedpo_fast.selection.prompts import PoolPrompts
from activedpo_fast.selection.rules import PickRules, random_seed, warn_if_fewer
from activedpo_fast.selection.shares import Shares, pool_text
from activedpo_fast.selection.signals import History, TensorSignals
from activedpo_fast.selection.strategies import make_strategy
from activedpo_fast.selector import candidate_pairs, make_selection
from activedpo_fast.template import check_template_kwargs
from activedpo_fast.tokenization import TruncationMode, tokenize_pool
from activedpo_fast.trl import dpo_config, selector_settings

logger = logging.getLogger(__name__)

_IN_MEMORY_BYTES = 2**30  # gradient rows up to here are loaded, larger ones are read as needed

FilePath = str | os.PathLike[str]


@dataclass(frozen=True)
class FeatureOptions:
    """Everything that the gradient rows of a pool depend on, besides the pool itself."""

    model: str
    adapter: str | None
    gguf_file: str | None = None
    tokenizer: str | None = None
    sketch: Sketch = Sketch()
    beta: float = 0.1
    length_normalized: bool = False
    max_length: int | None = 1024
    truncation_mode: TruncationMode = "keep_start"
    dtype: str = "auto"
    device: str = "auto"
    precision: str | None = None
    store_dtype: str = "float32"
    chat_template_kwargs: dict[str, Any] | None = None

    def settings(self) -> dict[str, Any]:
        """JSON values that tell whether rows in a store are the rows that are asked for.

        `store_dtype` is for `FeatureStore.create`, which puts it among them.
        The device is not among them: rows differ by rounding between devices, as they do between
        batch sizes. What "auto" stands for on this one is.
        """
        if self.adapter is None:
            raise ActiveDPOError(NO_ADAPTER)
        dtype = resolve_dtype(self.model, self.dtype, resolve_device(self.device), self.gguf_file)
        adapter_fingerprint = fingerprint_adapter(self.adapter)  # it is an adapter's folder
        tokenizer = tokenizer_source(self.model, self.adapter, self.tokenizer, self.gguf_file)
        return {
            "model": str(resolve_source(self.model, self.gguf_file).resolve()),
            "model_fingerprint": fingerprint_model(self.model, self.gguf_file),
            "gguf_file": self.gguf_file,
            "adapter": str(Path(self.adapter).resolve()),
            "adapter_fingerprint": adapter_fingerprint,
            "tokenizer": str(tokenizer.folder.resolve()),
            "tokenizer_fingerprint": fingerprint_tokenizer(tokenizer.folder),
            "dtype": str(dtype).removeprefix("torch."),
            "precision": self.precision,
            "sketch": self.sketch.method,
            "proj_dim": self.sketch.dim,
            "seed": self.sketch.seed,
            "beta": self.beta,
            "max_length": self.max_length,
            "truncation_mode": self.truncation_mode,
            # Absent where there are none, as in stores made before there was such an option.
            **({"chat_template_kwargs": self.chat_template_kwargs}
               if self.chat_template_kwargs else {}),
            "version": __version__,
            # Only where it is so: stores of sums do not mention it.
            **({"length_normalized": True} if self.length_normalized else {}),
        }


def take_features(
    pool_path: FilePath,
    output: FilePath,
    options: FeatureOptions,
    *,
    export: FilePath | None = None,
    max_tokens_per_batch: int | None = None,
    verify: bool = True,
    show_progress: bool | None = None,
) -> str:
    """Fill the feature store at `output`, or finish the one that is there; one line for a person.

    Columns of the pool other than its texts are brought up to date in a store that is there.

    Raises:
        ActiveDPOError: bad input, or several processes; nothing is written then, unless rows were
            already being taken.
    """
    started = time.perf_counter()
    require_one_process("activedpo features")
    check_file_target(export)
    check_folder_target(output)
    check_template_kwargs(options.chat_template_kwargs)
    pool = PreferencePool.load(pool_path)
    for item in pool:
        check_json_columns(item.extra, f"{pool_path}: item {item.id!r}")
    settings = options.settings()
    folder = Path(output)
    columns = ""
    store = None
    if (folder / "manifest.json").exists():
        # Opening it compares the settings, before a model is loaded for nothing.
        store = FeatureStore.create(folder, pool, settings, skipped=[], dtype=options.store_dtype)
        if store.columns_taken:
            columns = f"; columns brought up to date: {', '.join(store.columns_taken)}"
        if not store.missing_rows():
            return (f"{folder} is complete already{columns or ': nothing to do'}"
                    f"{_export(store, export)}")

    model, tokenizer = load_policy(
        options.model, adapter=options.adapter, gguf_file=options.gguf_file,
        dtype=settings["dtype"], device=options.device, tokenizer=options.tokenizer,
    )
    tokenized = tokenize_pool(
        pool, tokenizer, max_length=options.max_length, truncation_mode=options.truncation_mode,
        chat_template_kwargs=options.chat_template_kwargs, show_progress=show_progress,
    )
    if len(tokenized.skipped) == len(pool):
        raise ActiveDPOError(f"every prompt fills --max-length {options.max_length}: there is "
                             "nothing to score")
    if store is not None:
        store.check_tokens(tokenized)
    extractor = FeatureExtractor(
        model, options.sketch, beta=options.beta,
        length_normalized=options.length_normalized, pad_token_id=tokenizer.pad_token_id or 0,
        max_tokens_per_batch=max_tokens_per_batch, precision=options.precision, verify=verify,
    )
    extractor.check(tokenized)  # before anything is written
    if store is None:
        store = FeatureStore.create(folder, pool, settings, skipped=tokenized.skipped,
                                    dtype=options.store_dtype)
    store.fill(extractor, tokenized, show_progress=show_progress)
    exported = _export(store, export)
    left_out = f", {len(tokenized.skipped)} prompts too long" if tokenized.skipped else ""
    return (f"{pool.n_responses} gradient rows of {len(pool)} prompts{left_out} in {folder} "
            f"({time.perf_counter() - started:.1f} s){columns}{exported}")


def select_pairs(
    store_path: FilePath,
    output: FilePath,
    *,
    batch_size: int,
    strategy: str = "activedpo",
    normalize: str = "response",
    lam: float = 1.0,
    kappa: float = 1.0,
    seed: int = 0,
    labelled: FilePath | None = None,
    rules: PickRules | None = None,
    show_progress: bool | None = None,
) -> str | None:
    """Write the pairs of a feature store to label next to `output`; one line for a person.

    `rules` may make them fewer than `batch_size`. Processes that a launcher such as torchrun has
    started (WORLD_SIZE in the environment) make one selection together, each with its part of the
    rows; the first of them writes it, and the others return None.

    Raises:
        ActiveDPOError: bad input, or another process failed; nothing is written then.
    """
    started = time.perf_counter()
    with _processes() as group:
        shares = Shares(group)

        def prepare() -> _Task:
            if shares.rank == 0:
                check_file_target(output)
                _check_overwrites_nothing(output, store_path, labelled)
            return _Task.read(store_path, labelled, rules, log=shares.rank == 0)

        task = shares.check(prepare)
        pool, pairs, known = task.pool, task.pairs, task.known
        if group is not None:
            settings = (batch_size, strategy, normalize, lam, kappa, seed)
            shares.require_same({
                "store": pool_text(pool, rules) + repr(task.store.manifest),
                "--labelled": repr((known.tolist(), task.asked.tolist())),
                "rules": repr(rules),
                "settings": repr(settings),
            })
        options: dict[str, dict[str, Any]] = {
            "activedpo": {"lam": lam, "kappa": kappa,
                          "normalize": None if normalize == "none" else normalize},
            "trace": {"lam": lam, "kappa": kappa},
            "random": {"seed": random_seed(seed, pool.fingerprint())},
        }
        chosen = make_strategy(strategy, **options.get(strategy, {}))
        if batch_size > len(pairs):
            raise ActiveDPOError(f"--batch-size {batch_size}: there are {len(pairs)} candidate "
                                 "pairs")
        part = shares.part(pool)
        mine = part.pairs(pairs)
        eligible = None
        if rules is not None:
            eligible = rules.bind(pool, pairs, batch_size).part(mine.start, mine.stop)
        rows, history = shares.check(lambda: _read_rows(task.store, part.rows, known))
        signals = TensorSignals(pairs[mine.start:mine.stop] - part.rows.start,
                                part.item_of_row(pool), gradients=rows, history_gradients=history)
        ranking = chosen.select(signals, batch_size, eligible=eligible, group=group,
                                show_progress=show_progress)
        if shares.rank > 0:
            return None
        picked = len(ranking.indices)
        if eligible is not None:
            warn_if_fewer(picked, batch_size, eligible)
        arguments = task.store.manifest["settings"].get("chat_template_kwargs")
        make_selection(pool, pairs, ranking, strategy, arguments).to_jsonl(output)
    gain = ""
    if strategy == "activedpo":
        # det(V + φφᵀ) = det V · (1 + φᵀV⁻¹φ), pick by pick
        gain = f", log det V + {sum(math.log1p(s) for s in ranking.scores.tolist()):.4g}"
    labels = f" and {len(known)} labelled" if len(known) else ""
    return (f"{picked} of {len(pairs)} candidate pairs{labels} picked by {strategy}{gain}: "
            f"{output} ({time.perf_counter() - started:.1f} s)")


@dataclass(frozen=True)
class _Task:
    """A store, its pool, and pairs of rows, int64 [., 2]: candidates, those with a preference, and
    those that were asked and have none."""

    store: FeatureStore
    pool: PreferencePool
    pairs: torch.Tensor
    known: torch.Tensor
    asked: torch.Tensor

    @classmethod
    def read(
        cls, store_path: FilePath, labelled: FilePath | None, rules: PickRules | None, log: bool
    ) -> _Task:
        store = FeatureStore.open(store_path)
        pool = store.pool()
        known = asked = torch.empty(0, 2, dtype=torch.int64)
        if labelled is not None:
            known, asked = read_labelled_pairs(labelled, pool, log=log)
        prompts = PoolPrompts.of(pool, None if rules is None else rules.prompt_by)
        pairs = candidate_pairs(pool, torch.cat([known, asked]), store.manifest["skipped"], prompts,
                                log=log)
        return cls(store, pool, pairs, known, asked)


@contextmanager
def _processes() -> Iterator[dist.ProcessGroup | None]:
    """The processes that a launcher has started together; None for one that is alone."""
    size = os.environ.get("WORLD_SIZE", "").strip()
    if size in ONE_PROCESS:
        yield None
        return
    try:
        dist.init_process_group("gloo")
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ActiveDPOError(f"WORLD_SIZE is {size}, but the processes cannot be connected (use "
                             f"torchrun, or unset it): {reason}") from None
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _read_rows(
    store: FeatureStore, own: range, known: torch.Tensor
) -> tuple[torch.Tensor | StoredRows, History]:
    """The gradient rows numbered `own`, and those of the labelled pairs `known`."""
    rows = store.rows_on_disk()
    used, pairs = torch.unique(known, return_inverse=True)
    mine = rows.select(torch.arange(own.start, own.stop))
    return _at_hand(mine), (rows.take(used), pairs.view(-1, 2))


def _at_hand(rows: StoredRows) -> torch.Tensor | StoredRows:
    """The rows themselves where memory is not a question."""
    return rows.take(torch.arange(len(rows))) if rows.nbytes <= _IN_MEMORY_BYTES else rows


def read_rules(
    *, exclude: FilePath | None = None, quotas: Sequence[str] = (), **others: Any
) -> PickRules | None:
    """`PickRules` from what the command line has; None where it has no rule.

    Args:
        exclude: file with one id a line.
        quotas: "NAME=N" each.
        others: the other fields of `PickRules`.

    Raises:
        ActiveDPOError: naming the option, or the file, at fault.
    """
    most: dict[str, int] = {}
    for text in quotas:
        name, equals, number = text.rpartition("=")
        if not (equals and name and number.isascii() and number.isdigit()):
            raise ActiveDPOError(f"--quota {text}: expected NAME=N, N an integer from 0")
        if name in most:
            raise ActiveDPOError(f"--quota {text}: {name!r} has a quota already")
        most[name] = int(number)
    rules = PickRules(exclude=[] if exclude is None else _read_ids(exclude), quotas=most, **others)
    return None if rules == PickRules(seed=rules.seed) else rules


def _read_ids(path: FilePath) -> list[str]:
    """The ids of a file with one a line; blank lines are skipped."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ActiveDPOError(f"{path}: {reason_of(error)}") from error
    except UnicodeDecodeError as error:
        raise ActiveDPOError(f"{path}: not UTF-8 text ({error.reason})") from error
    return [line.strip() for line in text.split("\n") if line.strip()]


def run_rounds(config: RunConfig, *, show_progress: bool | None = None) -> str:
    """Run, or go on with, the rounds that a configuration describes; a table of them.

    Raises:
        LabelsPending: labels are awaited from people.
        ActiveDPOError: bad input, or several processes; nothing is written then that was not there.
    """
    require_one_process("activedpo run")
    output = Path(config.output_dir)
    check_folder_target(output)
    try:
        dpo_args = dpo_config(**{"output_dir": str(output / "trainer"), "seed": config.seed,
                                 **config.dpo})
    except ActiveDPOError:
        raise
    except Exception as error:  # files that it names may be missing, packages too old, ...
        raise ActiveDPOError(f"dpo: {' '.join(str(error).split())}") from error
    try:
        selector_settings(dpo_args)  # what it refuses is told before a model is loaded
    except ActiveDPOError as error:
        raise ActiveDPOError(f"dpo: {error}") from error
    prompts = read_prompts(config.prompts)
    oracle: Oracle
    if config.oracle["kind"] == "files":
        oracle = FileOracle(output / "labelling")
    else:
        options = {k: v for k, v in config.oracle.items() if k not in ("kind", "model")}
        oracle = RewardModelOracle(*load_reward_model(config.oracle["model"], config.device),
                                   seed=config.seed, show_progress=show_progress, **options)
    model, tokenizer = load_policy(
        config.model, adapter=config.adapter, lora=config.lora, dtype=config.dtype,
        device=config.device, gguf_file=config.gguf_file, seed=config.seed,
        tokenizer=config.tokenizer,
    )
    loop = ActiveDPOLoop(
        model, tokenizer, prompts, oracle,
        output_dir=output,
        dpo_args=dpo_args,
        strategy=config.strategy or "activedpo",
        selector_options={"seed": config.seed, **config.selection},
        generation=config.generation,
        chat_template_kwargs=config.chat_template_kwargs,
        rules=PickRules(seed=config.seed, **config.rules) if config.rules else None,
        seed=config.seed,
        extra_settings=_extra_settings(config),
        show_progress=show_progress,
        **config.loop,
    )
    return _table(loop.run())


def _extra_settings(config: RunConfig) -> dict[str, Any]:
    """What the loop cannot see in the objects that it is given: the adapter's name, the oracle."""
    adapter = None if config.adapter is None else fingerprint_adapter(config.adapter)
    oracle = dict(config.oracle)
    if oracle["kind"] == "reward_model":
        options = inspect.signature(RewardModelOracle).parameters
        oracle = {"temperature": options["temperature"].default,
                  "max_length": options["max_length"].default,
                  **oracle, "model": fingerprint_model(oracle["model"])}
        oracle.pop("batch_size", None)
    return {"adapter": adapter, "oracle": oracle}


def read_prompts(path: FilePath) -> list[Prompt]:
    """Prompts from rows with `prompt` and, if wanted, `id`; the rest is `extra`.

    They are read from what pools are read from, see `placed_rows`.

    Raises:
        ActiveDPOError: naming the row at fault.
    """
    prompts = []
    places = []
    for place, row in placed_rows(path):
        check_prompt_row(row, place)
        prompt, given = plain_text(row["prompt"]), id_of(row)
        check_text(prompt, "the prompt", place)
        extra = {name: value for name, value in row.items()
                 if name not in ("id", "prompt")
                 and not (name in RESPONSE_COLUMNS and is_absent(value))}
        check_columns(extra, place, chat=not isinstance(prompt, str), prompts=True)
        check_json_columns(extra, place)
        prompts.append(Prompt(content_id(prompt, ()) if given is None else given, prompt, extra))
        places.append(place)
    if not prompts:
        raise ActiveDPOError(f"{path}: no rows")
    check_prompts(prompts, places)
    return prompts


def _table(records: Sequence[RoundRecord]) -> str:
    """One line a round: labels so far, and the seconds of its stages."""
    stages = ("generate", "features", "select", "label", "train")
    lines = [["round", "labels", *(f"{stage} s" for stage in stages)]]
    for r in records:
        seconds = [f"{r.seconds[stage]:.1f}" if stage in r.seconds else "" for stage in stages]
        lines.append(["start" if r.round == START else str(r.round), str(r.labels_total), *seconds])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _check_overwrites_nothing(
    output: FilePath, store_path: FilePath, labelled: FilePath | None
) -> None:
    """Refuse to write over what people have made, or what the store is made of."""
    target = Path(output).resolve()
    if labelled is not None and target == Path(labelled).resolve():
        raise ActiveDPOError(f"{output} is the --labelled file too: choose another --output")
    store = Path(store_path).resolve()
    if (store / "manifest.json").exists() and target.is_relative_to(store):
        raise ActiveDPOError(f"{output} is inside the store: choose another --output")
    if not target.exists():
        return
    try:
        labels = [record.get("label") for _, record in jsonl_rows(target)
                  if isinstance(record, Mapping)]
    except ActiveDPOError as error:  # somebody may be editing it
        raise ActiveDPOError(f"{output} is there and cannot be read: choose another --output, or "
                             f"move it away ({error})") from None
    count = sum(label is not None for label in labels)
    if count:
        raise ActiveDPOError(f"{output} is there and has {count} labels: choose another --output, "
                             "or move it away")


def _export(store: FeatureStore, path: FilePath | None) -> str:
    if path is None:
        return ""
    store.export(path)
    return f", exported to {path}"
