"""Write the prompts of TL;DR or WebGPT for `activedpo run`.

    python examples/paper/prompts.py tldr data/tldr.jsonl
    python examples/paper/prompts.py webgpt data/webgpt.jsonl

Only prompts are needed: the responses are sampled from the model in each round. Duplicates are
left out. `--source` reads a local copy (a file or folder that `datasets` can load) with the same
columns.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets


class Source(NamedTuple):
    """The location of a data set on the Hub, and how a row becomes a prompt."""

    name: str
    options: dict[str, Any]
    prompt: Callable[[Mapping[str, Any]], str]


SOURCES = {
    # Columns: prompt ("SUBREDDIT: ... TITLE: ... POST: ... TL;DR:"), completion.
    "tldr": Source("trl-lib/tldr", {"split": "train"}, lambda row: str(row["prompt"])),
    # Columns: question {full_text, ...}, answer_0, answer_1, score_0, score_1 and others. The
    # repository has a loading script, which `datasets` no longer runs; this branch has Parquet.
    "webgpt": Source(
        "openai/webgpt_comparisons",
        {"split": "train", "revision": "refs/convert/parquet"},
        lambda row: f"Question: {str(row['question']['full_text']).strip()}\n\nAnswer:",
    ),
}


def load(source: Source, local: Path | None) -> datasets.Dataset:
    """Load the rows, from the Hub or from a local copy."""
    if local is None:
        return datasets.load_dataset(source.name, **source.options)
    if local.is_dir():
        return datasets.load_from_disk(str(local))
    kind = {"jsonl": "json", "json": "json", "parquet": "parquet"}[local.suffix.lstrip(".")]
    return datasets.load_dataset(kind, data_files=str(local), split="train")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", choices=SOURCES)
    parser.add_argument("output", type=Path, help="JSONL file to write")
    parser.add_argument("--source", type=Path, help="a local copy")
    args = parser.parse_args()
    source = SOURCES[args.dataset]
    texts = dict.fromkeys(source.prompt(row) for row in load(source, args.source))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with open(args.output, "w", encoding="utf-8") as file:
        for text in texts:
            id = hashlib.sha256(text.encode()).hexdigest()[:16]
            file.write(json.dumps({"id": id, "prompt": text}, ensure_ascii=False) + "\n")
    print(f"{len(texts)} prompts in {args.output}")


if __name__ == "__main__":
    main()
