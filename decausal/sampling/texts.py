"""From text to ids and back: how a row begins, and how new tokens read after earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decausal.data.encode import SpecialTokens
from decausal.data.template import render
from decausal.errors import UserError, refuse_broken_text
from decausal.models.checkpoint import Converted


def prompt_ids(converted: Converted, text: str, chat: bool = False) -> list[int]:
    """Returns the ids that begin a row; an empty text starts from the tokenizer's BOS or EOS token.

    Raises:
        UserError: Chat without a template, half a surrogate pair, or no start token under shift 1.
    """
    refuse_broken_text(text, "the prompt")
    tokenizer = converted.tokenizer
    if chat:
        if not tokenizer.chat_template:
            raise UserError("chat=True needs a chat template, and this model's tokenizer has none: leave chat out")
        message = [{"role": "user", "content": text}]
        text = render(message, tokenizer, "the prompt", add_generation_prompt=True)
    # As in training: with what the tokenizer puts before a text, never what it puts after one.
    before = [] if chat else SpecialTokens(tokenizer).prefix
    ids = [*before, *text_ids(tokenizer, text)]
    if ids:
        return ids
    for start in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if start is not None:
            return [start]
    if converted.facts.shift == 0:
        return []
    raise UserError(
        "the prompt is empty and this model's tokenizer has neither a BOS nor an EOS token to start from: "
        "with shift 1 the first token cannot be predicted, so give some text"
    )


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Returns the ids of a text, without what the tokenizer puts around a document.

    Raises:
        UserError: The text holds half a surrogate pair.
    """
    refuse_broken_text(text, "the text")
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def ids_after(tokenizer: Any, text: str) -> list[int]:
    """Returns the ids of a text that follows other text. Some tokenizers put a space before everything."""
    ids = text_ids(tokenizer, text)
    anchor = text_ids(tokenizer, "\n")
    if not ids or text_ids(tokenizer, "\na")[len(anchor) :] == text_ids(tokenizer, "a"):
        return ids
    anchored = text_ids(tokenizer, "\n" + text)
    return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else ids


def text_after(tokenizer: Any, before: list[int], new: list[int]) -> str:
    """Decodes `new` as it reads after `before`. Some tokenizers drop the space before a text's first word."""
    whole = tokenizer.decode(before + new, skip_special_tokens=True)
    start = tokenizer.decode(before, skip_special_tokens=True)
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode(new, skip_special_tokens=True)


def named(noun: str, texts: Sequence[Any]) -> list[str]:
    """Names texts for error messages: "the prompt", or "prompt 3" of several, counted from 1."""
    return [f"the {noun}"] if len(texts) == 1 else [f"{noun} {number}" for number in range(1, len(texts) + 1)]
