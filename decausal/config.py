"""YAML recipe and command-line flags to settings; an unknown key is an error that names the nearest one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from enum import Enum
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from decausal.errors import UserError, nearest, one_of
from decausal.files import parsed_yaml, read_given
from decausal.privacy import without_secrets
from decausal.trainer_fields import trainer_fields

Settings = TypeVar("Settings")
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")

# Names that users know from elsewhere.
ALIASES = {
    "model": "model_name_or_path",
    "dataset": "data",
    "seq_length": "max_length",
    "alignment_weight": "align_weight",
}


def recipe_names() -> list[str]:
    """Returns the names of the recipes that come with decausal."""
    folder = resources.files("decausal") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """Returns a recipe's keys and values, from a name that comes with decausal or a YAML file.

    Raises:
        UserError: There is no such recipe, or the file is not a YAML mapping.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        try:
            text = read_given(name_or_path)
        except OSError as error:
            raise UserError(f"recipe {name_or_path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"recipe {name_or_path} is not text in UTF-8") from error
    elif name_or_path in recipe_names():
        text = (resources.files("decausal") / "recipes" / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    else:
        hint = one_of(name_or_path, recipe_names(), "accepted")
        raise UserError(f"unknown recipe '{name_or_path}'{hint}, or a path to a .yaml file")
    try:
        recipe = parsed_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"recipe {name_or_path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"recipe {name_or_path} must hold 'key: value' lines")
    return recipe


def resolve(
    settings_type: type[Settings], recipe: Mapping[str, Any], flags: Sequence[str], where: str = "recipe"
) -> tuple[Settings, dict[str, Any]]:
    """Joins a recipe and flags (which win) into our settings and transformers' training arguments.

    Args:
        settings_type: A dataclass of ours.
        recipe: Keys and values, of either kind.
        flags: `--key value` or `--key=value` pairs.
        where: How errors name the recipe.

    Raises:
        UserError: An unknown key, a flag without a value, or a value of the wrong type.
    """
    own = get_type_hints(settings_type)
    settings: dict[str, Any] = {}
    training: dict[str, Any] = {}
    for origin, values in ((where, recipe), ("flag --", parse_flags(flags))):
        for given, value in values.items():
            key = ALIASES.get(given, given)
            label = f"{origin}{given}" if origin == "flag --" else f"{origin}: {given}"
            if key in own:
                settings[key] = coerce(value, own[key], label)
            elif key == "resume_from_checkpoint" and value is True:
                training[key] = "true"
            elif key in training_hints():
                training[key] = coerce(value, training_hints()[key], label)
            else:
                hint = nearest(key, [*own, *training_hints()])
                raise UserError(f"unknown key '{given}' ({origin.rstrip(' -')}){hint}")
    return settings_type(**settings), training


def resolve_own(settings_type: type[Settings], flags: Sequence[str]) -> Settings:
    """Does what `resolve` does, for verbs without transformers' training arguments.

    Raises:
        UserError: As `resolve`.
    """
    hints = get_type_hints(settings_type)
    values = {}
    for key, value in parse_flags(flags).items():
        if key not in hints:
            raise UserError(f"unknown flag --{key}{nearest(key, hints)}")
        values[key] = coerce(value, hints[key], f"flag --{key}")
    return settings_type(**values)


def as_yaml(settings: Any, training: Mapping[str, Any]) -> str:
    """Returns all resolved settings except secrets, as a YAML file that `--recipe` takes."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}
    return yaml.safe_dump(without_secrets(values | dict(training)), sort_keys=False)


def take_flag(flags: Sequence[str], name: str, default: str) -> tuple[list[str], str]:
    """Returns the flags without `--name`, and its value."""
    values = parse_flags(flags)
    value = values.pop(name, default)
    rest = [f"--{key}" if given is True else f"--{key}={given}" for key, given in values.items()]
    return rest, "true" if value is True else value


def parse_flags(flags: Sequence[str]) -> dict[str, str | bool]:
    """Returns `--key value` and `--key=value` flags as a dictionary; a flag without a value is True.

    Raises:
        UserError: Something else stands where a flag should.
    """
    values: dict[str, str | bool] = {}
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or len(flag) == 2:
            raise UserError(f"'{flag}' is not a flag: write --key value")
        key, equals, value = flag[2:].partition("=")
        if not equals:
            values[key.replace("-", "_")] = rest.pop(0) if rest and not rest[0].startswith("--") else True
        else:
            values[key.replace("-", "_")] = value
    return values


def training_hints() -> dict[str, Any]:
    """Returns the fields of `transformers.TrainingArguments` and their types."""
    return {name: field.hint for name, field in trainer_fields().items()}


def coerce(value: Any, hint: Any, label: str) -> Any:
    """Converts `value`, a string from a flag or a value from YAML, to the type of its field.

    Raises:
        UserError: It cannot be converted; `label` names the key.
    """
    options = _options(hint)
    if value is True and bool not in options:
        raise UserError(f"{label} needs a value: give {accepted(hint)}")
    if isinstance(value, str) and value.lower() in ("none", "null") and type(None) in options:
        return None
    for option in options:
        try:
            return _as(value, option)
        except (ValueError, TypeError, KeyError, StopIteration, yaml.YAMLError):
            continue
    raise UserError(f"{label}: '{value}' is not accepted; give {accepted(hint)}")


def _options(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, UnionType):
        options = [option for part in get_args(hint) for option in _options(part)]
    else:
        options = [hint]
    # From the narrowest to the widest. A string takes anything, so it comes last.
    order = {type(None): 0, bool: 1, int: 2, float: 3, dict: 4, list: 5, str: 9}
    return sorted(options, key=lambda option: order.get(get_origin(option) or option, 6))


def _as(value: Any, option: Any) -> Any:
    origin = get_origin(option)
    if option is type(None):
        if value is None:
            return None
        raise ValueError
    if value is None:
        raise ValueError
    if origin is Literal:
        return next(choice for choice in get_args(option) if str(choice) == str(value))
    if option is bool:
        if isinstance(value, bool):
            return value
        return {"true": True, "false": False, "yes": True, "no": False}[str(value).lower()]
    if option is int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError
        return int(value)
    if option is float:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    if origin is tuple:
        return _as_tuple(value, get_args(option)[0])
    if option is dict or origin is dict or option is list or origin is list:
        parsed = parsed_yaml(value) if isinstance(value, str) else value
        if (origin or option) is list and isinstance(parsed, str) and "," in parsed:
            parsed = [part.strip() for part in parsed.split(",")]
        if not isinstance(parsed, origin or option):
            raise ValueError
        return _with_numbers(parsed) if isinstance(parsed, dict) else parsed
    if isinstance(option, type) and issubclass(option, Enum):
        return option(value).value  # checked, and kept plain: settings are written to YAML and JSON
    if option is str or not isinstance(option, type):
        return str(value)
    return option(value)


def _with_numbers(table: dict[Any, Any]) -> dict[Any, Any]:
    """Returns a table in which 1e-5 is a number: YAML 1.1 reads only 1.0e-5 as one."""
    return {
        key: float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
        for key, value in table.items()
    }


def _as_tuple(value: Any, item: Any) -> tuple:
    if isinstance(value, str):
        if item is str and ("," not in value or Path(value).expanduser().exists()):
            raise ValueError  # a single word stays a word, and so does the name of a file
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple):
        value = [value]
    return tuple(_as(part, item) for part in value)


def accepted(hint: Any) -> str:
    """Returns in words what a value of this type can be."""
    return ", ".join(_described(option) for option in _options(hint) if option is not type(None)) or "none"


def _described(option: Any) -> str:
    if get_origin(option) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(option))
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "values with commas"}
    names |= {list: "a list: [a, b]", dict: 'a table: {"name": value}'}
    if isinstance(option, type) and issubclass(option, Enum):
        return "one of " + ", ".join(str(choice.value) for choice in option)
    return names.get(get_origin(option) or option, str(option))
