"""Converting rows of files and data sets to items and prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from activedpo_fast._files import FilePath
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.columns import (
    RESPONSE_COLUMNS,
    check_columns,
    check_json_columns,
    is_absent,
)
from activedpo_fast.pool.files import (
    EMPTY_DATASET,
    IMAGE_COLUMNS,
    PlacedRows,
    dataset_rows,
    is_from_datasets,
    placed_rows,
)
from activedpo_fast.pool.images import prompt_with_images
from activedpo_fast.pool.items import OWN_COLUMNS, PAIR_COLUMNS, PoolItem, Prompt, check_prompts
from activedpo_fast.pool.messages import without_nulls
from activedpo_fast.pool.texts import check_text, check_texts, content_id, show

if TYPE_CHECKING:
    import datasets


def item_from_row(row: Any, place: str) -> PoolItem:
    """Make an item from a row's columns; `check_item` checks the contents."""
    if not isinstance(row, Mapping):
        raise ActiveDPOError(f"{place}: expected an object with named columns, got {show(row)}")
    given = {name: row[name] for name in OWN_COLUMNS if name in row and not is_absent(row[name])}
    responses = _responses_of(given, place)
    if "prompt" not in given:
        if all(isinstance(response, list) for response in responses):
            raise ActiveDPOError(
                f"{place}: no 'prompt': conversations that hold their prompt are "
                "not split; extract it first (for instance with "
                "trl.extract_prompt)"
            )
        raise ActiveDPOError(f"{place}: missing column 'prompt'{_transcript_hint(responses)}")
    prompt = prompt_with_images(plain_text(given["prompt"]), row, place)
    texts = tuple(plain_text(response) for response in responses)
    if "id" not in given:
        # Not checked yet, so possibly not hashable.
        check_texts(prompt, texts, place)
        given["id"] = content_id(prompt, texts)
    id = id_of(given)
    own = {*OWN_COLUMNS, *IMAGE_COLUMNS}
    extra = {str(name): value for name, value in row.items() if name not in own}
    return PoolItem(id=id, prompt=prompt, responses=texts, extra=extra)


def read_prompts(path: FilePath) -> list[Prompt]:
    """Read prompts from rows with `prompt` and optionally `id`; the rest is `extra`.

    The sources are those of pools, see `placed_rows`.

    Raises:
        ActiveDPOError: a bad row; the message names it.
    """
    return _prompts_of(placed_rows(path), empty=f"{path}: no rows")


def as_prompts(prompts: Sequence[Any] | datasets.Dataset) -> Sequence[Any]:
    """Return `prompts` itself, or those that a `datasets.Dataset` holds, as `read_prompts` reads.

    `check_prompts` checks the contents of a sequence.

    Raises:
        ActiveDPOError: neither a sequence nor a data set; a bad row, which is named.
    """
    if is_from_datasets(prompts):
        return _prompts_of(dataset_rows(prompts), empty=EMPTY_DATASET)
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ActiveDPOError(
            "prompts: expected Prompts, a PreferencePool or a datasets.Dataset, "
            f"got {type(prompts).__name__}"
        )
    return prompts


def _prompts_of(placed: PlacedRows, empty: str) -> list[Prompt]:
    prompts = []
    places = []
    for place, row in placed:
        check_prompt_row(row, place)
        prompt, given = plain_text(row["prompt"]), id_of(row)
        check_text(prompt, "the prompt", place)
        extra = {
            name: value
            for name, value in row.items()
            if name not in ("id", "prompt") and not (name in RESPONSE_COLUMNS and is_absent(value))
        }
        check_columns(extra, place, chat=not isinstance(prompt, str), prompts=True)
        check_json_columns(extra, place)
        prompts.append(Prompt(content_id(prompt, ()) if given is None else given, prompt, extra))
        places.append(place)
    if not prompts:
        raise ActiveDPOError(empty)
    check_prompts(prompts, places)
    return prompts


def _responses_of(given: Mapping[str, Any], place: str) -> Sequence[Any]:
    columns = [name for name in ("responses", *PAIR_COLUMNS[0], *PAIR_COLUMNS[1]) if name in given]
    if columns == ["responses"]:
        if not isinstance(given["responses"], (list, tuple)):
            raise ActiveDPOError(
                f"{place}: 'responses' must be a list of two or more, got "
                f"{show(given['responses'])}"
            )
        return given["responses"]
    for pair in PAIR_COLUMNS:
        if columns == list(pair):
            return [given[name] for name in pair]
    if len(columns) == 1:
        partner = {a: b for pair in PAIR_COLUMNS for a, b in (pair, pair[::-1])}[columns[0]]
        raise ActiveDPOError(f"{place}: {columns[0]!r} without {partner!r}")
    if not columns:
        raise ActiveDPOError(
            f"{place}: no responses: expected the column 'responses', or 'chosen' "
            "and 'rejected', or 'response_a' and 'response_b'"
        )
    raise ActiveDPOError(
        f"{place}: the columns {', '.join(map(repr, columns))} together do not "
        "say which are the responses"
    )


def id_of(row: Mapping[str, Any]) -> Any:
    """Return a row's `id` (integers as text), or None; invalid ids are left to `check_id`."""
    id = row.get("id")
    if is_absent(id):
        return None
    return str(int(id)) if isinstance(id, Integral) and not isinstance(id, bool) else id


def check_prompt_row(row: Any, place: str) -> None:
    """Raise ActiveDPOError unless it is an object with a `prompt`."""
    if not isinstance(row, Mapping):
        raise ActiveDPOError(f"{place}: expected an object with named columns, got {show(row)}")
    if is_absent(row.get("prompt")):
        transcripts = [row[name] for name in ("chosen", "rejected") if not is_absent(row.get(name))]
        raise ActiveDPOError(f"{place}: no 'prompt'{_transcript_hint(transcripts)}")


def _transcript_hint(texts: Sequence[Any]) -> str:
    """Return advice on whole transcripts, as in Anthropic's HH data; empty for other texts."""
    turns = ("\n\nHuman:", "\n\nAssistant:")
    if not texts or not all(
        isinstance(text, str) and all(turn in text for turn in turns) for text in texts
    ):
        return ""
    return (
        ": the texts are whole transcripts; split each after its last 'Assistant:' into prompt "
        "and response (trl.extract_prompt takes what two of them have in common as the prompt, "
        "which may be the first words of the responses too)"
    )


def plain_text(value: Any) -> Any:
    """Return a copy of chat messages, without keys that a table filled up with null."""
    if not isinstance(value, list):
        return value
    return [
        without_nulls(message) if isinstance(message, Mapping) else message for message in value
    ]
