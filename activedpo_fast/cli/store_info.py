"""What `activedpo store info` shows: each line says what it is."""

from __future__ import annotations

from typing import Any, NamedTuple

from activedpo_fast.gradients.batches import Layout
from activedpo_fast.store.shard_files import SHARDS
from activedpo_fast.store.store import FeatureStore

# The settings that `activedpo features` records, and how it computed the rows.
_MEANINGS = {
    "model": "base model",
    "model_fingerprint": "hash of its files",
    "gguf_file": "GGUF file of the model",
    "adapter": "LoRA adapter whose gradients the rows are",
    "adapter_fingerprint": "hash of its files",
    "tokenizer": "tokenizer of prompts and responses",
    "tokenizer_fingerprint": "hash of its files",
    "dtype": "of the model's weights",
    "precision": "bf16 if matrix products were in bfloat16",
    "sketch": "random projection of the gradients",
    "proj_dim": "numbers in a projected row",
    "seed": "of the projection",
    "beta": "β of DPO, which the rows are multiplied by",
    "length_normalized": "rows are gradients of mean log-probs",
    "max_length": "longest prompt + response, in tokens",
    "truncation_mode": "which end of longer ones is kept",
    "gradient": "tokens that the weights act on in a gradient row",
    "last_layers": "decoder layers, from the last, whose parameters the rows are about",
    "chat_template_kwargs": "arguments of the chat template",
    "version": "of activedpo-fast, when the store was made",
    "store_dtype": "of the rows on disk",
    "rows_per_shard": "rows in a full file",
    "max_tokens_per_batch": "padded tokens in a forward and backward pass",
}
_WIDTH = 16  # of values; longer ones, such as paths, push their meaning to the right


class Row(NamedTuple):
    """A line: a name, its value, and what it is."""

    name: str
    value: Any
    meaning: str


def described(store: FeatureStore) -> str:
    """Return the lines about a store: its rows, its settings, and how the rows were computed."""
    sections = {
        "rows and files": _rows_and_files(store),
        "made with": _settings(store.manifest["settings"]),
        "computed with": _passes(store.manifest.get("filling", {})),
    }
    lines = []
    for section, rows in sections.items():
        if rows:
            lines += [f"{section}:", *map(_line, rows)]
    return "\n".join(lines)


def _rows_and_files(store: FeatureStore) -> list[Row]:
    manifest, partial = store.manifest, store.partial()
    missing = len(store.missing_rows())
    if missing or partial:
        state, then = "no", "`activedpo features` with the same options goes on"
    else:
        state, then = "yes", "`activedpo select` can read it"
    size = sum(path.stat().st_size for path in store.path.iterdir() if path.is_file())
    return [
        Row("complete", state, then),
        Row("responses", manifest["responses"], "in the pool; each gets a gradient row"),
        Row("missing rows", missing, "not computed yet"),
        Row("prompts too long", len(manifest["skipped"]), "they fill max_length; never picked"),
        Row("files of rows", len(list(store.path.glob(SHARDS))), "full ones, rows-*.safetensors"),
        Row("files being filled", len(partial), "with room for more rows, rows-*.partial"),
        Row("bytes", size, "of all files in the folder"),
        Row(
            "files left behind",
            len(store.temporary_files()),
            "by killed processes; `activedpo store gc` removes them",
        ),
        Row("format", manifest["format"], "version of the folder's layout"),
    ]


def _settings(values: dict[str, Any]) -> list[Row]:
    return [
        Row(name, "none" if value is None else value, _MEANINGS.get(name, ""))
        for name, value in values.items()
    ]


def _passes(filling: dict[str, Any]) -> list[Row]:
    """Return how the rows were computed; nothing if none were."""
    names = ("rows_per_shard", "max_tokens_per_batch")
    rows = _settings({name: filling[name] for name in names if name in filling})
    if "layout" in filling:
        known = {layout.name: layout.value for layout in Layout}
        rows.append(Row("layout", filling["layout"], known.get(filling["layout"], "")))
    return rows


def _line(row: Row) -> str:
    return f"  {row.name:<21}  {row.value!s:<{_WIDTH}}  {row.meaning}".rstrip()
