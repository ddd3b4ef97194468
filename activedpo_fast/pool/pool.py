"""The pool of prompts and responses that preference pairs are chosen from."""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from activedpo_fast._files import FilePath, first_line, write_atomic
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.columns import check_json_columns
from activedpo_fast.pool.files import (
    EMPTY_DATASET,
    dataset_rows,
    is_from_datasets,
    jsonl_rows,
    parquet_rows,
    placed_rows,
    saved_dataset,
)
from activedpo_fast.pool.items import PoolItem, check_item, check_same_kind
from activedpo_fast.pool.messages import images_of
from activedpo_fast.pool.reading import item_from_row
from activedpo_fast.pool.template import NOT_WITH_TOOLS, TOOLS, own_template_kwargs
from activedpo_fast.pool.texts import canonical_json, content_id

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


class PreferencePool(Sequence[PoolItem]):
    """Prompts with two or more responses each, checked on creation and never empty.

    Rows have a `prompt` and either `responses` (a list of two or more), or `chosen` and `rejected`,
    or `response_a` and `response_b`; their order does not express a preference. Texts are strings,
    or lists of chat messages in TRL's conversational format, the same kind throughout the pool;
    calls of tools, the column `tools` and images are those of TRL (see docs/trl.md).
    `id` (a string or an integer) is optional: without it the id is a hash of the prompt and
    responses, so the same row has the same id at any position. A null cell counts as absent.
    Other columns are kept; those that have a meaning in TRL's trainers are used or refused by name,
    see `activedpo_fast.pool.columns.DATA_COLUMNS`.

    Whatever takes a pool takes a `datasets.Dataset` with such rows too.

    Raises:
        ActiveDPOError: on anything else. The message names the row, counted from 1 (the line, in a
            JSONL file). Either everything is read or nothing.

    Examples:
        >>> from activedpo_fast import PreferencePool
        >>> pool = PreferencePool.from_rows([
        ...     {"prompt": "Name a color.", "responses": [" Red.", " Pale blue.", " Dog."]},
        ...     {"prompt": "Say hello.", "chosen": " Hello!", "rejected": " Go away."},
        ... ])
        >>> pool
        PreferencePool(2 prompts, 5 responses)
        >>> pool.pairs().tolist()
        [[0, 1], [0, 2], [1, 2], [3, 4]]
    """

    def __init__(self, items: Iterable[PoolItem]) -> None:
        listed = list(items)
        self._set_checked(listed, [f"item {n}" for n in range(1, len(listed) + 1)])

    # -- reading ---------------------------------------------------------------------------------

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> PreferencePool:
        """Build from mappings with the columns described in the class."""
        return cls._from_placed_rows((f"row {n}", row) for n, row in enumerate(rows, start=1))

    @classmethod
    def from_jsonl(cls, path: FilePath) -> PreferencePool:
        """Read one JSON object per line, UTF-8; blank lines are skipped."""
        return cls._from_placed_rows(jsonl_rows(Path(path)), empty=f"{path}: no rows")

    @classmethod
    def from_parquet(cls, path: FilePath) -> PreferencePool:
        """Read one Parquet file."""
        return cls._from_placed_rows(parquet_rows(Path(path)), empty=f"{path}: no rows")

    @classmethod
    def from_dataset(cls, dataset: datasets.Dataset) -> PreferencePool:
        """Read a `datasets.Dataset` (one split, not streamed)."""
        return cls._from_placed_rows(dataset_rows(dataset), empty=EMPTY_DATASET)

    @classmethod
    def load(cls, path: FilePath) -> PreferencePool:
        """Read a `.jsonl` or `.parquet` file, a folder of files of one of these kinds, in order of
        their names, or a folder written by `datasets.save_to_disk`."""
        saved = saved_dataset(Path(path))
        if saved is not None:
            try:
                return cls.from_dataset(saved)
            except ActiveDPOError as error:
                raise ActiveDPOError(f"{path}: {error}") from None
        return cls._from_placed_rows(placed_rows(path), empty=f"{path}: no rows")

    @classmethod
    def _from_placed_rows(
        cls, placed: Iterable[tuple[str, Any]], empty: str = "the pool has no rows"
    ) -> PreferencePool:
        items, places = [], []
        for place, row in placed:
            items.append(item_from_row(row, place))
            places.append(place)
        if not items:
            raise ActiveDPOError(empty)
        pool = cls.__new__(cls)
        pool._set_checked(items, places)
        return pool

    def _set_checked(self, items: list[PoolItem], places: list[str]) -> None:
        if not items:
            raise ActiveDPOError("the pool has no items")
        first_with: dict[str, int] = {}
        for n, (item, place) in enumerate(zip(items, places, strict=True)):
            check_item(item, place)
            check_same_kind(item.prompt, place, items[0].prompt, places[0])
            earlier = first_with.setdefault(item.id, n)
            if earlier != n:
                other = items[earlier]
                repeated = item.id == content_id(item.prompt, item.responses) and (
                    item.prompt,
                    item.responses,
                ) == (other.prompt, other.responses)
                raise ActiveDPOError(
                    f"{place}: the same row as {places[earlier]}: remove one of them"
                    if repeated
                    else f"{place}: id {item.id!r} is already that of {places[earlier]}: rows need "
                    "ids of their own; a column that names the prompt goes by another name (see "
                    "prompt_by)"
                )
        self._set(items)
        _refuse_tools_beside_images(items, places)
        _warn_of_repeated_prompts(items)

    def _set(self, items: list[PoolItem]) -> None:
        self._items = tuple(items)
        self._position = {item.id: n for n, item in enumerate(self._items)}
        self._offsets = [0]
        for item in self._items:
            self._offsets.append(self._offsets[-1] + len(item.responses))

    # -- writing ---------------------------------------------------------------------------------

    def to_jsonl(self, path: FilePath) -> None:
        """Write one object per line (`id`, `prompt`, `responses`, then the extra columns).

        `from_jsonl` reads back an equal pool. The file is written atomically.
        """
        write_atomic(path, self.jsonl())

    def jsonl(self) -> bytes:
        """Return what `to_jsonl` writes."""
        lines = []
        for item in self._items:
            row = {"id": item.id, "prompt": item.prompt, "responses": item.responses, **item.extra}
            try:
                lines.append(json.dumps(row, ensure_ascii=False).encode())
            except (TypeError, ValueError, RecursionError) as error:
                check_json_columns(item.extra, f"item {item.id!r}")
                raise ActiveDPOError(
                    f"item {item.id!r}: no JSON value: {first_line(error)}"
                ) from error
        return b"\n".join(lines) + b"\n"

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of ids, prompts and responses in pool order.

        Of the other columns, only `chat_template_kwargs` is part of it, if it affects tokens.
        """
        digest = hashlib.sha256()
        for item in self._items:
            own = own_template_kwargs(item.extra) if self.is_chat else None
            parts = [item.id, item.prompt, item.responses, *([] if own is None else [own])]
            digest.update(canonical_json(parts) + b"\n")
        return digest.hexdigest()

    # -- items, rows and pairs -------------------------------------------------------------------

    @overload
    def __getitem__(self, index: int) -> PoolItem: ...
    @overload
    def __getitem__(self, index: slice) -> PreferencePool: ...
    def __getitem__(self, index: int | slice) -> PoolItem | PreferencePool:
        if isinstance(index, slice):
            return self.subset(range(*index.indices(len(self))))
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[PoolItem]:
        return iter(self._items)

    def __repr__(self) -> str:
        return f"PreferencePool({len(self)} prompts, {self.n_responses} responses)"

    @property
    def ids(self) -> list[str]:
        return [item.id for item in self._items]

    @property
    def is_chat(self) -> bool:
        """Whether the texts are chat messages (either all or none are)."""
        return not isinstance(self._items[0].prompt, str)

    @property
    def has_images(self) -> bool:
        """Whether a prompt has images."""
        return self.is_chat and any(images_of(item.prompt) for item in self._items)

    @property
    def n_responses(self) -> int:
        """R, the total number of responses."""
        return self._offsets[-1]

    @property
    def response_offsets(self) -> torch.Tensor:
        """int64 [P+1]: item p has the response rows `offsets[p]:offsets[p+1]`."""
        return torch.tensor(self._offsets, dtype=torch.int64)

    def pairs(self) -> torch.Tensor:
        """Return all pairs of responses to the same prompt.

        Returns:
            int64 [N, 2] of response rows (a, b), a < b, ordered by item, then by a, then by b;
            N = Σ M_p (M_p − 1) / 2.
        """
        offsets = self.response_offsets
        counts = offsets.diff()
        pair_counts = counts * (counts - 1) // 2
        starts = pair_counts.cumsum(0) - pair_counts
        pairs = torch.empty(int(pair_counts.sum()), 2, dtype=torch.int64)
        for m in counts.unique().tolist():
            within = torch.triu_indices(m, m, offset=1).T  # [m(m−1)/2, 2], row-major
            items = (counts == m).nonzero().squeeze(1)
            places = starts[items, None] + torch.arange(len(within))
            pairs[places] = offsets[items, None, None] + within
        return pairs

    def position(self, id: str) -> int:
        """Return the position of the item with this id."""
        if id not in self._position:
            raise ActiveDPOError(f"no item with id {id!r} in the pool")
        return self._position[id]

    def locate(self, row: int) -> tuple[int, int]:
        """Return (item position, response index within the item) of a response row."""
        row = operator.index(row)
        if not 0 <= row < self.n_responses:
            raise ActiveDPOError(f"response row {row} is outside 0..{self.n_responses - 1}")
        position = bisect.bisect_right(self._offsets, row) - 1
        return position, row - self._offsets[position]

    def subset(self, positions: Sequence[int]) -> PreferencePool:
        """Return the items at these distinct positions, in the given order."""
        chosen = [operator.index(position) for position in positions]
        outside = [position for position in chosen if not 0 <= position < len(self)]
        if outside:
            raise ActiveDPOError(f"position {outside[0]} is outside 0..{len(self) - 1}")
        if len(set(chosen)) != len(chosen):
            raise ActiveDPOError("positions: one of them is given twice")
        if not chosen:
            raise ActiveDPOError("positions: a pool cannot be empty")
        pool = type(self).__new__(type(self))
        pool._set([self._items[position] for position in chosen])
        return pool


def as_pool(pool: PreferencePool | datasets.Dataset) -> PreferencePool:
    """Return `pool` itself, or the pool that a `datasets.Dataset` holds.

    Everything public that takes a pool calls this, so that both are accepted alike. The package
    `datasets` is imported only if the object comes from it.

    Raises:
        ActiveDPOError: it is neither; errors of `PreferencePool.from_dataset`.
    """
    if isinstance(pool, PreferencePool):
        return pool
    if is_from_datasets(pool):
        return PreferencePool.from_dataset(pool)
    raise ActiveDPOError(
        f"pool: expected a PreferencePool or a datasets.Dataset, got {type(pool).__name__}; make "
        "one with PreferencePool.from_rows or load"
    )


def _refuse_tools_beside_images(items: Sequence[PoolItem], places: Sequence[str]) -> None:
    """Refuse tools in a pool with images, whose trainer would not see them."""
    if isinstance(items[0].prompt, str) or not any(images_of(item.prompt) for item in items):
        return
    for item, place in zip(items, places, strict=True):
        if (own_template_kwargs(item.extra) or {}).get(TOOLS):
            raise ActiveDPOError(f"{place}: {NOT_WITH_TOOLS}")


def _warn_of_repeated_prompts(items: Sequence[PoolItem]) -> None:
    """Log a warning if most items repeat their prompt in all of their responses."""
    count = sum(_begin_with_prompt(item) for item in items)
    if 2 * count > len(items):
        logger.warning(
            "the responses of %d of %d prompts begin with the prompt, which is then read twice, "
            "here and by DPOTrainer: are they whole transcripts? Take the prompt out of them",
            count,
            len(items),
        )


def _begin_with_prompt(item: PoolItem) -> bool:
    prompt = item.prompt
    return all(
        response.startswith(prompt)
        if isinstance(response, str) and isinstance(prompt, str)
        else response[: len(prompt)] == prompt
        for response in item.responses
    )
