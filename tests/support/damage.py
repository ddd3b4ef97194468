"""Valid files and values, damaged in one place, for tests with Hypothesis."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from activedpo_fast._printable import one_line
from activedpo_fast.errors import ActiveDPOError

_LONGER = 40 if os.environ.get("HYPOTHESIS_PROFILE") == "fuzz" else 1

_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),  # NaN and infinities too, which Python's JSON has
    st.sampled_from(
        ["", "left", "tie", "\ud800", "\x1b[2J", "\0", "../../x", "x" * 5000, 10**400, -1, 2**63]
    ),
)
values = st.recursive(
    _leaves,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=3,
) | st.just(json.loads("[" * 300 + "]" * 300))


def examples(count: int) -> settings:
    """Settings of a test that tries so many examples, or more with HYPOTHESIS_PROFILE=fuzz."""
    return settings(max_examples=count * _LONGER)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of keys and positions to every value inside a JSON value, and its own."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in inner if isinstance(value, (dict, list)) else ():
        if isinstance(one, (dict, list)):
            yield from places(one, (*path, key))
        else:
            yield (*path, key)


def with_value(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy with another value at a path."""
    if not path:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[path[0]] = with_value(document[path[0]], path[1:], value)
    return copy


@st.composite
def one_damaged_value(draw: st.DrawFn, document: Any) -> Any:
    """Draw a copy of a JSON value in which one value is another, or is gone."""
    path = draw(st.sampled_from(list(places(document))))
    if path and isinstance(path[-1], str) and draw(st.booleans()):
        copy = json.loads(json.dumps(document))
        inside = copy
        for key in path[:-1]:
            inside = inside[key]
        del inside[path[-1]]
        return copy
    return with_value(document, path, draw(values))


@st.composite
def damaged_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """Draw a copy with some bytes changed, left out, repeated or put in, or cut short."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        until = min(len(content), at + draw(st.sampled_from([1, 2, 8, 1000])))
        kind = draw(st.sampled_from(["change", "leave out", "repeat", "put in", "cut"]))
        if kind == "change":
            content[at:until] = draw(st.binary(min_size=until - at, max_size=until - at))
        elif kind == "leave out":
            del content[at:until]
        elif kind == "repeat":
            content[at:at] = content[at:until] * draw(st.sampled_from([1, 50]))
        elif kind == "put in":
            content[at:at] = draw(st.binary(max_size=20) | st.sampled_from([b'"', b"[" * 3000]))
        else:
            del content[at:]
    return bytes(content)


def read_or_refused(read: Callable[[], Any]) -> Any:
    """Return what is read, or None if it is refused with a message that fits into one line."""
    try:
        return read()
    except ActiveDPOError as error:
        message = one_line(str(error))
        assert message and "\n" not in message and "\x1b" not in message
        return None
