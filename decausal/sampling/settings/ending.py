"""Settings for the length of a row and its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from decausal.errors import refuse_broken_text
from decausal.sampling.settings.field import COUNT, Flag, Rule, is_integer, setting


def _as_texts(stop: Any) -> Any:
    """Returns one text or a list of texts as a tuple. The rule refuses anything else."""
    if stop is None:
        return ()
    for text in [stop] if isinstance(stop, str) else stop if isinstance(stop, list | tuple) else ():
        if isinstance(text, str):
            refuse_broken_text(text, "stop")
    if isinstance(stop, str):
        return (stop,)
    return tuple(stop) if isinstance(stop, list) else stop


def _as_token_ids(ids: Any) -> Any:
    """Returns one id or a list of ids as a tuple. The rule refuses anything else."""
    if ids is None:
        return ()
    if is_integer(ids):
        return (int(ids),)
    return tuple(ids) if isinstance(ids, list) else ids


@dataclass(frozen=True, kw_only=True)
class EndingSettings:
    """What ends a row.

    Attributes:
        max_new_tokens: Open positions after a prompt.
        stop: One or several texts that end a row, which stops before them. They may hold special tokens.
        stop_token_ids: Tokens that end a row, which stops before them, apart from the model's own end tokens.
    """

    max_new_tokens: int = setting(128, COUNT, aliases=("gen_length",))  # verbs have their own flags for it
    stop: tuple[str, ...] = setting(
        (),
        Rule(
            lambda value: isinstance(value, tuple) and all(isinstance(text, str) and text for text in value),
            "a text that is not empty, or several",
        ),
        Flag("a text that ends a row; may be repeated", {"action": "append"}),
        settle=_as_texts,
    )
    stop_token_ids: tuple[int, ...] = setting(
        (),
        Rule(
            lambda value: isinstance(value, tuple) and all(is_integer(token) and token >= 0 for token in value),
            "a token id of at least 0, or several",
        ),
        Flag("a token that ends a row; may be repeated", {"type": int, "action": "append", "metavar": "ID"}),
        settle=_as_token_ids,
    )

    @property
    def has_stops(self) -> bool:
        """Whether texts or tokens end a row."""
        return bool(self.stop or self.stop_token_ids)
