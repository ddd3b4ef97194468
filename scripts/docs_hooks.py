"""Hooks of mkdocs.yml: pages from the top of the repository, and links to files in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)\s]+)\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages from the top of the repository, with links relative to docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        # Other links are relative to the top: one folder up from docs/.
        text = re.sub(r"\]\((?!https?:|#|docs/)", "](../", text).replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Point links to those pages at them, and reduce links to other files to their text."""

    def rewritten(match: re.Match[str]) -> str:
        target, _, anchor = match["target"].partition("#")
        if not target.startswith("../"):
            return match[0]
        page = PAGES.get(target.removeprefix("../"))
        if page is not None:
            return f"[{match['text']}]({page}{'#' + anchor if anchor else ''})"
        if not (ROOT / "docs" / target).resolve().exists():
            raise FileNotFoundError(f"a link to {target}, which does not exist")
        return match["text"]

    return _LINK.sub(rewritten, markdown)
