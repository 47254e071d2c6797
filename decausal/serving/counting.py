"""The size of a request, found before anything is built from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decausal.sampling.filling.gaps import Piece
from decausal.serving.errors import ApiError, bad_request
from decausal.serving.reading import Work
from decausal.serving.schema import ChatBody, CompletionBody
from decausal.serving.settings import MAX_GAPS
from decausal.wording import quantity

CHARACTERS_PER_TOKEN = 8
"""A text with more characters than this per token of the longest row is counted piece by piece."""


def num_rows(body: CompletionBody | ChatBody) -> int:
    """Returns how many rows a request has: its prompts times `n`."""
    prompt = body.prompt if isinstance(body, CompletionBody) else None
    is_list = isinstance(prompt, list) and not isinstance(prompt[0], int)
    return (len(prompt) if is_list else 1) * (body.n or 1)


def num_characters(body: CompletionBody | ChatBody) -> int:
    """Returns the number of characters to be tokenised."""
    if isinstance(body, ChatBody):
        return sum(len(message.content) for message in body.messages)
    parts = body.decausal.parts if body.decausal and body.decausal.parts else []
    prompts = body.prompt if isinstance(body.prompt, list) else [body.prompt or ""]
    texts = [text for text in (*prompts, *parts) if isinstance(text, str)]
    return sum(map(len, texts)) + len(prompts) * len(body.suffix or "")


def refuse_long_text(tokenizer: Any, text: str, max_tokens: int, name: str, param: str, work: Work) -> None:
    """Refuses a text that fits into no row, before megabytes of it are tokenised.

    Raises:
        ApiError: 400.
    """
    size = CHARACTERS_PER_TOKEN * max_tokens
    if len(text) <= size:
        return
    count = 0
    for start in range(0, len(text), size):
        work.check()
        count += len(tokenizer(text[start : start + size], add_special_tokens=False, verbose=False)["input_ids"])
        # A cut may turn one token into a few, so the pieces never have fewer tokens than the text.
        if count - CHARACTERS_PER_TOKEN * (1 + start // size) > max_tokens:
            raise _too_long(name, param, f"more than {quantity(max_tokens, 'token')}", max_tokens)


def refuse_long_ids(ids: Sequence[int], max_tokens: int, name: str, param: str) -> None:
    """Refuses token ids that fit into no row.

    Raises:
        ApiError: 400.
    """
    if len(ids) > max_tokens:
        raise _too_long(name, param, quantity(len(ids), "token"), max_tokens)


def refuse_many_gaps(parts: Sequence[Piece]) -> None:
    """Refuses more gaps than one text may have.

    Raises:
        ApiError: 400.
    """
    num_gaps = sum(not isinstance(part, str) for part in parts)
    if num_gaps > MAX_GAPS:
        raise bad_request(
            f"the text has {num_gaps} gaps, and this server fills at most {MAX_GAPS} together: send it in parts",
            "decausal.parts",
        )


def _too_long(name: str, param: str, has: str, max_tokens: int) -> ApiError:
    message = f"{name} has {has}; this server takes rows of at most {max_tokens:,}: shorten it"
    return bad_request(message, param, "context_length_exceeded")
