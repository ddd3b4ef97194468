"""`activedpo features`: its options and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from activedpo_fast.cli.options import flag, option, selector_config
from activedpo_fast.cli.session import Quiet, hush, progress, say, session
from activedpo_fast.distributed.launcher import launched
from activedpo_fast.settings import GradientOf, SelectorConfig, SketchName, Truncation

EPILOG = """\b
Examples:
  activedpo features pool.jsonl --model ./llama --adapter ./adapter --output store
  activedpo features pool.jsonl --model ./llama --adapter ./adapter --output store \\
      --sketch none --export features.safetensors
  torchrun --nproc-per-node 4 -m activedpo_fast features pool.jsonl --model ./llama \\
      --adapter ./adapter --output store
"""


def features(
    pool: Annotated[
        Path,
        typer.Argument(
            metavar="POOL",
            help="Prompts with their responses: .jsonl or .parquet, a folder of such "
            "files, or a folder of datasets.save_to_disk.",
        ),
    ],
    model: Annotated[str, typer.Option(help="Base model: a folder, or a name on the hub.")],
    output: Annotated[Path, typer.Option(help="Folder of the feature store.")],
    adapter: Annotated[
        str | None, typer.Option(help="Folder of the LoRA adapter that is being trained.")
    ] = None,
    gguf_file: Annotated[
        str | None, typer.Option(help="A GGUF file in the model's folder.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder of the tokenizer, or a name on the hub. Default: the adapter's if its "
            "folder has one, else the model's."
        ),
    ] = None,
    sketch: Annotated[SketchName, option(SelectorConfig, "sketch")] = SelectorConfig.sketch,
    proj_dim: Annotated[int, option(SelectorConfig, "proj_dim")] = SelectorConfig.proj_dim,
    seed: Annotated[int, option(SelectorConfig, "seed")] = SelectorConfig.seed,
    export: Annotated[
        Path | None,
        typer.Option(help="Also write all rows as one matrix to this .safetensors file."),
    ] = None,
    beta: Annotated[float, option(SelectorConfig, "beta")] = SelectorConfig.beta,
    length_normalized: Annotated[
        bool, flag(SelectorConfig, "length_normalized")
    ] = SelectorConfig.length_normalized,
    gradient: Annotated[GradientOf, option(SelectorConfig, "gradient")] = SelectorConfig.gradient,
    last_layers: Annotated[
        int | None, option(SelectorConfig, "last_layers")
    ] = SelectorConfig.last_layers,
    max_length: Annotated[
        int, option(SelectorConfig, "max_length", metavar="INTEGER, 0 for no limit")
    ] = SelectorConfig.max_length or 0,
    truncation_mode: Annotated[
        Truncation, option(SelectorConfig, "truncation_mode")
    ] = SelectorConfig.truncation_mode,
    chat_template_kwargs: Annotated[
        str | None, option(SelectorConfig, "chat_template_kwargs", metavar="JSON")
    ] = None,
    max_tokens_per_batch: Annotated[
        int | None, option(SelectorConfig, "max_tokens_per_batch")
    ] = SelectorConfig.max_tokens_per_batch,
    bf16: Annotated[bool, flag(SelectorConfig, "bf16")] = SelectorConfig.bf16,
    verify: Annotated[bool, flag(SelectorConfig, "verify")] = SelectorConfig.verify,
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, float64, bfloat16, float16, or auto: the checkpoint's, except float32 "
            "for half precision on the CPU."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, ..., or auto.")] = "auto",
    store_dtype: Annotated[
        Literal["float32", "bfloat16", "float64"],
        typer.Option(help="Dtype of the stored rows; bfloat16 takes half the space."),
    ] = "float32",
    skip_non_finite: Annotated[
        bool,
        typer.Option(
            "--skip-non-finite",
            help="Go on when the model gives NaN or infinity for a response: it is named, and its "
            "prompt is never picked.",
        ),
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    quiet: Quiet = False,
) -> None:
    """Compute the gradient row of every response of a pool.

    The rows are kept in a store, a folder that `activedpo select` reads. The same command
    continues an interrupted run. In an existing store, columns of POOL other than the texts are
    updated. Under torchrun or `accelerate launch`, the processes share the work, each with a GPU of
    its own if there are any.
    """
    # The processes are connected first: some libraries do it themselves when they are imported.
    with session(quiet), launched() as group:
        import torch

        from activedpo_fast.cli.features import FeatureOptions, take_features

        hush()
        if threads is not None:
            torch.set_num_threads(threads)
        options = FeatureOptions(
            model=model,
            adapter=adapter,
            gguf_file=gguf_file,
            tokenizer=tokenizer,
            rows=selector_config(
                sketch=sketch,
                proj_dim=proj_dim,
                seed=seed,
                beta=beta,
                length_normalized=length_normalized,
                gradient=gradient,
                last_layers=last_layers,
                max_length=max_length or None,
                truncation_mode=truncation_mode,
                chat_template_kwargs=chat_template_kwargs,
                max_tokens_per_batch=max_tokens_per_batch,
                bf16=bf16,
                verify=verify,
            ),
            dtype=dtype,
            device=device,
            store_dtype=store_dtype,
        )
        say(
            quiet,
            take_features(
                pool,
                output,
                options,
                export=export,
                skip_non_finite=skip_non_finite,
                show_progress=progress(quiet),
                group=group,
            ),
        )
