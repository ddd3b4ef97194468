"""The command `activedpo`. Slow imports happen inside the commands."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from activedpo_fast._files import first_line, reason_of
from activedpo_fast._printable import one_line, shell_word
from activedpo_fast.cli.exchange import exchange
from activedpo_fast.cli.options import flag, keys_help, option, selector_config
from activedpo_fast.cli.session import (
    PENDING,
    Quiet,
    Seed,
    echo,
    exit_when_labels_are_missing,
    hush,
    interrupted,
    one_process,
    progress,
    say,
    session,
    terminated_as_interrupted,
)
from activedpo_fast.cli.store import store_app
from activedpo_fast.cli.streams import mend_streams
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.settings import (
    LoopConfig,
    Normalization,
    SelectorConfig,
    SketchName,
    Truncation,
)

app = typer.Typer(
    name="activedpo",
    help="Choose which preference pairs to label next, for the model that you are training now.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(store_app, name="store")

app.add_typer(exchange)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done; 2: bad input, one line on stderr; 3: labels are missing; 130: interrupted; 143:
    terminated (SIGTERM).
    Unexpected exceptions keep their traceback.
    """
    mend_streams()
    _wait_politely()
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    command = typer.main.get_command(app)
    try:
        with terminated_as_interrupted():
            code = command.main(args, prog_name="activedpo", standalone_mode=False)
            sys.stdout.flush()
    except ActiveDPOError as error:
        return _fail(str(error))
    except (BrokenPipeError, SystemExit):  # typer makes the latter of the former
        # Whoever read the output, such as `head`, has gone; at the end Python would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as error:
        return interrupted(error)
    except OSError as error:
        # No permission to read or write a file, a full disk, a name that is too long.
        return _fail(f"{error.filename or 'reading or writing a file'}: {reason_of(error)}")
    except Exception as error:
        if type(error).__name__ == "SafetensorError":  # its module is slow to import
            return _fail(f"a safetensors file cannot be read or written: {first_line(error)}")
        # The base class of usage errors differs between versions of typer; this method does not.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        return _fail(error.format_message().strip().rstrip(".") + hint)
    return code if isinstance(code, int) else 0


def _wait_politely() -> None:
    """Let OpenMP's threads spin briefly before they sleep, unless the user has set how they wait.

    By default they spin for milliseconds, and two processes on the same cores slow each other down
    many times. GNU OpenMP (PyTorch's on Linux, and ours) reads this when it is loaded, which no
    import has done yet.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def _fail(message: str) -> int:
    print("activedpo: error: " + one_line(" ".join(message.split())), file=sys.stderr)
    return 2


def _raise_limits(context: typer.Context, given: list[str]) -> list[str]:
    """Raise limits while the command runs; each is given as NAME=NUMBER."""
    from activedpo_fast._limits import raised_limits

    numbers: dict[str, int] = {}
    for text in given:
        name, equals, number = text.partition("=")
        if not (equals and number.isascii() and number.isdigit() and len(number) < 19):
            raise ActiveDPOError(f"--limit {text}: expected NAME=N, N an integer from 1")
        numbers[name] = int(number)
    context.with_resource(raised_limits(**numbers))
    return given


def _show_version(wanted: bool) -> None:
    if wanted:
        from activedpo_fast import __version__

        typer.echo(f"activedpo-fast {__version__}")
        raise typer.Exit


def _only(files: list[Path] | None, option: str) -> Path | None:
    """Refuse an option that is given twice, where the first value would be ignored unseen."""
    if files and len(files) > 1:
        raise ActiveDPOError(f"{option} is given twice: put the lines of the files into one file")
    return files[0] if files else None


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    limit: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=N",
            callback=_raise_limits,
            help="Another bound on what is read from files, by the name that its error message "
            "has; may be repeated.",
        ),
    ] = [],  # noqa: B006, which typer copies
) -> None:
    """Choose which preference pairs to label next for the model that you are training now."""


@app.command(epilog="Example:\n\n  activedpo env")
def env() -> None:
    """Show versions, devices and which backends are active."""
    with session(quiet=False):
        from activedpo_fast.cli.env import report

        section = None
        rows = report()
        width = max(len(row.name) for row in rows)
        for row in rows:
            if row.section != section:
                echo(f"{row.section}:")
                section = row.section
            echo(f"  {row.name:<{width}}  {row.value}")


@app.command(
    epilog="""\b
