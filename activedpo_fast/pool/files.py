"""Reading the rows of a pool or of prompts from a file, a folder of files, or a data set."""

from __future__ import annotations

import codecs
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from activedpo_fast._files import FilePath, first_line, open_input, parse_json, reason_of
from activedpo_fast._limits import check_limit, limit
from activedpo_fast.errors import ActiveDPOError

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

PlacedRows = Iterator[tuple[str, Any]]
_VALUE = 8  # bytes of a value of a table, at least
IMAGE_COLUMNS = ("image", "images")
EMPTY_DATASET = "the data set has no rows"

# The hub's names for the files of a split: train-00000-of-00003.parquet.
_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-(?P<total>\d{5})")


def placed_rows(path: FilePath) -> PlacedRows:
    """Yield (place, row) for every row, in order; the place is for error messages.

    Args:
        path: a `.jsonl` or `.parquet` file (upper or lower case), a folder of files of one of these
            kinds, read in order of their names, or a folder written by `datasets.save_to_disk`.

    Raises:
        ActiveDPOError: it cannot be read, or is something else; the message says what.
    """
    source = Path(path)
    if source.is_dir():
        dataset = saved_dataset(source)
        if dataset is not None:
            return ((f"{source}, row {n}", row) for n, row in enumerate(_rows(dataset), start=1))
        return (placed for file in _shards(source) for placed in _reader(file)(file))
    if not source.suffix and not source.exists():
        raise ActiveDPOError(f"{source}: no such file or folder")
    return _reader(source)(source)


def jsonl_rows(path: Path) -> PlacedRows:
    """Yield the placed rows of one JSONL file; blank lines are skipped."""
    with open_input(path) as file:
        size = os.fstat(file.fileno()).st_size
        check_limit("file_mib", size / 2**20, path, "MiB")
        for n, line in enumerate(_lines(file, path), start=1):
            place = f"{path}, line {n}"
            line = line.removeprefix(codecs.BOM_UTF8) if n == 1 else line
            check_limit("json_mib", len(line) / 2**20, place, "MiB or more in one line")
            if not line.strip():
                continue
            try:
                text = line.removesuffix(b"\n").decode("utf-8")
            except UnicodeDecodeError as error:
                raise ActiveDPOError(f"{place}: not UTF-8 (byte {error.start + 1})") from error
            yield place, parse_json(text, place)


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    r"""Yield lines, which end only at \n: str.splitlines would also cut at U+2028 in a string."""
    longest = limit("json_mib") * 2**20 + 2
    try:
        while line := file.readline(longest):
            yield line
    except OSError as error:
        raise ActiveDPOError(f"{path}: {reason_of(error)}") from error


def parquet_rows(path: Path) -> PlacedRows:
    """Return the placed rows of one Parquet file; missing or filled-up cells are null."""
    return ((f"{path}, row {n}", row) for n, row in enumerate(_parquet(path), start=1))


def _parquet(path: Path) -> list[Any]:
    """Return the rows, read in small parts: a file of a kilobyte may hold gigabytes."""
    import pyarrow
    import pyarrow.parquet

    rows: list[Any] = []
    size = 0
    with open_input(path) as file:
        try:
            found = pyarrow.parquet.ParquetFile(file)
            at_once = _rows_at_once(found.metadata, path)
            for part in found.iter_batches(batch_size=at_once):
                new = part.to_pylist()
                size += _bytes_of(new)
                check_limit("file_mib", size / 2**20, path, "MiB or more in memory")
                _parse_json_columns(new, part.schema, path)
                rows += new
        except ActiveDPOError:
            raise
        except OSError as error:
            # Arrow's own read errors are OSErrors, too, without an errno.
            raise ActiveDPOError(f"{path}: {reason_of(error)}") from error
        except (pyarrow.ArrowException, ValueError) as error:
            raise ActiveDPOError(f"{path}: not a Parquet file: {first_line(error)}") from error
    return rows


def _parse_json_columns(rows: list[Any], schema: Any, path: Path) -> None:
    """Put the values of columns of JSON texts in their place, as `datasets.Json` writes them."""
    for column in schema:
        kind = getattr(column.type, "value_type", column.type)  # of a list's entries
        if getattr(kind, "extension_name", None) == "arrow.json":
            for row in rows:
                row[column.name] = _from_json(row[column.name], f"{path}, column {column.name!r}")


def _from_json(value: Any, place: str) -> Any:
    if isinstance(value, list):
        return [_from_json(entry, place) for entry in value]
    return parse_json(value, place) if isinstance(value, str) else value


