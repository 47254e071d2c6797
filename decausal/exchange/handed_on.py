"""Names as others may read them: of a path on somebody's disk only the last part; ids on the hub as they are."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from decausal.data.sources import FILE_SUFFIX
from decausal.models.facts import ConversionFacts
from decausal.secrets import arguments_without_secrets

# Settings that hold text, in which a slash is a character like any other: `</s>` is no path.
_NO_PATHS = ("sampler", "mask_token", "chat_template_kwargs")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(name: object) -> bool:
    """Whether a source or data set is named as on the hub, not as a path."""
    text = str(name).partition(":")[0]
    is_name = _HUB_ID.fullmatch(text) is not None and not text.startswith(".")
    return is_name and FILE_SUFFIX.search(text) is None and not Path(text).exists()


def without_paths(value: Any) -> Any:
    """A value of a recipe, in which every path, in lists and tables too, is its last part.

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
    """A command's arguments as one line, without secrets, whose paths are their last parts."""
    words = []
    for argument in arguments_without_secrets(arguments):
        flag, is_joined, value = argument.rpartition("=")
        words.append(f"{flag}{is_joined}{without_paths(value)}")
    return shlex.join(words)


def facts_to_hand_on(facts: ConversionFacts) -> ConversionFacts:
    """The facts as an exported model carries them: where source and data lay on this machine is nobody's business."""
    names = ("source", "recipe", "earlier_stages")
    return replace(facts, **{name: without_paths(getattr(facts, name)) for name in names})


def _last_part(text: str) -> str:
    return text if "://" in text or is_hub_id(text) else PurePath(text).name
