"""The page in a real browser: keys, undo, a reload, hostile texts, narrow and dark screens."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("markdown_it")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")

from activedpo_fast.labels.files import labels_file  # noqa: E402
from activedpo_fast.labels.page.server import serve  # noqa: E402
from activedpo_fast.labels.page.session import Session  # noqa: E402
from activedpo_fast.selection.picks_jsonl import Pick  # noqa: E402
from tests.support.labeling import open_labeling, plain_picks, write_picks  # noqa: E402

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")

HOSTILE = "It mirrors the sea. <script>window.hacked = 1</script><img src=x onerror='hacked=1'>"


def _picks() -> list[Pick]:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How do I boil an egg?"},
    ]
    answers = (
        [
            {
                "role": "assistant",
                "content": "Put it into **boiling** water.\n\n```\ntimer(480)\n```",
            }
        ],
        [{"role": "assistant", "content": "Put it into cold water, then heat it."}],
    )
    hostile = Pick("sky", (0, 1), 2.0, 0, "Why is the sky blue?", ("Air **scatters**.", HOSTILE))
    return [hostile, Pick("egg", (0, 1), 1.5, 1, chat, answers), *plain_picks(4)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class _Server:
    """`activedpo label` in a thread, and the page that it serves."""

    def __init__(self, path: Path, browser: Any, **context: Any) -> None:
        self.path = path
        address: Queue[str] = Queue()
        self.thread = threading.Thread(
            target=serve, args=(Session(open_labeling(path), "ann"),), kwargs={"ready": address.put}
        )
        self.thread.start()
        self.address = address.get(timeout=120)
        self.context = browser.new_context(**context)
        self.problems: list[str] = []
        self.page = self.open()

    def open(self) -> Any:
        page = self.context.new_page()
        page.on("console", lambda message: self.problems.append(message.text))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.set_default_timeout(60_000)
        page.goto(self.address)
        page.locator("#count:not(:empty)").wait_for()
        return page

    def press(self, *keys: str) -> None:
        """Press keys, each after the page has reacted to the one before."""
        for key in keys:
            self.page.keyboard.press(key)
            self.page.locator("body:not([aria-busy])").wait_for()

    def answers(self) -> list[tuple[int, Any]]:
        """What stands on disk: pair and side or answer."""
        standing: dict[int, Any] = {}
        journal = labels_file(self.path).with_name("labels-picked.journal.jsonl")
        for entry in map(json.loads, journal.open()):
            if entry["kind"] == "answer":
                sides = {entry["left"]: "left", 1 - entry["left"]: "right"}
                standing[entry["pair"]] = sides.get(entry["label"], entry["label"])
            elif entry["kind"] == "undo":
                del standing[entry["pair"]]
        return sorted(standing.items())

    def stop(self) -> None:
        if self.thread.is_alive():
            script = """token => fetch("/api/finish", {method: "POST", body: "{}",
              headers: {Authorization: `Bearer ${token}`, "Content-Type": "application/json"}})"""
            self.page.evaluate(script, self.address.partition("#")[2])
        self.thread.join(timeout=120)
        self.context.close()
        assert not self.thread.is_alive()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_picks(tmp_path / "picked.jsonl", _picks())


@pytest.fixture
def server(path: Path, browser: Any) -> Iterator[_Server]:
    server = _Server(path, browser)
    yield server
    server.stop()
    assert server.problems == []


def test_all_by_keys_then_finish(server: _Server) -> None:
    page, begin = server.page, time.monotonic()
    assert page.locator("#count").text_content() == "0 of 6 done"
    server.press("1", "2", "t", "s", "0")
    assert server.answers() == [(0, "left"), (1, "right"), (2, "tie"), (3, "skip"), (4, "tie")]
    assert page.locator("#count").text_content() == "5 of 6 done"
    assert "per minute" in page.locator("#pace").text_content()
    assert page.get_by_role("status").text_content() == "Pair 6 of 6."
    server.press("u", "Control+z")
    assert server.answers() == [(0, "left"), (1, "right"), (2, "tie")]
    server.press("1", "1", "w", "c")
    page.keyboard.type("12 1s u")  # letters of a comment are no answers
    server.press("Escape", "2")
    assert page.get_by_role("heading", name="All pairs are labeled").is_visible()
    assert "6 of 6 pairs have a label" in page.locator("#report").text_content()
    page.get_by_role("button", name="Finish").click()
    server.thread.join(timeout=120)
    records = [json.loads(line) for line in labels_file(server.path).open()]
    assert [record["label"] in (0, 1) for record in records] == [
        True,
        True,
        False,
        True,
        True,
        True,
    ]
    last = records[5]["answers"][0]
    assert (last["strength"], last["comment"]) == (2, "12 1s u")
    assert 0 < last["seconds"] < time.monotonic() - begin


@pytest.mark.slow
def test_a_reload_in_the_middle_and_a_second_tab_lose_nothing(server: _Server) -> None:
    server.press("1", "c")
    server.page.keyboard.type("half a comment")
    server.page.reload()
    server.page.locator("#count:not(:empty)").wait_for()
    assert server.page.locator("#prompt").text_content().strip().startswith("system")
    assert server.answers() == [(0, "left")]
    other = server.open()
    server.press("2")
    other.keyboard.press("1")  # it still shows the pair that is answered by now
    other.locator("#error", has_text="already answered").wait_for()
    assert server.answers() == [(0, "left"), (1, "right")]
    assert other.locator("#count").text_content() == "2 of 6 done"
    # The browser reports the status 409; nothing else is wrong.
    assert all("409" in problem for problem in server.problems)
    server.problems.clear()


def test_tags_in_a_response_are_text(server: _Server) -> None:
    page = server.page
    for _ in range(2):  # rendered, then plain
        text = page.locator("#left").text_content() + page.locator("#right").text_content()
        assert "<script>window.hacked = 1</script>" in text and "<img src=x" in text
        assert page.locator("main script, main img").count() == 0
        server.press("m")
    assert page.evaluate("window.hacked") is None
    assert page.locator("#pair strong").count() == 1
    server.press("d")
    assert page.locator("mark", has_text="<script>window.hacked").count() == 1
    assert page.get_by_role("button", name="Differences").get_attribute("aria-pressed") == "true"
    server.press("d")
    assert page.locator("mark").count() == 0


@pytest.mark.slow
def test_a_policy_stands_behind_that(server: _Server) -> None:
    """Even an element that did get into the page would not run or load anything."""
    server.page.evaluate(
        """document.body.insertAdjacentHTML("beforeend",
           "<img src='http://127.0.0.1:1/x' onerror='window.hacked = 1'>")"""
    )
    for _ in range(300):
        server.page.wait_for_timeout(200)
        if server.problems:
            break
    assert server.page.evaluate("window.hacked") is None
    assert server.problems and all("Content Security Policy" in one for one in server.problems)
    server.problems.clear()


@pytest.mark.slow
def test_posts_of_another_site_are_refused(server: _Server) -> None:
    """A page of another origin, in the same browser, that even knows the token."""
    base, token = server.address.split("/#")
    elsewhere = server.context.new_page()
    elsewhere.route("http://evil.test/", lambda route: route.fulfill(body="<p>evil</p>"))
    elsewhere.goto("http://evil.test/")
    elsewhere.evaluate(
        """([base, token]) => {
          const body = JSON.stringify({pair: 0, choice: "left", seconds: 1, comment: ""});
          const plain = {"Content-Type": "text/plain"};
          const signed = {Authorization: `Bearer ${token}`, "Content-Type": "application/json"};
          return Promise.allSettled([plain, signed].map((headers) =>
            fetch(`${base}/api/answer`, {method: "POST", mode: "cors", headers, body})));
        }""",
        [base, token],
    )
    form = f"""<form method="post" enctype="text/plain" action="{base}/api/answer">
      <input name='{{"pair": 0, "choice": "left", "seconds": 1, "comment": "' value='"}}'></form>"""
    elsewhere.set_content(form)
    with elsewhere.expect_navigation():
        elsewhere.evaluate("document.forms[0].submit()")
    assert "another site may not send requests here" in elsewhere.content()
    assert server.answers() == []


@pytest.mark.slow
def test_without_the_token_nothing_is_shown(server: _Server) -> None:
    page = server.context.new_page()
    page.goto(server.address.partition("#")[0])
    page.get_by_role("alert").filter(
        has_text="open the address that the command printed"
    ).wait_for()
    assert not page.locator("#pair").is_visible()


@pytest.mark.slow
def test_a_screen_reader_finds_its_way(server: _Server) -> None:
    page = server.page
    assert page.evaluate("document.activeElement.id") == "prompt-title"
    for region in ("Prompt", "Response 1", "Response 2"):
        assert page.get_by_role("region", name=region).is_visible()
    group = page.get_by_role("group", name="Which response is better?")
    for button in ("1 Response 1", "2 Response 2", "t Tie", "s Skip"):
        assert group.get_by_role("button", name=button).is_visible()
    assert page.get_by_role("progressbar", name="Pairs done").is_visible()
    assert page.get_by_role("radio", name="clearly").is_visible()
    assert page.get_by_role("textbox", name="Comment").is_visible()
    # Keys can be turned off (they may be those of an assistive tool); buttons remain.
    page.get_by_role("checkbox", name="Keys").uncheck()
    server.press("1")
    assert server.answers() == []
    group.get_by_role("button", name="Tie").click()
    page.locator("#count", has_text="1 of 6").wait_for()
    assert server.answers() == [(0, "tie")]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_shows_everything(path: Path, browser: Any, scheme: str) -> None:
    server = _Server(
        path, browser, viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True
    )
    try:
        for key in ("m", "2", "2"):
            assert server.page.evaluate("document.documentElement.scrollWidth") <= 360
            for button in server.page.locator("[data-choice]").all():
                box = button.bounding_box()
                assert 0 <= box["x"] and box["x"] + box["width"] <= 360
                assert box["y"] + box["height"] <= 740 and box["height"] >= 36
            if folder := os.environ.get("SCREENSHOTS"):
                server.page.screenshot(path=f"{folder}/narrow-{scheme}-{key}.png")
            server.press(key)
        background = server.page.evaluate("getComputedStyle(document.body).backgroundColor")
        bright = sum(map(int, background[4:-1].split(","))) / 3
        assert bright > 200 if scheme == "light" else bright < 60
    finally:
        server.stop()


@pytest.mark.slow
def test_texts_have_contrast_in_both_schemes(path: Path, browser: Any) -> None:
    """WCAG 2: 4.5 between every text and what is behind it."""
    for scheme in ("light", "dark"):
        server = _Server(path, browser, color_scheme=scheme)
        try:
            server.press("d")
            found = server.page.evaluate(_CONTRASTS)
            assert len(found) > 15
            assert {name: value for name, value in found if value < 4.5} == {}, scheme
            if folder := os.environ.get("SCREENSHOTS"):
                server.page.screenshot(path=f"{folder}/wide-{scheme}.png")
                server.press("1")
                server.page.screenshot(path=f"{folder}/wide-{scheme}-chat.png")
        finally:
            server.stop()


_CONTRASTS = """() => {
  const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const color = rgb(getComputedStyle(element).backgroundColor);
      if (color.length < 4 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !element.checkVisibility() || element.matches("kbd, :disabled, noscript")) continue;
    const [a, b] = [light(rgb(getComputedStyle(element).color)), light(behind(element))];
    const name = `${element.tagName} ${element.id} ${element.className}`;
    found.push([name, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return found;
}"""
