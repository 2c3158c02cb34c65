"""YAML by PyYAML's safe loader and dumper, but for two traps: 1e-4 is a number, on is a word."""

import re
from typing import Any

import yaml

# As in YAML 1.2 and in JSON; YAML 1.1 wants a point in the digits, and a sign in the exponent.
EXPONENT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
TRUTH = re.compile("^(true|True|TRUE|false|False|FALSE)$")


class Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML takes for something else than a string."""


class Loader(yaml.SafeLoader):
    """Reads numbers and truth values as YAML 1.2 does, so that a term's `on` is a key."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver("tag:yaml.org,2002:bool", TRUTH, "tTfF")
for cls in (Loader, Dumper):
    cls.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, "-+.0123456789")


def load(text: str) -> Any:
    """Plain data from YAML."""
    return yaml.load(text, Loader)


def dump(data: Any) -> str:
    """Plain data as YAML, keys in their order."""
    return yaml.dump(data, Dumper=Dumper, sort_keys=False)
