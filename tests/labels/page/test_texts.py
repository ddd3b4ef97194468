"""Texts as the page shows them: nothing in a response becomes active, and nothing is lost."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("markdown_it")

from activedpo_fast.labels.page.texts import as_html, differences, messages  # noqa: E402

TAGS = set(
    "p br strong em s code pre ul ol li blockquote hr h1 h2 h3 h4 h5 h6 table thead tbody tr th td"
    "".split()
)


class _Found(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {(tag, name) for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError("a comment")


HARMLESS = {("code", "class"), ("ol", "start"), ("th", "style"), ("td", "style")}

NASTY = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a <b onclick='x'>b</b> <!-- c -->",
    "[click](javascript:alert(1))",
    "![image](http://evil.test/x.png)",
    "<http://evil.test>",
    "[ref]\n\n[ref]: http://evil.test",
    '```"><script>alert(1)</script>\ncode\n```',
    "|a|b|\n|:-:|-|\n|<i>x</i>|[y](z)|",
]


@pytest.mark.parametrize("text", NASTY)
def test_what_a_response_contains_stays_text(text: str) -> None:
    found = _Found(as_html(text))
    assert found.tags <= TAGS
    assert found.attributes <= HARMLESS
    for word in ("alert(1)", "http://evil.test", "onclick"):
        # The language of a code block is not shown, whatever it is.
        assert (word in found.text) == (word in text) or text.startswith("```")


_PIECES = st.lists(
    st.sampled_from(
        [*NASTY, "<", ">", "&", '"', "`", "```", "*", "_", "\n", "# ", "- ", "| ", " x "]
    )
    | st.text(max_size=8)
)


@given(_PIECES.map("".join))
def test_no_text_becomes_anything_but_harmless_tags(text: str) -> None:
    found = _Found(as_html(text))
    assert found.tags <= TAGS
    assert found.attributes <= HARMLESS


def test_markdown_is_rendered() -> None:
    found = _Found(
        as_html("# Title\n\n**b** ~~s~~\nline\n\n- one\n\n```py\nx < 1\n```\n\n|a|\n|-|\n|1|")
    )
    assert {"h1", "strong", "s", "br", "ul", "pre", "table"} <= found.tags
    assert "x < 1" in found.text


def test_messages_of_plain_text_and_of_chats() -> None:
    assert messages("a *b*") == [{"role": None, "text": "a *b*", "html": "<p>a <em>b</em></p>\n"}]
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert [(m["role"], m["text"]) for m in messages(chat)] == [("user", "hi"), ("assistant", "ho")]


def _joined(pieces: list[list], differing: bool | None = None) -> str:
    return "".join(text for text, differs in pieces if differing in (None, differs))


def test_differences_are_marked_word_by_word() -> None:
    left, right = differences("It is two,  of course.\n", "It is three, of course.\n")
    assert left == [("It is ", False), ("two,  ", True), ("of course.\n", False)]
    assert right == [("It is ", False), ("three, ", True), ("of course.\n", False)]


@given(st.text("ab \n", max_size=40), st.text("ab \n", max_size=40))
def test_differences_lose_nothing_and_agree_on_the_rest(a: str, b: str) -> None:
    left, right = differences(a, b)
    assert (_joined(left), _joined(right)) == (a, b)
    assert _joined(left, False).split() == _joined(right, False).split()


def test_differences_of_chats_and_of_long_texts() -> None:
    left, right = differences(
        [{"role": "assistant", "content": "a b"}], [{"role": "assistant", "content": "a c"}]
    )
    assert (left, right) == ([("a ", False), ("b", True)], [("a ", False), ("c", True)])
    words = ["the"] * 2000 + [f"w{n}" for n in range(2000)]
    left, right = differences(" ".join(words), " ".join([*words[:-1], "other"]))
    assert (_joined(left, True), _joined(right, True)) == ("w1999", "other")
