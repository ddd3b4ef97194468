"""Reading a YAML file: plain values alone, each key once, bounded in size."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from activedpo_fast._files import first_line, read_text
from activedpo_fast._limits import check_limit, limit
from activedpo_fast.errors import ActiveDPOError

_PLAIN = frozenset(
    f"tag:yaml.org,2002:{n}"
    for n in ("bool", "float", "int", "null", "str", "seq", "map", "merge", "value")
)
_TIMESTAMP = "tag:yaml.org,2002:timestamp"


def read_yaml(path: Path) -> Any:
    """Return the value of a YAML file: lists and mappings of text, numbers, true, false and null.

    1e-4 is a number and a date is text, as people expect; in YAML 1.1, which PyYAML reads, they are
    not. Other types are refused.

    Raises:
        ActiveDPOError: it is unreadable, not YAML, has a key twice, or exceeds a limit (`yaml_kib`,
            `yaml_values`, `yaml_depth`). The message has the file and, if known, the line.
    """
    loader: Any = None
    try:
        loader = _Loader(read_text(path, "yaml_kib"))
        node = loader.get_single_node()
        if node is None:
            return None
        _check_values(node, path)
        return loader.construct_document(node)
    except _TooDeep as error:
        check_limit("yaml_depth", error.depth, f"{path}, line {error.line}", "levels")
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not readable"
        raise ActiveDPOError(f"{path}{line}: broken YAML: {problem}") from None
    finally:
        if loader is not None:
            loader.dispose()


class _TooDeep(yaml.YAMLError):  # type: ignore[misc]
    def __init__(self, depth: int, line: int) -> None:
        self.depth, self.line = depth, line


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Safe YAML, checked while it is read."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > limit("yaml_depth"):
            raise _TooDeep(self._depth, self.peek_event().start_mark.line + 1)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if node.tag not in _PLAIN:
            self._refuse(node, f"values of the type {node.tag} are not read")
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:
            if isinstance(error, yaml.YAMLError):
                raise
            self._refuse(node, f"{node.value!r} is not read: {first_line(error)}; quote it")

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                self._refuse(key, "a list or a mapping cannot be a key")
            if key.value in seen:
                self._refuse(key, f"the key {key.value!r} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def _refuse(self, node: Any, problem: str) -> Any:
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _check_values(node: Any, path: Path) -> None:
    """Count the values with those that aliases repeat, before any of them is built."""
    counts: dict[int, float] = {}

    def count(node: Any) -> float:
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) not in counts:
            counts[id(node)] = math.inf  # an alias of what it is in
            inner = (
                [one for pair in node.value for one in pair]
                if isinstance(node, yaml.MappingNode)
                else node.value
            )
            counts[id(node)] = 1 + sum(count(one) for one in inner)
        return counts[id(node)]

    values = count(node)
    if values == math.inf:
        raise ActiveDPOError(f"{path}: broken YAML: an alias of a value that it is in")
    check_limit("yaml_values", int(values), path, "values")


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
