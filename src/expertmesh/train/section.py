"""What the sections of a configuration are made of."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _name(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("it is empty, or has characters that cannot be printed")
    return str(Path(text).expanduser()) if text.startswith("~") else text


def number(value: Any) -> Any:
    """`value`, but YAML's yes and no are none."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not yes or no")
    return value


Name = Annotated[str, AfterValidator(_name)]
"""A word or a path; `~` is the home folder."""
Count = Annotated[int, BeforeValidator(number), Field(gt=0)]
Size = Annotated[float, BeforeValidator(number), Field(ge=0)]


class Section(BaseModel):
    """Keys of one part of a configuration; a key that is not among them is an error."""

    model_config = ConfigDict(
        extra="forbid", protected_namespaces=(), use_attribute_docstrings=True, allow_inf_nan=False
    )
