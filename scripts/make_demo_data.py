#!/usr/bin/env python3
"""Build the demo's data: Debian package descriptions and their one-line synopses.

The source is the English description index ("Translation-en") of Debian's `main` section. Every
package there has a long description (our prompt) and a one-line synopsis (our response), both
written by its maintainer. Together they are a small, free summarization data set.

Example:
    python scripts/make_demo_data.py --out activedpo_fast/demo/assets/data
    python scripts/make_demo_data.py --index Translation-en.lz4 --out /tmp/data --seed 7
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

MAX_WORDS = 100  # a description is cut near this length, at the end of a sentence or paragraph
MIN_WORDS = 15  # shorter descriptions leave nothing to summarize
SHINGLE_WORDS = 4
MINHASHES, BANDS = 64, 32  # 32 bands of 2 rows: pairs at Jaccard 0.4 are candidates with p > 0.99
NEAR_DUPLICATE = 0.4  # estimated Jaccard similarity at which two descriptions are "the same"
HOLDOUT, POOL = 500, 4000

# Packages whose text describes packaging, not software, or repeats another package's text.
SKIPPED_NAME = re.compile(
    r"-(dbg|dbgsym|debug)$|^(linux-(image|headers|modules|kbuild|config|support)|task|"
    r"language-pack|hunspell|hyphen|mythes|aspell|wamerican|myspell)-|"
    r"-(l10n|i18n|locales?|lang)(-|$)|^(firefox-esr|thunderbird|chromium|libreoffice)-.*l10n"
)
SKIPPED_TEXT = re.compile(
    r"\b(transitional|dummy|empty|virtual|meta-?)\s*package|\btransitional\b|"
    r"\bdebug(ging)? symbols\b|safely (be )?removed|\bmetapackage\b|language pack",
    re.IGNORECASE,
)
BOILERPLATE = re.compile(
    r"^(this|the|these)( \S+){0,3} (package|packages|metapackage)s?\b.{0,60}?"
    r"\b(contains?|provides?|includes?|installs?|ships?|holds?|has|is|are|depends?)\b"
    r"|^this is (the|a|an) [^.]{0,60}(package|version|library|documentation|files)\b"
    r"|^(homepage|author|upstream|see also|for more information|note)\b",
    re.IGNORECASE,
)
PACKAGING_WORDS = re.compile(
    r"\b(development|documentation|headers?|shared librar|static librar|runtime librar|data files|"
    r"examples|test suite|binaries|plugins?|bindings?|depends|package for|files (needed|required)|"
    r"manual|source (code|for)|sources|locali[sz]ation|translations?)",
    re.IGNORECASE,
)
AUXILIARY_NAME = re.compile(
    r"-(dev|doc|docs|data|common|bin|examples?|headers|tools|utils|java-doc|source|cil|perl)$"
)
PLAIN_CHARACTERS = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"}
)
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[A-Z0-9\"'(])")


@dataclass
class Entry:
    """One package: the prompt (`description`) and the response (`synopsis`)."""

    id: str
    description: str
    synopsis: str


def fetch_index(folder: Path) -> Path:
    """Have apt download (and verify) the English description index into `folder`."""
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True)
    folder.chmod(0o755)
    command = ["apt-get", "-o", "Acquire::Languages=en", "-o", f"Dir::State::Lists={lists}"]
    subprocess.run([*command, "update"], check=True)
    found = sorted(
        lists.glob("*_dists_*_main_i18n_Translation-en*"), key=lambda p: p.stat().st_size
    )
    if not found:
        raise SystemExit("apt fetched no Translation-en index; is this a Debian system?")
    return found[-1]  # the release itself; the security and updates lists are far smaller


def read_index(path: Path) -> str:
    """Read the index as text; apt's own helper knows every compression that apt uses."""
    if path.suffix in {"", ".txt"} or path.name.endswith("Translation-en"):
        return path.read_text(encoding="utf-8")
    command = ["/usr/lib/apt/apt-helper", "cat-file", str(path)]
    return subprocess.run(command, check=True, capture_output=True).stdout.decode("utf-8")


