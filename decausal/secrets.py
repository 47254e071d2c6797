"""Secrets among settings: tokens, keys and passwords, none of which is ever written to a file."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

HIDDEN = "[removed]"

# A model's own files name tokens of text in any way, so only these are taken for secrets there.
_SECRET_OF_A_MODEL = re.compile(
    r"token|(.*_)?((auth|access|api|hub|hf)_token|password|passwd|passphrase|secret|(api|access|private|secret)_key)",
    re.IGNORECASE,
)

# Vocabulary has tokens, too: those are no secrets.
_TOKENS_OF_TEXT = re.compile(r"(mask|eos|bos|pad|unk|sep|cls|end|stop|special|image|prefix|suffix|middle)_token")
_SECRET_NAME = re.compile(
    r"(^|[_\-.])(token|password|passwd|passphrase|secret|credentials?|(api|access|private|auth|secret)_?key)$",
    re.IGNORECASE,
)
_SECRET_TEXT = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_\-]{16,}|\bgh[pousr]_[A-Za-z0-9]{16,}|(?<=://)[^/@\s]+:[^/@\s]+(?=@)"
)


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a token, a key or a password."""
    name = name.lstrip("-").replace("-", "_")
    return _SECRET_NAME.search(name) is not None and _TOKENS_OF_TEXT.fullmatch(name) is None


def secret_in(settings: Any) -> str | None:
    """Returns the name of a model's setting, at any depth, whose text can only be a secret; None: there is none."""
    return next(iter(drop_secrets(copy.deepcopy(settings))), None)


def drop_secrets(settings: Any) -> list[str]:
    """Takes the settings of a model whose texts can only be secrets out, at any depth, in place.

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
    """Returns a value to be recorded: secret entries of its tables are left out, tokens in its texts replaced.

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
