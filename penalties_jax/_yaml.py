"""YAML by PyYAML, its words and numbers as in YAML 1.2: 1e-4 is a number, on is a word.

What comes of it is what JSON has: no dates, no tags, no key twice.
"""

import re
from typing import Any

import yaml

from penalties_jax._plain import (
    MAX_DEPTH,
    TOO_DEEP,
    check_bounds,
    check_length,
    number,
    repeated,
    too_many,
)

# PyYAML takes 30 microseconds a node and up to 1.5 a character: a second in all.
MAX_NODES = 20_000
MAX_CHARACTERS = 300_000

ERROR = yaml.YAMLError

# The core schema of YAML 1.2, and merges, which are of 1.1: patterns, and their first characters.
NUMBERS = {
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
WORDS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "merge": (r"<<", "<"),
}


class Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML takes for something else than a string."""


class Loader(yaml.SafeLoader):
    """Reads plain data, as much of it as there may be once aliases and merges are written out."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def __init__(self, text: Any):
        super().__init__(text)
        self.depth = 0
        # Of each node how many it holds, each as often as it is referred to, and how deep.
        self.sizes: dict[yaml.Node, tuple[int, int]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node, and its size."""
        event: Any = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise _refused("tags are not read", event)
        if self.depth > MAX_DEPTH:
            raise _refused(f"it {TOO_DEEP}", event)
        self.depth += 1
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            self.sizes[node] = self._size(node, event)
        elif node not in self.sizes:
            raise _refused("it holds itself", event)
        return node

    def _size(self, node, event):
        if isinstance(node, yaml.ScalarNode):
            return 0, 0
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            for key in repeated(key.value for key, _ in parts if isinstance(key, yaml.ScalarNode)):
                raise _refused(f"the key {key!r} comes twice", event)
            parts = [part for pair in parts for part in pair]
        sizes = [self.sizes[part] for part in parts]
        nodes = len(sizes) + sum(nodes for nodes, _ in sizes)
        depth = 1 + max((depth for _, depth in sizes), default=0)
        if nodes > MAX_NODES:
            raise _refused(f"it {too_many(MAX_NODES)}", event)
        if depth > MAX_DEPTH:
            raise _refused(f"it {TOO_DEEP}", event)
        return nodes, depth


def _refused(problem, event):
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def _int(loader, node):
    base = {"0o": 8, "0x": 16}.get(node.value[:2])
    return number(int, node.value) if base is None else int(node.value, base)


def _float(loader, node):
    if node.value[-1] in "fFnN":
        return loader.construct_yaml_float(node)
    return number(float, node.value)


def _tag(kind):
    return f"tag:yaml.org,2002:{kind}"


for kinds, classes in ((NUMBERS, (Loader, Dumper)), (WORDS, (Loader,))):
    for kind, (pattern, first) in kinds.items():
        for cls in classes:
            cls.add_implicit_resolver(_tag(kind), re.compile(rf"^({pattern})$"), list(first))
Loader.add_constructor(_tag("int"), _int)
Loader.add_constructor(_tag("float"), _float)


def load(text: str) -> Any:
    """Plain data from YAML; a `yaml.YAMLError` for other text, and for more than is read."""
    try:
        check_length(text, MAX_CHARACTERS)
        return yaml.load(text, Loader)
    # PyYAML lets those through of escapes and of versions that are no numbers.
    except (ValueError, OverflowError) as error:
        raise yaml.YAMLError(str(error)) from error


def dump(data: Any) -> str:
    """Plain data as YAML, keys in their order; a ValueError for more than is read."""
    check_bounds(data, MAX_NODES)
    text = yaml.dump(data, Dumper=Dumper, sort_keys=False)
    check_length(text, MAX_CHARACTERS)
    return text
