"""The command `activedpo features`: writes the gradient rows of a pool to a store.

Several processes share the work. Only the first one reads and writes the store.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from activedpo_fast import __version__
from activedpo_fast._files import FilePath, check_folder_target
from activedpo_fast._locks import locked_folder
from activedpo_fast.cli.outputs import check_output
from activedpo_fast.distributed.launcher import own_device
from activedpo_fast.distributed.pool_parts import PoolProcesses
from activedpo_fast.distributed.token_parts import tokenize_in_parts
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.sketch import Sketch
from activedpo_fast.models.encoder_decoder import decoder_start_token_id
from activedpo_fast.models.file_fingerprints import (
    fingerprint_adapter,
    fingerprint_model,
    fingerprint_tokenizer,
)
from activedpo_fast.models.folders import resolve_source, tokenizer_source
from activedpo_fast.models.loading import NO_ADAPTER, load_policy, resolve_device, resolve_dtype
from activedpo_fast.pool.columns import check_json_columns
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.settings import SelectorConfig
from activedpo_fast.store.comparing import check_store_folder
from activedpo_fast.store.filling import KEPT
from activedpo_fast.store.manifest import MANIFEST
from activedpo_fast.store.store import FeatureStore

if TYPE_CHECKING:
    import torch.distributed as dist
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class FeatureOptions:
    """Everything that the gradient rows of a pool depend on, except the pool itself.

    `rows` has settings of the selector; those of strategies have no effect.
    """

    model: str
    adapter: str | None
    gguf_file: str | None = None
    tokenizer: str | None = None
    rows: SelectorConfig = field(default_factory=SelectorConfig)
    dtype: str = "auto"
    device: str = "auto"
    store_dtype: str = "float32"

    @property
    def sketch(self) -> Sketch:
        return Sketch(self.rows.sketch, self.rows.proj_dim, self.rows.seed)

    def settings(self) -> dict[str, Any]:
        """Return JSON values that identify the rows; a store's must equal those of the options.

        `store_dtype` is not included; `FeatureStore.create` adds it. Neither is the device: rows
        differ by rounding between devices, as they do between batch sizes. The dtype that "auto"
        means on this device is included.
        """
        if self.adapter is None:
            raise ActiveDPOError(NO_ADAPTER)
        dtype = resolve_dtype(self.model, self.dtype, resolve_device(self.device), self.gguf_file)
        rows, sketch = self.rows, self.sketch
        adapter_fingerprint = fingerprint_adapter(self.adapter)  # checks that it is an adapter
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
            "precision": "bf16" if rows.bf16 else None,
            "sketch": sketch.method,
            "proj_dim": sketch.dim,
            "seed": sketch.seed,
            "beta": rows.beta,
            "max_length": rows.max_length,
            "truncation_mode": rows.truncation_mode,
            # Absent if there are none, as in stores made before this option existed.
            **(
                {"chat_template_kwargs": rows.chat_template_kwargs}
                if rows.chat_template_kwargs
                else {}
            ),
            "version": __version__,
            # Only if true: stores of sums do not have the key.
            **({"length_normalized": True} if rows.length_normalized else {}),
            # Likewise: stores of exact rows do not have the key.
            **({} if rows.gradient == "all_tokens" else {"gradient": rows.gradient}),
            **({} if rows.last_layers is None else {"last_layers": rows.last_layers}),
        }


def take_features(
    pool_path: FilePath,
    output: FilePath,
    options: FeatureOptions,
    *,
    export: FilePath | None = None,
    skip_non_finite: bool = False,
    show_progress: bool | None = None,
    group: dist.ProcessGroup | None = None,
) -> str | None:
    """Create the feature store at `output`, or finish an existing one; return a one-line summary.

    In an existing store, columns of the pool other than its texts are updated. With a `group`, all
    of its processes call this and compute the rows together, each on a GPU of its own if there are
    any; the first one writes them, and the others return None.

    Raises:
        ActiveDPOError: bad input, or another process failed. Nothing is written then, unless rows
            were already being computed.
    """
    started = time.perf_counter()
    folder, processes = Path(output), PoolProcesses(group, KEPT)

    def prepare() -> tuple[PreferencePool, FeatureOptions, dict[str, Any]]:
        if processes.rank == 0:
            _check_targets(pool_path, output, options, export)
        pool = PreferencePool.load(pool_path)
        if pool.has_images:
            raise ActiveDPOError(
                f"{pool_path}: prompts have images, and this command loads models of text: select "
                "in Python, with ActiveDPOSelector, the model and its processor"
            )
        for item in pool:
            check_json_columns(item.extra, f"{pool_path}: item {item.id!r}")
        own = replace(options, device=own_device(options.device)) if group else options
        settings = own.settings()
        if processes.rank == 0:
            check_store_folder(folder, pool)
        return pool, own, settings

    pool, options, settings = processes.check(prepare)
    with processes.in_first(lambda: locked_folder(folder)):
        done = _take(
            folder,
            pool,
            options,
            settings,
            processes,
            skip_non_finite=skip_non_finite,
            show_progress=show_progress,
        )
    if processes.rank > 0:
        return None
    seconds = f" ({time.perf_counter() - started:.1f} s)" if done.computed else ""
    return f"{done.said}{seconds}{done.columns}{_export(done.store, export, show_progress)}"


def _check_targets(
    pool_path: FilePath, output: FilePath, options: FeatureOptions, export: FilePath | None
) -> None:
    """Raise `ActiveDPOError` if the store or the export cannot be written."""
    check_output(
        "--export",
        export,
        {
            "--output": output,
            "POOL": pool_path,
            "--model": options.model,
            "--adapter": options.adapter,
            "--tokenizer": options.tokenizer,
        },
    )
    check_folder_target(output)


class _Done(NamedTuple):
    store: FeatureStore
    computed: bool
    said: str
    columns: str


def _take(
    folder: Path,
    pool: PreferencePool,
    options: FeatureOptions,
    settings: dict[str, Any],
    processes: PoolProcesses,
    *,
    skip_non_finite: bool,
    show_progress: bool | None,
) -> _Done:
    """Compute the rows that the store at `folder` lacks, which may be all of them."""
    columns = ""
    store: FeatureStore | None = None

    def store_of(skipped: list[int]) -> FeatureStore:
        return FeatureStore.create(
            folder,
            pool,
            settings,
            skipped=skipped,
            dtype=options.store_dtype,
            group=processes.group,
        )

    if any(processes.of_first(lambda: [(folder / MANIFEST).exists()])):
        # Opening it compares the settings before a model is loaded.
        store = opened = store_of(skipped=[])
        if store.columns_taken:
            columns = f"; columns brought up to date: {', '.join(store.columns_taken)}"
        if any(processes.of_first(lambda: [opened.is_whole()])):
            nothing = "" if columns else ": nothing to do"
            return _Done(store, False, f"{folder} is complete already{nothing}", columns)

    extractor, tokenizer = processes.check(lambda: _load(options, settings, skip_non_finite))
    tokenized = tokenize_in_parts(
        pool,
        tokenizer,
        processes,
        decoder_start_token_id=decoder_start_token_id(extractor.model, tokenizer),
        show_progress=show_progress,
        **options.rows.tokenization,
    )

    def check() -> None:
        if len(tokenized.skipped) == len(pool):
            raise ActiveDPOError(
                f"every prompt fills --max-length {options.rows.max_length}: there is nothing to "
                "score"
            )
        if store is not None:
            store.check_tokens(tokenized)
        extractor.check(tokenized)  # before anything is written

    processes.check(check)
    if store is None:
        store = store_of(skipped=tokenized.skipped)
    store.fill(extractor, tokenized, show_progress=show_progress, group=processes.group)
    left_out = f", {len(tokenized.skipped)} prompts too long" if tokenized.skipped else ""
    said = f"{pool.n_responses} gradient rows of {len(pool)} prompts{left_out} in {folder}"
    return _Done(store, True, said, columns)


def _load(
    options: FeatureOptions, settings: dict[str, Any], skip_non_finite: bool
) -> tuple[FeatureExtractor, PreTrainedTokenizerBase]:
    """Load the model and its tokenizer."""
    rows = options.rows
    model, tokenizer = load_policy(
        options.model,
        adapter=options.adapter,
        gguf_file=options.gguf_file,
        dtype=settings["dtype"],
        device=options.device,
        tokenizer=options.tokenizer,
    )
    extractor = FeatureExtractor(
        model,
        options.sketch,
        beta=rows.beta,
        length_normalized=rows.length_normalized,
        gradient=rows.gradient,
        last_layers=rows.last_layers,
        pad_token_id=tokenizer.pad_token_id or 0,
        max_tokens_per_batch=rows.max_tokens_per_batch,
        precision=settings["precision"],
        verify=rows.verify,
        skip_non_finite=skip_non_finite,
    )
    return extractor, tokenizer


def _export(store: FeatureStore, path: FilePath | None, show_progress: bool | None) -> str:
    if path is None:
        return ""
    store.export(path, show_progress=show_progress)
    return f", exported to {path}"
