"""From the texts in a body to texts with gaps, as ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decausal.errors import UserError
from decausal.models.checkpoint import Converted
from decausal.sampling.filling.gaps import Piece, split_gaps
from decausal.sampling.filling.lengths import GappedText
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.texts import ids_after, named, prompt_ids
from decausal.serving.counting import Work, refuse_long_ids, refuse_long_text, refuse_many_gaps
from decausal.serving.errors import bad_request
from decausal.serving.schema import CompletionBody
from decausal.serving.settings import MAX_UNKNOWN_GAPS
from decausal.wording import quantity


def completion_texts(
    body: CompletionBody, converted: Converted, settings: SamplerSettings, max_total_tokens: int, work: Work
) -> tuple[list[GappedText], list[str]]:
    """Returns a completion's texts with gaps, and the prompts that they come from.

    Raises:
        ApiError: 400. A text cannot be read or is too long.
    """
    parts = body.decausal.parts if body.decausal else None
    if parts is not None:
        if body.echo:
            raise bad_request("'echo' repeats a prompt, and decausal.parts is not a prompt: leave it out", "echo")
        if body.prompt is not None or body.suffix or body.max_tokens is not None:
            raise bad_request(
                "'decausal.parts' holds the whole text and the length of every gap: leave prompt, suffix and "
                "max_tokens out",
                "decausal.parts",
            )
        return [_text_of_parts(parts, converted, settings, max_total_tokens, work)], [""]
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("'max_tokens' must be at least 1; 0 goes with echo alone", "max_tokens", "invalid_value")
    prompts = _prompts(body, converted, max_total_tokens, work)
    texts, after = [], []
    if body.suffix:
        refuse_long_text(converted.tokenizer, body.suffix, max_total_tokens, "the suffix", "suffix", work)
        after = ids_after(converted.tokenizer, body.suffix)
    wanted = 1 if body.max_tokens == 0 else body.max_tokens  # a row has a gap, even if it is not written
    is_unknown = bool(after) and body.max_tokens is None
    is_text = isinstance(body.prompt, str) or isinstance(body.prompt[0], str)
    for (ids, prompt), name in zip(prompts, named("prompt", prompts), strict=True):
        work.check()
        full_name = f"{name} with its suffix" if after else name
        length = num_new(len(ids) + len(after), wanted, settings, max_total_tokens, full_name)
        lengths = (None if is_unknown else length,)
        if after and is_text:  # ids stay as they were sent
            texts.append(GappedText.of(converted, [prompt, body.suffix], lengths, full_name, settings.seed))
        else:
            texts.append(GappedText((ids, after), lengths, full_name, settings.seed))
    return texts, [text for _, text in prompts]


def _prompts(
    body: CompletionBody, converted: Converted, max_total_tokens: int, work: Work
) -> list[tuple[list[int], str]]:
    """Returns the ids of each prompt and its text. Ids are only decoded for an echo."""
    prompt: Any = body.prompt
    if prompt is None:
        raise bad_request("'prompt' is missing: a string, or a list of them", "prompt", "missing_field")
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]
    found = []
    for each, name in zip(prompt, named("prompt", prompt), strict=True):
        work.check()
        if isinstance(each, str):
            refuse_long_text(converted.tokenizer, each, max_total_tokens, name, "prompt", work)
            found.append((accepted(lambda text=each: prompt_ids(converted, text)), each))
            continue
        refuse_long_ids(each, max_total_tokens, name, "prompt")
        vocab_size = converted.model.config.get_text_config().vocab_size
        if max(each) >= vocab_size:
            raise bad_request(f"token id {max(each)} is outside the vocabulary of {vocab_size}", "prompt")
        text = converted.tokenizer.decode(each, skip_special_tokens=True) if body.echo else ""
        found.append((each, text))
    return found


def _text_of_parts(
    parts: Sequence[Piece], converted: Converted, settings: SamplerSettings, max_total_tokens: int, work: Work
) -> GappedText:
    """Joins neighbouring gaps of known lengths."""
    pieces: list[Piece] = []
    for part in parts:
        if type(part) is int and pieces and type(pieces[-1]) is int:
            pieces[-1] += part
        elif part != "":
            pieces.append(part)
    refuse_many_gaps(pieces)
    given, lengths = accepted(lambda: split_gaps(pieces, "the text"), "decausal.parts")
    for piece in given:
        work.check()
        refuse_long_text(converted.tokenizer, piece, max_total_tokens, "the text", "prompt", work)
    if lengths[-1] is None and not given[-1]:
        raise bad_request(
            "the text ends with a gap of unknown length, and nothing after it shows where it ends: give its length",
            "decausal.parts",
        )
    if lengths.count(None) > MAX_UNKNOWN_GAPS:
        raise bad_request(
            f"the text has {lengths.count(None)} gaps of unknown length, and this server searches at most "
            f"{MAX_UNKNOWN_GAPS}: give the lengths of some",
            "decausal.parts",
        )
    text = accepted(lambda: GappedText.of(converted, given, lengths, "the text", settings.seed))
    num_new(sum(map(len, text.given)), sum(text.started(1)), settings, max_total_tokens, "the text")
    return text


def num_new(
    num_given: int,
    wanted: int | None,
    settings: SamplerSettings,
    max_total_tokens: int,
    name: str,
    fields: tuple[str, str] = ("prompt", "max_tokens"),
) -> int:
    """Returns how many tokens are to be written.

    Args:
        num_given: Tokens of the text.
        wanted: How many were asked for.
        settings: They hold the number without a wish.
        max_total_tokens: Longest row.
        name: The text in errors.
        fields: Where the client wrote the text and `wanted`.

    Raises:
        ApiError: 400. There is no room for them.
    """
    room = max_total_tokens - num_given
    num_new = min(settings.max_new_tokens, room) if wanted is None else wanted
    if room < 1 or num_new > room:
        more = f" and {wanted:,} are to be written" if wanted is not None else ""
        todo = f"write at most {room:,}, or shorten it" if room >= 1 else "shorten it"
        raise bad_request(
            f"{name} has {quantity(num_given, 'token')}{more}; this server takes rows of at most "
            f"{max_total_tokens:,}: {todo}",
            fields[0] if room < 1 else fields[1],
            "context_length_exceeded",
        )
    return num_new


def accepted(make: Any, param: str | None = "prompt") -> Any:
    """Returns a function's result. Its UserError becomes an error of that field."""
    try:
        return make()
    except UserError as error:
        raise bad_request(str(error), param) from None
