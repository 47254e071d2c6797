"""What ends a row: end tokens, and the first stop text or stop token in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from decausal.errors import UserError
from decausal.models.checkpoint import Converted
from decausal.sampling.borders import Border
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.texts import text_after

_special_ids: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()


def end_token_ids(converted: Converted) -> tuple[int, ...]:
    """Returns the tokenizer's EOS, then the other end tokens of the model's generation settings and facts."""
    generation_config = getattr(converted.model, "generation_config", None)
    listed = getattr(generation_config, "eos_token_id", None)
    ends = [converted.tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
    ends += converted.facts.end_token_ids
    return tuple(dict.fromkeys(end for end in ends if end is not None))


def tokens_to_stop(
    tokenizer: Any, before: Sequence[int], new: Sequence[int], num_searched: int, settings: SamplerSettings
) -> int | None:
    """Returns the fewest new tokens that hold one of the settings' stops, or None.

    Args:
        tokenizer: Decodes ids.
        before: Ids before the new ones, which are not part of a match.
        new: Ids of the new text.
        num_searched: How many of them have been searched already.
        settings: Settings with `stop` and `stop_token_ids`.
    """
    at_token = next((i + 1 for i in range(num_searched, len(new)) if new[i] in settings.stop_token_ids), None)
    at_text = _tokens_to_text(tokenizer, before, new[:at_token], num_searched, settings.stop) if settings.stop else None
    return at_token if at_text is None else at_text


def text_before_stop(
    tokenizer: Any, before: Sequence[int], new: Sequence[int], settings: SamplerSettings, border: Border | None = None
) -> str:
    """Returns the text of new ids up to where the first of the settings' stops begins.

    Args:
        tokenizer: Decodes ids.
        before: Ids before the new ones.
        new: Ids of the new text.
        settings: Settings with `stop` and `stop_token_ids`.
        border: Given characters inside the new tokens, which are left out of the text.
    """
    border, new = border or Border(), list(new)
    found = [(i, "") for i, token in enumerate(new) if token in settings.stop_token_ids][:1]
    for marked in _marked(tokenizer, settings.stop):
        place = _place_of(tokenizer, before, new, marked)
        found += [] if place is None else [(place, marked.before)]
    texts = [text_after(tokenizer, list(before), new).removeprefix(border.start)]
    for place, ending in found:
        text = text_after(tokenizer, list(before), new[:place])
        texts.append(text.removeprefix(border.start).removesuffix(ending))
    shown = cut_at_stop(min(texts, key=len), settings.stop)
    return shown if len(shown) < len(texts[0]) else shown.removesuffix(border.end)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Returns the text before the first of `stop` in it."""
    places = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(places)] if places else text


def is_stop_token(tokenizer: Any, token: int, settings: SamplerSettings) -> bool:
    """Returns whether a token by itself ends a row and is not part of its text."""
    return token in settings.stop_token_ids or any(
        marked == _Marked("", token, "") for marked in _marked(tokenizer, settings.stop)
    )


def refuse_stop_token_ids(settings: SamplerSettings, converted: Converted) -> None:
    """Refuses ids that are never written: those outside the vocabulary, and the mask token's.

    Raises:
        UserError: Names the first one.
    """
    vocab_size = converted.model.config.get_text_config().vocab_size
    for token in settings.stop_token_ids:
        if token >= vocab_size:
            raise UserError(f"stop_token_ids holds {token}, and the vocabulary has {vocab_size} tokens: correct it")
        if token == converted.facts.mask_token_id:
            raise UserError(f"stop_token_ids holds {token}, the mask token, which is never written: leave it out")


class _Marked(NamedTuple):
    """A stop text with a special token, which decoding leaves out: the text before it, its id, the text after it."""

    before: str
    token: int
    after: str


def _tokens_to_text(
    tokenizer: Any, before: Sequence[int], new: Sequence[int], num_searched: int, stop: Sequence[str]
) -> int | None:
    # A text of n bytes spans at most n tokens with any of its bytes. A few more, since some tokens decode to nothing.
    reach = max(len(text.encode()) for text in stop) + 8
    first = max(0, num_searched - reach)
    anchor = [*before[-1:], *new[:first]][-1:]
    marked = _marked(tokenizer, stop)

    def holds(count: int) -> bool:
        ids = list(new[first:count])
        text = text_after(tokenizer, anchor, ids)
        return any(wanted in text for wanted in stop) or any(
            _place_of(tokenizer, anchor, ids, wanted) is not None for wanted in marked
        )

    if len(new) <= num_searched or not holds(len(new)):
        return None
    return next(count for count in range(num_searched + 1, len(new) + 1) if holds(count))


def _marked(tokenizer: Any, stop: Sequence[str]) -> list[_Marked]:
    """Returns the stop texts with special tokens, split at the first one in each."""
    found = []
    for text in stop:
        places = [(text.find(name), -len(name), name) for name in _special(tokenizer) if name in text]
        if places:
            name = min(places)[2]
            before, _, after = text.partition(name)
            found.append(_Marked(before, _special(tokenizer)[name], after))
    return found


def _special(tokenizer: Any) -> dict[str, int]:
    """Returns the ids of tokens that decoding leaves out, by their text."""
    if tokenizer not in _special_ids:
        tokens = tokenizer.added_tokens_decoder.items()
        _special_ids[tokenizer] = {token.content: number for number, token in tokens if token.special}
    return _special_ids[tokenizer]


def _place_of(tokenizer: Any, before: Sequence[int], new: list[int], marked: _Marked) -> int | None:
    """Returns where the special token of a stop text occurs with the rest of that text around it."""
    for place, token in enumerate(new):
        if token != marked.token:
            continue
        if marked.before and not text_after(tokenizer, list(before), new[:place]).endswith(marked.before):
            continue
        here, whole = (tokenizer.decode(ids) for ids in ([token], new[place:]))
        if whole.removeprefix(here).startswith(marked.after):
            return place
    return None
