"""Building blocks of a configuration: a YAML loader that refuses duplicate keys, and sections of typed keys."""

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from expertmesh.train.errors import ConfigError, short_message


def _name(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("it is empty, or has characters that cannot be printed")
    return str(Path(text).expanduser()) if text.startswith("~") else text


def number(value: Any) -> Any:
    """Return `value`. Raise ValueError for a bool, which pydantic would convert to 0 or 1."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not yes or no")
    return value


Name = Annotated[str, AfterValidator(_name)]
"""A word or a path; `~` at its beginning is expanded to the home folder."""
Count = Annotated[int, BeforeValidator(number), Field(gt=0)]
Size = Annotated[float, BeforeValidator(number), Field(ge=0)]


class Section(BaseModel):
    """Base class of the sections; an unknown key is an error, and docstrings of keys become their descriptions."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys and reads dates as text, because no key takes a date."""

    def construct_mapping(self, node, deep=False):
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(f"`{name}` is in line {lines[name]} and again in line {line}")
            lines[name] = line
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda _, node: node.value)


def parse(text: str, source: object, fix: str) -> Any:
    """Parse a YAML text. Raise ConfigError, with a message that names `source` and ends with `fix`."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an int of 5,000 digits, 5,000 nested brackets
        raise ConfigError(f"{source} is not valid YAML: {short_message(error)}. {fix}") from None


def read(path: Path) -> dict[str, Any]:
    """Read the sections of a YAML file. Raise ConfigError if it cannot be read or has no sections."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"Cannot read the configuration {path}: {why}. Give the path of a YAML file.") from None
    tree = parse(text, path, "Correct that line.")
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        raise ConfigError(f"{path} holds no sections. Begin it with `model:`, and `  name: ...` on the next line.")
    return tree