Examples:
  activedpo features pool.jsonl --model ./llama --adapter ./adapter --output store
  activedpo features pool.jsonl --model ./llama --adapter ./adapter --output store \\
      --sketch none --export features.safetensors
"""
)
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
    updated.
    """
    with session(quiet):
        import torch

        one_process("activedpo features")
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
            ),
        )


@app.command(
    epilog="""\b
Examples:
  activedpo select store --batch-size 50 --output picked.jsonl
  activedpo select store --batch-size 50 --labeled labels.jsonl --output next.jsonl
  activedpo select store --max-per-prompt 1 --exclude done.txt --output picked.jsonl
  activedpo select store --group-by topic --quota math=20 --quota law=10 --output picked.jsonl
  activedpo select store --min-score 0.5 --random-fraction 0.1 --cost tokens --output picked.jsonl
  torchrun --nproc-per-node 4 -m activedpo_fast select store --output picked.jsonl
"""
)
def select(
    store: Annotated[
        Path, typer.Argument(metavar="STORE", help="A store that `activedpo features` wrote.")
    ],
    output: Annotated[Path, typer.Option(help="JSONL file for the picked pairs, best first.")],
    batch_size: Annotated[
        int, typer.Option(min=1, help="B, the number of pairs.")
    ] = LoopConfig.batch_size,
    strategy: Annotated[
        Literal["activedpo", "trace", "random"], option(SelectorConfig, "strategy")
    ] = "activedpo",
    normalize: Annotated[Normalization, option(SelectorConfig, "normalize")] = "default",
    lam: Annotated[float, option(SelectorConfig, "lam")] = SelectorConfig.lam,
    kappa: Annotated[float, option(SelectorConfig, "kappa")] = SelectorConfig.kappa,
    labeled: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="JSONL file of pairs asked before: they are not picked again, and those with "
            "label 0 or 1 enter V.",
        ),
    ] = None,
    max_per_prompt: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most pairs of one prompt among the picks, whichever rows they are in; pairs "
            "labeled earlier do not count.",
        ),
    ] = None,
    prompt_by: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD",
            help="Column of the pool that says which rows belong to one prompt. "
            "Default: rows with the same prompt text.",
        ),
    ] = None,
    exclude: Annotated[
        Path | None,
        typer.Option(help="File of ids, one per line; no pairs of their prompts are picked."),
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="Column of the pool that names a prompt's group."),
    ] = None,
    quota: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=N", help="Most pairs of that group; repeat for each group to limit."
        ),
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option(help="Pick no pair that scores less, even if that leaves fewer pairs."),
    ] = None,
    random_fraction: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Share of the batch that is drawn at random, before the rest."
        ),
    ] = 0.0,
    cost: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD",
            help="Column of the pool with the cost of a prompt's label; pairs are "
            "picked by score / cost.",
        ),
    ] = None,
    seed: Annotated[int, option(SelectorConfig, "seed")] = SelectorConfig.seed,
    quiet: Quiet = False,
) -> None:
    """Pick the pairs of a store to label next.

    Under torchrun, the processes share the store's rows and make one selection together.
    """
    with session(quiet):
        from activedpo_fast.cli.select import read_rules, select_pairs

        args = selector_config(
            strategy=strategy, normalize=normalize, lam=lam, kappa=kappa, seed=seed
        )
        rules = read_rules(
            max_per_prompt=max_per_prompt,
            exclude=exclude,
            group_by=group_by,
            quotas=quota or [],
            min_score=min_score,
            random_fraction=random_fraction,
            cost=cost,
            seed=seed,
            prompt_by=prompt_by,
        )
        say(
            quiet,
            select_pairs(
                store,
                output,
                batch_size=batch_size,
                args=args,
                labeled=_only(labeled, "--labeled"),
                rules=rules,
                exclude=exclude,
                show_progress=progress(quiet),
            ),
        )