def _rows_at_once(metadata: Any, path: Path) -> int:
    """Return how many rows fit into `file_mib`, even if each is the largest that there may be.

    Columns store each value that is repeated once.
    """
    groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
    columns = [group.column(n) for group in groups for n in range(group.num_columns)]
    sizes = [max(one.total_uncompressed_size, _VALUE * one.num_values) for one in columns]
    check_limit("file_mib", sum(sizes) / 2**20, path, "MiB in memory")
    largest = max((int(size) for size in sizes), default=0)
    return max(1, min(1024, limit("file_mib") * 2**20 // max(1, largest)))


def _bytes_of(rows: list[Any]) -> int:
    """Return about how much memory the values of rows take."""
    size, level = 0, rows
    while level:
        size += _VALUE * len(level)
        size += sum(len(value) for value in level if isinstance(value, (str, bytes)))
        level = [
            inner
            for value in level
            if isinstance(value, (list, dict))
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
    return size


def is_from_datasets(value: Any) -> bool:
    """Return whether a class of the package `datasets` made `value`; does not import it."""
    return any(kind.__module__.partition(".")[0] == "datasets" for kind in type(value).__mro__)


def dataset_rows(dataset: datasets.Dataset) -> PlacedRows:
    """Return the placed rows of a `datasets.Dataset` (one split, not streamed).

    Raises:
        ActiveDPOError: it has several splits, is streamed, or is something else.
    """
    import datasets

    if isinstance(dataset, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        splits = ", ".join(map(repr, dataset))
        raise ActiveDPOError(f"the data set has several splits ({splits}): pass one of them")
    if isinstance(dataset, datasets.IterableDataset):
        raise ActiveDPOError(
            "a streamed (iterable) data set has no fixed rows to choose from: "
            "load it without streaming=True"
        )
    if not isinstance(dataset, datasets.Dataset):
        raise ActiveDPOError(f"expected a datasets.Dataset, got {type(dataset).__name__}")
    return ((f"data set, row {n}", row) for n, row in enumerate(_rows(dataset), start=1))


def _rows(dataset: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """Yield rows, with images as the files that they are: nothing is decoded."""
    names = [name for name in IMAGE_COLUMNS if name in dataset.column_names]
    if not names:
        yield from dataset.with_format(None)
        return
    files = dataset.select_columns(names).with_format("arrow")
    others = dataset.remove_columns(names).with_format(None)
    for row, cells in zip(others, files, strict=True):
        yield {**row, **cells.to_pylist()[0]}


def saved_dataset(folder: Path) -> datasets.Dataset | None:
    """Return the data set that `datasets.Dataset.save_to_disk` wrote to a folder, or None.

    Raises:
        ActiveDPOError: it has several splits, or cannot be read.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(file.parent.name for file in folder.glob("*/state.json"))
        example = f", for instance {folder / splits[0]}" if splits else ""
        raise ActiveDPOError(
            f"{folder}: a saved data set with the splits "
            f"{', '.join(map(repr, splits))}: give the folder of one of them" + example
        )
    if not (folder / "state.json").is_file():
        return None
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # missing or broken files raise various errors
        raise ActiveDPOError(
            f"{folder}: a saved data set that cannot be read: {first_line(error)}"
        ) from error
    assert isinstance(loaded, datasets.Dataset)
    return loaded


_READERS: dict[str, Callable[[Path], PlacedRows]] = {".jsonl": jsonl_rows, ".parquet": parquet_rows}


def _reader(path: Path) -> Callable[[Path], PlacedRows]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ActiveDPOError(
            f"{path}: unsupported suffix {path.suffix!r}, expected .jsonl or "
            ".parquet, a folder of such files, or one of datasets.save_to_disk"
        )
    return reader


def _shards(folder: Path) -> list[Path]:
    """Return the files of a folder that has one kind of them, by name."""
    if (folder / "manifest.json").is_file() and (folder / "pool.jsonl").is_file():
        raise ActiveDPOError(f"{folder}: a feature store; its pool is {folder / 'pool.jsonl'}")
    files = sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in _READERS and file.name[0] not in "._"
    )
    kinds = sorted({file.suffix.lower() for file in files})
    if not files:
        raise ActiveDPOError(
            f"{folder}: a folder without .jsonl or .parquet files, and not one of "
            "datasets.save_to_disk: give the file, or the folder that has them"
        )
    if len(kinds) > 1:
        raise ActiveDPOError(
            f"{folder}: has .jsonl and .parquet files: give one of them, or a folder of one kind"
        )
    _check_complete(folder, files)
    if len(files) > 1:
        logger.info(
            "%s: %d files, from %s to %s", folder, len(files), files[0].name, files[-1].name
        )
    return files


def _check_complete(folder: Path, files: list[Path]) -> None:
    """Refuse several splits, and a split with a missing shard, as far as the names tell."""
    named = [match for file in files if (match := _SHARD.fullmatch(file.stem))]
    splits = sorted({match["split"] for match in named})
    if len(splits) > 1:
        raise ActiveDPOError(
            f"{folder}: has files of the splits {', '.join(map(repr, splits))}: "
            "give one file, or a folder of one split"
        )
    if named and len(named) != (total := int(named[0]["total"])):
        raise ActiveDPOError(f"{folder}: has {len(named)} of the {total} files of {splits[0]!r}")
