"""How verbs read their flags and print their settings."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

from decausal.data.reading import ON_BAD_RECORD
from decausal.errors import UserError
from decausal.files import parsed_json, read_bounded

TRAINING_ARGUMENTS_PAGE = "https://huggingface.co/docs/transformers/main_classes/trainer"


class VerbParser(argparse.ArgumentParser):
    """A parser that reports a bad flag on one line, like every other error."""

    def __init__(self, verb: str, description: str) -> None:
        super().__init__(prog=f"decausal {verb}", description=description, allow_abbrev=False)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Reads flags before, between and after the texts. By itself argparse takes texts in one place only."""
        found, unknown = self.parse_known_intermixed_args(args, namespace)
        if unknown:
            flags = [argument for argument in unknown if argument.startswith("-")]
            self.error(f"unrecognized arguments: {' '.join(flags or unknown)}")
        return found

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.removeprefix('decausal ')}: {message}; see {self.prog} --help")


@contextmanager
def slow_imports() -> Iterator[None]:
    """Pauses garbage collection during imports, where it takes a fifth of the time and finds nothing.

    What the first imports leave stays as long as the process. Later collections skip it, and each full one then saves a
    quarter of a second.
    """
    was_enabled, is_first = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.freeze()
        if was_enabled:
            gc.enable()


def at_least(least: int) -> Callable[[str], int]:
    """Returns a function that reads a whole number and refuses smaller ones."""

    def read(written: str) -> int:
        value = int(written)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is not accepted: it must be at least {least}")
        return value

    read.__name__ = "int"  # argparse names it in its messages
    return read


positive = at_least(1)


def given(flags: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Returns the named flags that were given."""
    return {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}


def given_to(function: Callable[..., Any], flags: argparse.Namespace) -> dict[str, Any]:
    """Returns the flags that were given and have the name of a parameter of a function, or of a dataclass's field."""
    return given(flags, *(name for name in signature(function).parameters if hasattr(flags, name)))


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how records are read, by the names of the fields of `Reading`."""
    parser.add_argument("--text_field", help="the field of a record that holds its text (text)")
    parser.add_argument("--prompt_field", help="the field that holds its prompt (prompt)")
    parser.add_argument("--completion_field", help="and the one with the answer (completion)")
    parser.add_argument(
        "--dataset_split", dest="split", metavar="DATASET_SPLIT", help="the split of a data set (train)"
    )
    parser.add_argument("--on_bad_record", choices=ON_BAD_RECORD, help="what a bad record does (error)")
    parser.add_argument(
        "--dataset_num_proc", dest="num_proc", metavar="N", type=positive, help="processes that tokenise (1)"
    )


def add_template_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `template_options` reads."""
    parser.add_argument("--chat_template", metavar="FILE", help="another chat template (the model's own)")
    parser.add_argument(
        "--chat_template_kwargs",
        type=_json_object,
        metavar="JSON",
        help="values that the chat template reads, such as '{\"enable_thinking\": false}'",
    )


def template_options(flags: argparse.Namespace, is_used: Callable[[], bool] = lambda: True) -> dict[str, Any]:
    """Returns the values of the flags of `add_template_flags`.

    Args:
        flags: All flags.
        is_used: Returns whether anything goes through the template. Called only if one of the flags was given.

    Raises:
        UserError: There is no such template, or it would not be used.
    """
    found = given(flags, "chat_template", "chat_template_kwargs")
    if found and not is_used():
        raise UserError(f"--{next(iter(found))} is for --chat: nothing else is put through the chat template")
    if "chat_template" in found:
        from decausal.data.template_file import read_template

        read_template(found["chat_template"])
    return found


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = parsed_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('not an object, such as {"enable_thinking": false}')
    return value


def text_from(file: str | None, verb: str) -> str:
    """Reads a file, or else standard input, in UTF-8.

    Raises:
        UserError: It cannot be read, or is not UTF-8.
    """
    try:
        with nullcontext(sys.stdin.buffer) if file is None else Path(file).open("rb") as given:
            return read_bounded(given).decode("utf-8")
    except OSError as error:
        raise UserError(f"{verb}: cannot read {file or 'standard input'}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        where = file or "standard input"
        raise UserError(f"{verb}: {where} is not UTF-8 at byte {error.start}: convert it first") from None


def wants_help(arguments: list[str]) -> bool:
    return any(argument in ("-h", "--help") for argument in arguments)


def leading_positional(arguments: list[str]) -> tuple[str | None, list[str]]:
    if arguments and not arguments[0].startswith("--"):
        return arguments[0], arguments[1:]
    return None, arguments


def recipe_help(*, prints: bool = True) -> str:
    """Returns the help of `--recipe` and, if the verb prints settings, of `--print_config`."""
    from decausal.config import recipe_names

    recipes = f"  --recipe {'|'.join(recipe_names())}, or a YAML file\n"
    goals = "  --goal infill|speed|exact     without --recipe: what you want, else it is chosen by model and data\n"
    return recipes + goals + "  --print_config                print all settings as resolved, and stop\n" * prints


def print_settings(usage: str, settings_type: type, extra: str = "") -> None:
    print(f"usage: decausal {usage} [--key value ...]\n")
    print(extra, end="")
    for field in fields(settings_type):
        print(f"  --{field.name} (default {field.default})\n      {field.metadata['help']}")


def print_training_arguments(defaults: Mapping[str, Any]) -> None:
    """Prints the training arguments that have an effect here.

    Args:
        defaults: Our runs' defaults, which replace transformers' own.
    """
    from decausal.config import accepted
    from decausal.trainer_fields import trainer_fields
    from decausal.training.argument_values import WITHOUT_EFFECT

    print(f"\nand transformers' training arguments, which {TRAINING_ARGUMENTS_PAGE} describes:")
    for name, field in trainer_fields().items():
        if name not in WITHOUT_EFFECT:
            print(f"  --{name} (default {defaults.get(name, field.default)!r})")
            print(textwrap.fill(accepted(field.hint), 118, initial_indent=" " * 6, subsequent_indent=" " * 6))


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
