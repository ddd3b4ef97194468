"""The page: complete, self-contained, and safe with any text."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from activedpo_fast._files import read_checked_json, write_checked_json
from activedpo_fast.report.figures import Series, curves
from activedpo_fast.report.page import render_page
from activedpo_fast.report.reading import read_runs
from tests.support.runs import SCRIPT

pytest.importorskip("matplotlib")


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(runs: tuple[Path, Path]) -> _Page:
    return _Page(render_page(read_runs(list(runs))))


def test_nothing_is_loaded_and_nothing_runs(page: _Page) -> None:
    assert not {"script", "img", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    policies = [m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policies[0]["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_texts_are_shown_as_they_are(page: _Page) -> None:
    assert f"{SCRIPT} 1" in page.text


def test_charts_are_described_and_colored_by_the_page(page: _Page) -> None:
    charts = page.all("svg")
    assert len(charts) == 2 + 2 * (2 + 3)  # one metric; for each run, the cost and three lengths
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    assert "norm by labels so far. activedpo from" in str(charts[0]["aria-label"])
    colors = [a["style"] for tag, a in page.tags if tag in ("path", "text") and a.get("style")]
    assert any("var(--c1)" in style for style in colors if style)
    assert not any("#a100" in style or "#000" in style for style in colors if style)


def test_two_runs_have_their_own_parts_and_a_comparison(page: _Page) -> None:
    assert [a["id"] for a in page.all("article")] == ["run-1", "run-2"]
    assert "random − activedpo" in page.text and "Runs compared" in page.text
    assert "The longer response was preferred" in page.text
    assert "The first 6 picks (the strategy gives no scores)" in page.text
    assert "dpo.learning_rate" in page.text and "version of torch" in page.text


def test_every_run_has_a_page_however_little_there_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (run,) = read_runs([tmp_path])
    assert "no round was begun" in _Page(render_page([run])).text


def test_names_are_texts_too(copied: Callable[[str], Path]) -> None:
    folder = copied("_<b>$\\frac$")
    record = read_checked_json(folder / "start" / "record.json")
    for path in (folder / "start" / "record.json", folder / "round-000" / "record.json"):
        metrics = {"<i>$^": 1.0, "flat": float("nan")}
        write_checked_json(path, {**record, "metrics": metrics})
    page = _Page(render_page(read_runs([folder])))
    assert not page.all("b") and not page.all("i")
    assert "<i>$^" in page.text


def test_the_same_data_give_the_same_bytes() -> None:
    series = [Series("a", [0, 1], [1.0, 2.0], [None, 0.5]), Series("b", [], [], [])]
    assert curves("t", "x", "y", series) == curves("t", "x", "y", series)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(runs: tuple[Path, Path], tmp_path: Path, scheme: str) -> None:
    """In a real browser: no sideways scrolling at 400 px, no request, no message."""
    import shutil

    playwright = pytest.importorskip("playwright.sync_api")
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on PATH")
    path = tmp_path / "report.html"
    path.write_text(render_page(read_runs(list(runs))))
    messages: list[str] = []
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        opened = chromium.new_page(viewport={"width": 400, "height": 800}, color_scheme=scheme)
        opened.on("console", lambda message: messages.append(message.text))
        opened.on("request", lambda request: messages.append(request.url))
        opened.goto(path.as_uri())
        assert opened.evaluate("document.documentElement.scrollWidth") == 400
        assert opened.evaluate("getComputedStyle(document.body).color") == (
            "rgb(29, 36, 48)" if scheme == "light" else "rgb(230, 233, 239)"
        )
        chromium.close()
    assert messages == [path.as_uri()]
