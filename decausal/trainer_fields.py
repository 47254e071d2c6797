"""The fields of `transformers.TrainingArguments`, from a record, so that reading flags does not import torch.

The record, `trainer_fields.json`, is valid for one version of transformers. For other versions the class is read.
`python -m decausal.trainer_fields` rewrites the record for the installed version.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, Field, dataclass, fields
from enum import Enum
from functools import cache
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

RECORD = "trainer_fields.json"
PLAIN = {"null": NoneType, "bool": bool, "int": int, "float": float, "str": str, "dict": dict, "list": list}


@dataclass(frozen=True)
class TrainerField:
    """One training argument.

    Attributes:
        hint: Its type: only plain types and literals, which YAML and flags can hold.
        default: Its default value.
    """

    hint: Any
    default: Any


@cache
def trainer_fields() -> dict[str, TrainerField]:
    """Returns the training arguments by name, in the order of the class."""
    record = json.loads((resources.files("decausal") / RECORD).read_text(encoding="utf-8"))
    if record["transformers"] != installed_version():
        record = record_of_installed()
    return {name: TrainerField(_hint(types), default) for name, (types, default) in record["fields"].items()}


def installed_version() -> str | None:
    """Returns the version of transformers, without importing it."""
    try:
        return version("transformers")
    except PackageNotFoundError:
        return None


def record_of_installed() -> dict[str, Any]:
    """Returns ``{"transformers": version, "fields": {name: [types, default]}}``, read from the class."""
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    return {
        "transformers": installed_version(),
        "fields": {
            field.name: [_types(hints[field.name]), _default(field)]
            for field in fields(TrainingArguments)
            if field.init
        },
    }


def _types(hint: Any) -> list[Any]:
    """Returns a hint as names of plain types and lists of literals.

    A class that neither text nor YAML can express is left out. So is text beside an enumeration, since
    TrainingArguments turns it into a member.
    """
    if get_origin(hint) in (Union, UnionType):
        types = [name for part in get_args(hint) for name in _types(part)]
        return [name for name in types if name != "str"] if any(map(_is_enum, get_args(hint))) else types
    if get_origin(hint) is Literal:
        return [list(get_args(hint))]
    if _is_enum(hint):
        return [[member.value for member in hint]]
    plain = get_origin(hint) or hint
    return [name for name, type_ in PLAIN.items() if plain is type_]


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _default(field: Field) -> Any:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return default.value if isinstance(default, Enum) else default


def _hint(types: list[Any]) -> Any:
    parts = [Literal[tuple(part)] if isinstance(part, list) else PLAIN[part] for part in types]
    return Union[tuple(parts or [NoneType])]  # noqa: UP007 - there is no other way for a list


if __name__ == "__main__":
    record = record_of_installed()
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(field)}" for name, field in record["fields"].items())
    text = f'{{"transformers": "{record["transformers"]}", "fields": {{\n{lines}\n}}}}\n'
    Path(__file__).with_name(RECORD).write_text(text, encoding="utf-8")
