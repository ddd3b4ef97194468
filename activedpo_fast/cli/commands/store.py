"""`activedpo store ...`: look at a feature store, check it, export it, join it, clean it up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from activedpo_fast.cli.session import Quiet, progress, say, session

app = typer.Typer(
    name="store",
    help="Look at a feature store, check it, export its rows, join several, or clean one up.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Store = Annotated[
    Path, typer.Argument(metavar="STORE", help="A store that `activedpo features` wrote.")
]


@app.command(epilog="Example:\n\n  activedpo store info store")
def info(store: Store, quiet: Quiet = False) -> None:
    """Show whether a store is complete, its rows and files, and what it was made with."""
    from activedpo_fast.cli.store_info import described
    from activedpo_fast.store.store import FeatureStore

    with session(quiet):
        say(quiet, described(FeatureStore.open(store, complete=False)), lines=True)


@app.command(epilog="Example:\n\n  activedpo store verify store")
def verify(store: Store, quiet: Quiet = False) -> None:
    """Read all of a store and compare it with its checksums.

    Exit code 2 names the first file that is damaged, or says which rows are missing or not finite.
    """
    from activedpo_fast.store.store import FeatureStore

    with session(quiet):
        say(quiet, FeatureStore.open(store).verify(show_progress=progress(quiet)))


@app.command(epilog="Example:\n\n  activedpo store export store features.safetensors")
def export(
    store: Store,
    output: Annotated[Path, typer.Argument(metavar="FILE", help="The .safetensors file.")],
    quiet: Quiet = False,
) -> None:
    """Write all rows as one float32 matrix, as `features --export` does."""
    from activedpo_fast.cli.outputs import check_output
    from activedpo_fast.store.store import FeatureStore

    with session(quiet):
        check_output("FILE", output, {})
        FeatureStore.open(store).export(output, show_progress=progress(quiet))
        say(quiet, f"the rows of {store} exported to {output}")


@app.command(
    epilog="Example:\n\n  activedpo store join store part-1 part-2\n\n"
    "  activedpo select store --output picked.jsonl"
)
def join(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the new store.")],
    stores: Annotated[
        list[Path],
        typer.Argument(metavar="STORE", help="Stores of parts of a pool, in the pool's order."),
    ],
    quiet: Quiet = False,
) -> None:
    """Make one store of stores of parts of a pool, with the same model and settings.

    Rows are copied. A prompt that is in several stores is kept once, if its rows are the same.
    """
    from activedpo_fast.store.store import FeatureStore

    with session(quiet):
        joined = FeatureStore.join(output, stores, show_progress=progress(quiet))
        pool = joined.pool()
        what = f"{pool.n_responses} gradient rows of {len(pool)} prompts"
        say(
            quiet,
            f"{what} from {len(stores)} {'store' if len(stores) == 1 else 'stores'} in {output}",
        )


@app.command(epilog="Example:\n\n  activedpo store gc store --dry-run")
def gc(
    store: Store,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files, and remove none.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Remove what killed processes left in a store: temporary files, nothing else.

    A shard that is being filled has rows that `activedpo features` goes on from, and stays.
    """
    from activedpo_fast._locks import locked_folder
    from activedpo_fast.store.store import FeatureStore

    with session(quiet):
        opened = FeatureStore.open(store, complete=False)
        with locked_folder(store):  # nobody is writing them
            found = opened.temporary_files()
            for path in found:
                say(quiet, f"{path} ({path.stat().st_size} bytes)")
            if not dry_run:
                for path in found:
                    path.unlink(missing_ok=True)
        what = "would be removed" if dry_run else "removed"
        say(quiet, f"{len(found)} files of killed processes {what}")