@app.command(
    epilog="""\b
Examples:
  activedpo label picked.jsonl
  activedpo label picked.jsonl --labeler ann --overlap 20
  activedpo label picked.jsonl --report
"""
)
def label(
    batch: Annotated[
        Path,
        typer.Argument(
            metavar="BATCH", help="Pairs that `activedpo select` or `activedpo run` wrote."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Labels file. Default: labels-NAME.jsonl next to BATCH, where `activedpo run` "
            "looks for it."
        ),
    ] = None,
    labeler: Annotated[
        str, typer.Option(metavar="NAME", help="Who labels; several people take turns or share.")
    ] = "labeler",
    overlap: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            metavar="PERCENT",
            help="Share of the pairs that every labeler gets, to measure agreement; the others "
            "go to one labeler each. Default: 0.",
        ),
    ] = None,
    combine: Annotated[
        Literal["majority", "dawid-skene"],
        typer.Option(help="How several answers to a pair become one label."),
    ] = "majority",
    question: Annotated[
        str, typer.Option(help="What the page asks.")
    ] = "Which response is better?",
    seed: Annotated[
        int | None, typer.Option(help="Seed of the sides and of the shared pairs. Default: 0.")
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 for any free one.")
    ] = 0,
    open_browser: Annotated[
        bool, typer.Option("--open", help="Open the page in the default browser.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Only print the report of the labels so far.")
    ] = False,
) -> None:
    """Label pairs in a page that this machine serves to itself.

    Every answer is on disk before the next pair is shown, and the same command goes on where it was
    ended. Exit code 3 means that pairs are left to label.
    """
    with session(quiet=False):
        from activedpo_fast.cli.label import label_batch, report_of

        if report:
            echo(report_of(batch, output=output, combine=combine), lines=True)
            return
        text, complete = label_batch(
            batch,
            output=output,
            labeler=labeler,
            overlap=overlap,
            seed=seed,
            combine=combine,
            question=question,
            port=port,
            open_browser=open_browser,
        )
        echo(text, lines=True)
        if not complete:
            raise typer.Exit(PENDING)


@app.command(
    epilog=f"""\b
Examples:
  activedpo run run.yaml
  activedpo run examples/run.yaml --quiet

{keys_help()}
"""
)
def run(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG", help="YAML file; see docs/cli.md, examples/run.yaml."),
    ],
    quiet: Quiet = False,
) -> None:
    """Run the rounds that a YAML file describes.

    A round generates responses, selects pairs, has them labeled and trains. Work that an earlier
    run finished is not repeated. Exit code 3 means that the run waits for labels from people: do
    what it says (`activedpo label FILE`), then run the same command again.
    """
    with session(quiet):
        one_process("activedpo run")
        from activedpo_fast.cli.run import run_rounds
        from activedpo_fast.cli.run_file import load_config

        hush()
        command = f"activedpo run {shell_word(config)}"
        with exit_when_labels_are_missing():
            settings = load_config(config)
            table = run_rounds(settings, command=command, show_progress=progress(quiet))
            say(quiet, table, lines=True)


@app.command(
    epilog="""\b
Examples:
  activedpo report runs/example
  activedpo report runs/random runs/activedpo --output compared.html
  activedpo report runs/example --card README.md
"""
)
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Folders of runs (output_dir); the differences of several are to the first.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The HTML file. Default: report.html in RUN, or in the current folder for several "
            "runs."
        ),
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option(help="Also write a model card of the run's last adapter to this file."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Report what runs did: metrics, cost, labels and picks, as a table and one HTML file.

    The file needs no network and runs no script. Unfinished runs are reported as far as they go.
    """
    with session(quiet):
        from activedpo_fast.cli.report import report_runs

        hush()
        say(quiet, report_runs(runs, output=output, card=card), lines=True)


@app.command(
    epilog="""\b
Examples:
  activedpo demo
  activedpo demo --model smollm2 --output runs/smollm2
  activedpo demo --label
"""
)
def demo(
    model: Annotated[
        Literal["reviews", "small", "smollm2"],
        typer.Option(
            help="reviews: a small vendored model that finishes reviews. small (also vendored) and "
            "smollm2 (SmolLM2-135M-Instruct) write synopses."
        ),
    ] = "reviews",
    output: Annotated[Path, typer.Option(help="Folder for all output.")] = Path("runs/demo"),
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Number of rounds; default: the demo's.")
    ] = None,
    seed: Seed = 0,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Start over instead of continuing the run in the folder."),
    ] = False,
    label: Annotated[
        bool,
        typer.Option(
            "--label", help="You label 20 pairs in a local page, and the model is trained on them."
        ),
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Run ActiveDPO and random selection side by side, on real text and a real model."""
    with session(quiet):
        one_process("activedpo demo")
        from activedpo_fast.demo.run import run_demo

        hush()
        # Warns that some responses continue the prompt's last word; TRL and this library tokenize
        # these the same.
        logging.getLogger("trl").setLevel(logging.ERROR)
        with exit_when_labels_are_missing():
            run_demo(
                model=model,
                output=output,
                rounds=rounds,
                seed=seed,
                fresh=fresh,
                label=label,
                show_progress=progress(quiet),
            )
