"""The commands `activedpo store ...`: look at a feature store, check it, export it, clean it up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from activedpo_fast.cli.session import Quiet, echo, session

if TYPE_CHECKING:
    from activedpo_fast.store.store import FeatureStore

store_app = typer.Typer(
    help="Look at a feature store, check it, export its rows, or clean it up.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Store = Annotated[
    Path, typer.Argument(metavar="STORE", help="A store that `activedpo features` wrote.")
]


@store_app.command(epilog="Example:\n\n  activedpo store info store")
def info(store: Store) -> None:
    """Show the settings of a store, its rows and sizes, and whether it is complete."""
    from activedpo_fast.store.store import FeatureStore

    with session(quiet=False):
        for name, value in describe(FeatureStore.open(store, complete=False)):
            echo(f"{name:<22}  {value}")


@store_app.command(epilog="Example:\n\n  activedpo store verify store")
def verify(store: Store, quiet: Quiet = False) -> None:
    """Read all of a store and compare it with its checksums.

    Exit code 2 names the first file that is damaged, or says which rows are missing or not finite.
    """
    from activedpo_fast.store.store import FeatureStore

    with session(quiet):
        found = FeatureStore.open(store).verify(show_progress=False if quiet else None)
        if not quiet:
            echo(found)


@store_app.command(epilog="Example:\n\n  activedpo store export store features.safetensors")
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
        FeatureStore.open(store).export(output, show_progress=False if quiet else None)
        if not quiet:
            echo(f"the rows of {store} exported to {output}")


@store_app.command(epilog="Example:\n\n  activedpo store gc store --dry-run")
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
                if not quiet:
                    echo(f"{path} ({path.stat().st_size} bytes)")
            if not dry_run:
                for path in found:
                    path.unlink(missing_ok=True)
        if not quiet:
            what = "would be removed" if dry_run else "removed"
            echo(f"{len(found)} files of killed processes {what}")


def describe(store: FeatureStore) -> list[tuple[str, str]]:
    """Return what `activedpo store info` shows: names and values."""
    manifest = store.manifest
    missing = len(store.missing_rows())
    partial = store.partial()
    size = sum(path.stat().st_size for path in store.path.iterdir() if path.is_file())
    if missing:
        state = f"no: {missing} rows are missing"
    else:
        state = "no: the last shard is not finished" if partial else "yes"
    found: dict[str, Any] = {
        "complete": state,
        "responses": manifest["responses"],
        "prompts too long": len(manifest["skipped"]),
        "shards": len(list(store.path.glob("rows-*.safetensors"))),
        "shards being filled": len(partial),
        "bytes": size,
        "files left behind": len(store.temporary_files()),
        "format": manifest["format"],
        **manifest["settings"],
    }
    filling = manifest.get("filling", {})
    for name in ("rows_per_shard", "max_tokens_per_batch", "layout"):
        if name in filling:
            found[name] = filling[name]
    return [(name, str(value)) for name, value in found.items()]
