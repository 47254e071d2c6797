"""How long a row becomes, and what ends it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from decausal.errors import refuse_broken_text
from decausal.sampling.settings.field import COUNT, Flag, Rule, is_integer, setting


def _as_texts(stop: Any) -> Any:
    """One text or a list of them as a tuple; anything else is left for the rule to refuse."""
    if stop is None:
        return ()
    for text in [stop] if isinstance(stop, str) else stop if isinstance(stop, list | tuple) else ():
        if isinstance(text, str):
            refuse_broken_text(text, "stop")
    if isinstance(stop, str):
        return (stop,)
    return tuple(stop) if isinstance(stop, list) else stop


def _as_token_ids(ids: Any) -> Any:
    """One id or a list of them as a tuple; anything else is left for the rule to refuse."""
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
        stop: Texts that end a row; the text stops before them. One string, or several. They may hold special tokens.
        stop_token_ids: Tokens that end a row, beside those that end the model's texts; the text stops before them.
    """

    max_new_tokens: int = setting(128, COUNT, aliases=("gen_length",))  # verbs have flags of their own for it
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
        """Texts or tokens end a row."""
        return bool(self.stop or self.stop_token_ids)