def parse_stanzas(index: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (package, synopsis, lines of the long description) for every stanza."""
    for stanza in index.split("\n\n"):
        package, synopsis, lines = "", "", []
        in_description = False
        for line in stanza.splitlines():
            if line.startswith(" "):
                if in_description:
                    lines.append(line[1:])
                continue
            field, _, value = line.partition(": ")
            in_description = field == "Description-en"
            if field == "Package":
                package = value.strip()
            elif in_description:
                synopsis = value
        if package:
            yield package, synopsis, lines


def plain(text: str) -> str:
    """Replace typographic quotes and dashes by ASCII, and runs of whitespace by one space."""
    return " ".join(text.translate(PLAIN_CHARACTERS).split())


def paragraphs(lines: Iterable[str]) -> list[str]:
    """Return the running-text paragraphs, without lists and verbatim (indented) lines."""
    result: list[str] = []
    current: list[str] = []
    for line in [*lines, "."]:
        if line.strip() == ".":
            result.append(plain(" ".join(current)))
            current = []
        elif line.startswith(" ") or re.match(r"[-*+•o] ", line):
            continue
        else:
            current.append(line)
    return [text for text in result if text]


def cut(texts: list[str], limit: int = MAX_WORDS) -> str:
    """Keep whole paragraphs, then whole sentences, up to about `limit` words."""
    kept, used = [], 0
    for text in texts:
        sentences = []
        for sentence in SENTENCE_END.split(text):
            words = len(sentence.split())
            if used and used + words > limit:
                break
            sentences.append(sentence)
            used += words
        else:
            kept.append(text)
            continue
        if sentences:
            kept.append(" ".join(sentences))
        break
    return "\n\n".join(kept)


def is_boilerplate(text: str, first: bool) -> bool:
    """Return whether a paragraph says what the package holds, not what the software does.

    Further down, "This package contains ..." only distinguishes sister packages. As the opening it
    may be the only real description, so there it must also mention headers, documentation etc.
    """
    return bool(BOILERPLATE.match(text)) and (not first or bool(PACKAGING_WORDS.search(text)))


def clean_description(lines: list[str]) -> str:
    """Return the part of a long description that says what the software is, or ""."""
    texts = [t for t in paragraphs(lines) if len(t.split()) >= 4 and "://" not in t]
    texts = [t for i, t in enumerate(texts) if not is_boilerplate(t, first=i == 0)]
    # Drop a final sentence that only introduces a list, since lists are dropped.
    texts = [t if not t.endswith(":") else " ".join(SENTENCE_END.split(t)[:-1]) for t in texts]
    return cut([t for t in texts if t])


def clean_synopsis(text: str) -> str:
    """Return the synopsis with plain whitespace and no final period."""
    return plain(text).rstrip(".")


def mostly_english(text: str) -> bool:
    """Return whether a text is almost all ASCII and has enough short English function words."""
    ascii_share = sum(c.isascii() for c in text) / len(text)
    words = re.findall(r"[a-z]+", text.lower())
    common = {"the", "a", "an", "of", "and", "to", "for", "is", "in", "with", "that", "it", "or"}
    return ascii_share > 0.98 and sum(w in common for w in words) > 0.1 * len(words)


def rejection(package: str, synopsis: str, lines: list[str], description: str) -> str:
    """Return the name of the first filter that a package fails, or "" if it is kept."""
    if SKIPPED_NAME.search(package):
        return "name (debug, kernel, task, language data)"
    if SKIPPED_TEXT.search(synopsis) or SKIPPED_TEXT.search(" ".join(lines)[:400]):
        return "dummy, transitional or debug text"
    if not description:
        return "no running text, or boilerplate only"
    if len(description.split()) < MIN_WORDS:
        return f"description below {MIN_WORDS} words"
    if len(description.split()) > 1.5 * MAX_WORDS:
        return "no sentence end near the limit"
    if not 3 <= len(synopsis.split()) <= 16:
        return "synopsis not of 3 to 16 words"
    if not mostly_english(description) or not synopsis.isascii():
        return "not plain English"
    return ""


def load_entries(index: str, counts: dict[str, int]) -> list[Entry]:
    """Parse and filter; `counts` receives the number of packages before, dropped and after."""
    stanzas = list(parse_stanzas(index))
    counts["raw packages"] = len(stanzas)
    entries: dict[str, Entry] = {}
    dropped: Counter[str] = Counter()
    for package, raw_synopsis, lines in tqdm(stanzas, desc="cleaning", unit="package"):
        synopsis, description = clean_synopsis(raw_synopsis), clean_description(lines)
        reason = rejection(package, synopsis, lines, description)
        if not reason and package in entries:
            reason = "same package name"
        if reason:
            dropped[reason] += 1
        else:
            entries[package] = Entry(package, description, synopsis)
    for reason, number in sorted(dropped.items()):
        counts[f"dropped: {reason}"] = number
    counts["after the filters"] = len(entries)
    return [entries[name] for name in sorted(entries)]


def normalize(text: str) -> str:
    """Keep lowercase words only, so that punctuation and digits cannot hide a duplicate."""
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def synopsis_key(synopsis: str) -> str:
    """Return the synopsis without the part that distinguishes sister packages ("foo - docs")."""
    head = re.split(r"\s+[-–:]+\s+|\s*\(", synopsis)[0]
    return normalize(head if len(head.split()) >= 3 else synopsis)


def minhash(text: str, seeds: np.ndarray) -> np.ndarray:
    """Return a MinHash signature of the word shingles of `text`."""
    words = normalize(text).split()
    grams = {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}
    digests = [hashlib.blake2b(g.encode(), digest_size=8).digest() for g in grams or {text}]
    hashes = np.frombuffer(b"".join(digests), dtype=np.uint64)
    mixed = (hashes[None, :] ^ seeds[:, None]) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed ^ (mixed >> np.uint64(29))).min(axis=1)


class Clusters:
    """Union-find over entry numbers."""

    def __init__(self, size: int) -> None:
        self.parent = list(range(size))

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        a, b = sorted((self.find(i), self.find(j)))
        self.parent[b] = a


def cluster(entries: list[Entry]) -> list[list[int]]:
    """Group entries that share a synopsis, a first sentence, or much of their wording."""
    clusters = Clusters(len(entries))
    seeds = np.random.default_rng(0).integers(1, 2**63, MINHASHES, dtype=np.uint64)
    rows = MINHASHES // BANDS
    signatures = np.stack(
        [minhash(e.description, seeds) for e in tqdm(entries, desc="hashing", unit="package")]
    )
    first_with: dict[tuple[str, str], int] = {}
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for i, entry in enumerate(tqdm(entries, desc="clustering", unit="package")):
        first_sentence = normalize(SENTENCE_END.split(entry.description)[0])
        for key in (("synopsis", synopsis_key(entry.synopsis)), ("sentence", first_sentence)):
            clusters.join(first_with.setdefault(key, i), i)
        for band in range(BANDS):
            bucket = buckets[band, signatures[i, band * rows : (band + 1) * rows].tobytes()]
            for j in bucket:
                if clusters.find(i) == clusters.find(j):
                    continue
                if (signatures[i] == signatures[j]).mean() >= NEAR_DUPLICATE:
                    clusters.join(i, j)
            bucket.append(i)
    groups: dict[int, list[int]] = defaultdict(list)
    for i in range(len(entries)):
        groups[clusters.find(i)].append(i)
    return list(groups.values())


def representative(group: list[Entry]) -> Entry:
    """Pick the package most likely to describe the whole: no -dev or -doc, shortest name."""
    return min(group, key=lambda e: (bool(AUXILIARY_NAME.search(e.id)), len(e.id), e.id))


def split(entries: list[Entry], seed: int) -> dict[str, list[Entry]]:
    """Split with a seed; every entry represents a whole cluster, so no split can leak."""
    shuffled = sorted(entries, key=lambda e: e.id)
    random.Random(seed).shuffle(shuffled)
    return {
        "heldout": shuffled[:HOLDOUT],
        "pool": shuffled[HOLDOUT : HOLDOUT + POOL],
        "train": shuffled[HOLDOUT + POOL :],
    }


def write_split(path: Path, entries: list[Entry]) -> None:
    """Write one Parquet file with the columns id, description, synopsis."""
    columns = {name: [getattr(e, name) for e in entries] for name in Entry.__annotations__}
    pq.write_table(pa.table(columns), path, compression="zstd", compression_level=19)


def release_of(index_path: Path) -> tuple[str, str]:
    """Return the release's codename and date, from apt's file names and its Release file."""
    match = re.match(r"(.*_dists_([a-z-]+))_", index_path.name)
    if not match:
        return "unknown", "unknown"
    stem, codename = match.groups()
    for release in index_path.parent.glob(f"{stem}_*Release"):
        for line in release.read_text(encoding="utf-8").splitlines():
            if line.startswith("Date: "):
                return codename, parsedate_to_datetime(line[6:]).date().isoformat()
    return codename, "unknown"


def build(index_path: Path, out: Path, seed: int) -> dict[str, object]:
    """Build the three Parquet files and counts.json from the index file."""
    stages: dict[str, int] = {}
    entries = load_entries(read_index(index_path), stages)
    groups = cluster(entries)
    kept = [representative([entries[i] for i in group]) for group in groups]
    stages["one per cluster of near-duplicates"] = len(kept)
    splits = split(kept, seed)
    out.mkdir(parents=True, exist_ok=True)
    for name, members in splits.items():
        write_split(out / f"{name}.parquet", members)
    codename, date = release_of(index_path)
    counts: dict[str, object] = {
        "debian_release": codename,
        "index_date": date,
        "seed": seed,
        "stages": stages,
        "largest_cluster": max(len(group) for group in groups),
        "splits": {name: len(members) for name, members in sorted(splits.items())},
    }
    (out / "counts.json").write_text(json.dumps(counts, indent=2) + "\n")
    return counts


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--index",
        type=Path,
        help="a Translation-en index, plain or compressed; by default apt fetches that of this "
        "machine's Debian release",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("activedpo_fast/demo/assets/data"),
        help="folder to write to (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="split seed (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        index_path = args.index or fetch_index(Path(folder))
        counts = build(index_path, args.out, args.seed)
    print(json.dumps(counts, indent=2))


if __name__ == "__main__":
    main()
