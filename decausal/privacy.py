"""What is kept from others: secrets, which no file ever holds, and where files lie on this machine.

Whatever leaves the machine with a model names the last part of a path only. Ids on the hub stay as they are.
"""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from decausal.files import DATA_SUFFIX

HIDDEN = "[removed]"

# A model's own files use the word token for text, so only these names count as secrets there.
_SECRET_OF_A_MODEL = re.compile(
    r"token|(.*_)?((auth|access|api|hub|hf)_token|password|passwd|passphrase|secret|(api|access|private|secret)_key)",
    re.IGNORECASE,
)

# Names of tokens in the vocabulary, and figures per token: those are not secrets.
_TOKENS_OF_TEXT = re.compile(
    r"(mask|eos|bos|pad|unk|sep|cls|end|stop|special|image|prefix|suffix|middle|\w+_per)_token"
)
_SECRET_NAME = re.compile(
    r"(^|[_\-.])(token|password|passwd|passphrase|secret|credentials?|(api|access|private|auth|secret)_?key)$",
    re.IGNORECASE,
)
_SECRET_TEXT = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_\-]{16,}|\bgh[pousr]_[A-Za-z0-9]{16,}|(?<=://)[^/@\s]+:[^/@\s]+(?=@)"
)


# Settings that hold text. There a slash is a character like any other: `</s>` is not a path.
_NO_PATHS = ("sampler", "mask_token", "chat_template_kwargs")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_secret(name: str) -> bool:
    """Returns whether a setting of this name holds a token, a key or a password."""
    name = name.lstrip("-").replace("-", "_")
    return _SECRET_NAME.search(name) is not None and _TOKENS_OF_TEXT.fullmatch(name) is None


def secret_in(settings: Any) -> str | None:
    """Returns the name of a model's setting, at any depth, whose text can only be a secret; None: there is none."""
    return next(iter(drop_secrets(copy.deepcopy(settings))), None)


def drop_secrets(settings: Any) -> list[str]:
    """Removes, in place and at any depth, those settings of a model whose texts can only be secrets.

    Args:
        settings: What a JSON file holds, or the attributes of a configuration, with others in it.

    Returns:
        Their names.
    """
    if hasattr(settings, "to_dict"):  # a configuration, perhaps a part of another
        settings = vars(settings)
    if isinstance(settings, list):
        return [name for part in settings for name in drop_secrets(part)]
    if not isinstance(settings, dict):
        return []
    found = []
    for name, value in list(settings.items()):
        if not isinstance(value, str):
            found += drop_secrets(value)
        elif value and (_SECRET_OF_A_MODEL.fullmatch(str(name)) or _SECRET_TEXT.search(value)):
            del settings[name]
            found.append(str(name))
    return found


def without_secrets(value: Any) -> Any:
    """Returns a value as it may be recorded: tables without secret entries, and texts with secrets replaced.

    Example:
        >>> without_secrets({"hub_token": "hf_0123456789", "data": "https://me:pass@example.org/a.txt"})
        {'data': 'https://[removed]@example.org/a.txt'}
    """
    if isinstance(value, Mapping):
        return {
            name: without_secrets(part)
            for name, part in value.items()
            if not (isinstance(name, str) and is_secret(name) and part is not None)
        }
    if isinstance(value, list | tuple):
        return type(value)(without_secrets(part) for part in value)
    return _SECRET_TEXT.sub(HIDDEN, value) if isinstance(value, str) else value


@contextmanager
def secrets_set_aside(values: object) -> Iterator[None]:
    """Takes the secrets out of an object's attributes, tables among them, for as long as it is written to a file."""
    plain = {name: value for name, value in vars(values).items() if isinstance(value, str | dict | list)}
    shown = without_secrets(plain)
    held = {name: value for name, value in plain.items() if shown.get(name) != value}
    try:
        vars(values).update({name: shown.get(name) for name in held})
        yield
    finally:
        vars(values).update(held)


def arguments_without_secrets(arguments: Sequence[str]) -> list[str]:
    """Returns a command's arguments with every secret replaced, whether as `--name value` or as `--name=value`."""
    shown: list[str] = []
    for argument in arguments:
        flag = argument.partition("=")[0]
        if shown and shown[-1].startswith("--") and "=" not in shown[-1] and is_secret(shown[-1]):
            shown.append(argument if argument.startswith("--") else HIDDEN)
        elif flag.startswith("--") and flag != argument and is_secret(flag):
            shown.append(f"{flag}={HIDDEN}")
        else:
            shown.append(without_secrets(argument))
    return shown


def is_public_name(name: object) -> bool:
    """Returns whether a source or data set is named by its id on the hub, not by a path."""
    text = str(name).partition(":")[0]
    is_name = _HUB_ID.fullmatch(text) is not None and not text.startswith(".")
    return is_name and DATA_SUFFIX.search(text) is None and not Path(text).exists()


def without_paths(value: Any) -> Any:
    """Returns a value of a recipe with every path, in lists and tables too, reduced to its last part.

    Example:
        >>> without_paths("/home/me/a.txt,bigcode/python,/home/me/b.txt:8000@7")
        'a.txt,bigcode/python,b.txt:8000@7'
    """
    if isinstance(value, dict):
        return {name: part if name in _NO_PATHS else without_paths(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(part) for part in value]
    if isinstance(value, PurePath):
        return value.name
    if not isinstance(value, str) or "/" not in value or "\n" in value:
        return value
    return ",".join(_last_part(part) for part in value.split(","))


def without_paths_in(arguments: Sequence[str]) -> str:
    """Returns a command's arguments as one line, without secrets and with only the last part of each path."""
    words = []
    for argument in arguments_without_secrets(arguments):
        flag, is_joined, value = argument.rpartition("=")
        words.append(f"{flag}{is_joined}{without_paths(value)}")
    return shlex.join(words)


def _last_part(text: str) -> str:
    return text if "://" in text or is_public_name(text) else PurePath(text).name
