"""`activedpo select`: its options and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from activedpo_fast.cli.options import option, selector_config
from activedpo_fast.cli.session import Quiet, progress, say, session
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.settings import LoopConfig, Normalization, SelectorConfig

EPILOG = """\b
Examples:
  activedpo select store --pairs 50 --output picked.jsonl
  activedpo select store --pairs 50 --labeled labels.jsonl --output next.jsonl
  activedpo select store --max-per-prompt 1 --exclude done.txt --output picked.jsonl
  activedpo select store --group-by topic --quota math=20 --quota law=10 --output picked.jsonl
  activedpo select store --min-score 0.5 --random-fraction 0.1 --cost tokens --output picked.jsonl
  activedpo select store --strategy reward_gap --reward-column rewards --output picked.jsonl
  torchrun --nproc-per-node 4 -m activedpo_fast select store --output picked.jsonl
"""

# Those that need gradient rows, rewards or nothing. A test compares them with the strategies.
StoreStrategy = Literal["activedpo", "trace", "random", "reward_gap"]


def _served(name: str) -> str:
    """Refuse a strategy that needs more than a store has, saying what and where it can be used."""
    if name in get_args(StoreStrategy):
        return name
    *others, last = get_args(StoreStrategy)
    expected = f"{', '.join(others)} or {last}"
    from activedpo_fast.selection.strategies import STRATEGIES

    if name not in STRATEGIES:
        raise ActiveDPOError(f"--strategy {name}: expected {expected}")
    hidden = "hidden" in STRATEGIES[name].requires
    needed = "last hidden states" if hidden else "log-probs of the reference model"
    raise ActiveDPOError(
        f"--strategy {name}: it needs {needed}, which a store does not have; expected {expected}, "
        "or use it with the model, in `activedpo run` or in Python (ActiveDPOSelector)"
    )


def select(
    store: Annotated[
        Path, typer.Argument(metavar="STORE", help="A store that `activedpo features` wrote.")
    ],
    output: Annotated[Path, typer.Option(help="JSONL file for the picked pairs, best first.")],
    n: Annotated[
        int,
        typer.Option(
            "--pairs",
            min=1,
            metavar="INTEGER",
            help="How many pairs to pick; all that there are if there are fewer.",
        ),
    ] = LoopConfig.batch_size,
    strategy: Annotated[
        str,
        typer.Option(
            metavar="|".join(get_args(StoreStrategy)),
            callback=_served,
            help="How pairs are chosen. The other strategies need what a store does not have, "
            "hidden states or a reference model: they are in `activedpo run` and in Python.",
        ),
    ] = "activedpo",
    normalize: Annotated[
        Normalization,
        typer.Option(
            help="What activedpo scales to unit norm: each response's gradient row (response, its "
            "default), the difference of a pair's two rows (pair), or nothing (none). The other "
            "strategies do not scale."
        ),
    ] = "default",
    lam: Annotated[float, option(SelectorConfig, "lam")] = SelectorConfig.lam,
    kappa: Annotated[float, option(SelectorConfig, "kappa")] = SelectorConfig.kappa,
    reward_column: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD",
            help="Column of the pool with a list of rewards, one number for each response, from a "
            "reward model: reward_gap picks the pairs that they rate furthest apart. Its default "
            "is rewards.",
        ),
    ] = None,
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
            min=0, max=1, help="Share of the picks that is drawn at random, before the rest."
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
    preselect: Annotated[
        int | None,
        typer.Option(
            help="How many pairs per pick the rows of --preselect-by choose first; the store's own "
            "rows then pick among them."
        ),
    ] = None,
    preselect_by: Annotated[
        Path | None,
        typer.Option(
            metavar="STORE",
            help="A store of other rows of the same pool, such as those of features --gradient "
            "response_tokens: shows what two stages would pick.",
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
            strategy=strategy,
            normalize=normalize,
            lam=lam,
            kappa=kappa,
            preselect=preselect,
            seed=seed,
            strategy_options=_with_reward(strategy, reward_column),
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
                n=n,
                args=args,
                labeled=_only(labeled, "--labeled"),
                rules=rules,
                exclude=exclude,
                preselect_by=preselect_by,
                show_progress=progress(quiet),
            ),
        )


def _with_reward(strategy: str, column: str | None) -> dict[str, str] | None:
    """Return the options of reward_gap; refuse a column that the strategy does not read."""
    if column is not None and strategy != "reward_gap":
        raise ActiveDPOError(f"--reward-column: the strategy {strategy} reads no rewards")
    return None if column is None else {"reward": column}


def _only(files: list[Path] | None, option: str) -> Path | None:
    """Refuse an option that is given twice, where the first value would be ignored unseen."""
    if files and len(files) > 1:
        raise ActiveDPOError(f"{option} is given twice: put the lines of the files into one file")
    return files[0] if files else None
