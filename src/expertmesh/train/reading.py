"""YAML as configurations are written in it: a key stands once, and what looks like a date is text."""

from pathlib import Path
from typing import Any

import yaml

from expertmesh.train.errors import ConfigError, in_short


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once, and what looks like a date is text: no key is a date."""

    yaml_implicit_resolvers = {
        first: [resolver for resolver in resolvers if resolver[0] != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(f"`{name}` stands in line {lines[name]} and again in line {line}")
            lines[name] = line
        return super().construct_mapping(node, deep)


def parse(text: str, source: object, fix: str) -> Any:
    """What a YAML text says. Raises ConfigError, which names its source and ends with `fix`."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also of 5,000 digits, or of 5,000 brackets
        raise ConfigError(f"{source} is not valid YAML: {in_short(error)}. {fix}") from None


def read(path: Path) -> dict[str, Any]:
    """The sections of a YAML file. Raises ConfigError where it cannot be read, or holds none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"Cannot read the configuration {path}: {why}. Give the path of a YAML file.") from None
    tree = parse(text, path, "Correct that line.")
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        raise ConfigError(f"{path} holds no sections. Begin it with `model:`, and `  name: ...` on the next line.")
    return tree
