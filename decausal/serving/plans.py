"""From a checked body to rows for the engine."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from decausal.data.encode import SpecialTokens
from decausal.errors import UserError
from decausal.models.checkpoint import Converted
from decausal.sampling.defaults import settings_for
from decausal.sampling.filling.gaps import Piece, split_gaps
from decausal.sampling.filling.infilling import MAX_GAP
from decausal.sampling.filling.lengths import SEARCHES, GappedText
from decausal.sampling.filling.searching import SearchJob
from decausal.sampling.generate import end_token_ids
from decausal.sampling.jobs import Job
from decausal.sampling.rows import Row, ids_behind, named, prompt_ids, text_ids
from decausal.sampling.settings import NUM_SEEDS, SamplerSettings
from decausal.sampling.stopping import refuse_stop_token_ids
from decausal.serving.errors import bad_request
from decausal.serving.rendering import conversation_text
from decausal.serving.schema import ChatBody, CompletionBody, Extension, sampler_options
from decausal.serving.settings import MAX_UNKNOWN_GAPS


@dataclass(frozen=True)
class Plan:
    """What a request comes to.

    Attributes:
        kind: "text" or "chat".
        jobs: One for each choice of the answer, in its order.
        echoes: Text of the prompt that each choice repeats before its own; empty where it does not.
        scored: For each choice, ids of the prompt whose log-probabilities are told with the echo, and how many of them
            were put before its text; empty where none are.
        is_echo_only: Nothing is written.
        num_prompt_tokens: Given tokens, each prompt counted once.
        num_top_log_probs: None: none are told.
        is_stream: Text comes as server-sent events.
        has_usage: The stream ends with counts.
        has_events: The stream tells of every denoising step.
    """

    kind: str
    jobs: list[Job]
    echoes: list[str]
    scored: list[tuple[list[int], int]]
    is_echo_only: bool
    num_prompt_tokens: int
    num_top_log_probs: int | None
    is_stream: bool
    has_usage: bool
    has_events: bool


def completion_plan(body: CompletionBody, converted: Converted, max_total_tokens: int) -> Plan:
    """Reads /v1/completions: prompts, or a gap before a suffix, or gaps anywhere.

    Raises:
        ApiError: 400: what the model cannot do, and why.
    """
    settings = _settings(body, converted)
    texts, prompts = _completion_texts(body, converted, settings, max_total_tokens)
    echoes = prompts if body.echo else [""] * len(texts)
    plan = _plan("text", body, converted, settings, texts, echoes, body.logprobs, max_total_tokens)
    if not body.echo:
        return plan
    scored = [] if body.logprobs is None else _scored(body, converted, texts, prompts)
    return replace(plan, scored=scored, is_echo_only=body.max_tokens == 0)


def chat_plan(body: ChatBody, converted: Converted, max_total_tokens: int) -> Plan:
    """Reads /v1/chat/completions: one prompt, made by the tokenizer's chat template.

    Raises:
        ApiError: 400: no template, a conversation that it refuses, or what the model cannot do.
    """
    settings = _settings(body, converted)
    if body.decausal and body.decausal.parts is not None:
        raise bad_request("'decausal.parts' has no place in a conversation: use /v1/completions", "decausal.parts")
    ids = text_ids(converted.tokenizer, conversation_text(body, converted.tokenizer))
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    num_new = _num_new(len(ids), wanted, settings, max_total_tokens, "the conversation")
    text = GappedText((ids, []), (num_new,), "the conversation", settings.seed)
    num_top = (body.top_logprobs or 0) if body.logprobs else None
    return _plan("chat", body, converted, settings, [text], [""], num_top, max_total_tokens)


def _plan(
    kind: str,
    body: CompletionBody | ChatBody,
    converted: Converted,
    settings: SamplerSettings,
    texts: list[GappedText],
    echoes: list[str],
    num_top_log_probs: int | None,
    max_total_tokens: int,
) -> Plan:
    extension = body.decausal or Extension()
    _refuse_idle_search(extension, texts)
    ends = end_token_ids(converted)
    count = body.n or 1
    jobs = []
    for index, text in enumerate(text for text in texts for _ in range(count)):
        longest = text.longest(extension.max_gap or MAX_GAP, max_total_tokens)
        row = text.row(text.started(longest))
        if index % count == 0:
            _refuse_unreadable(row, converted)
        told = {
            "row": row,
            "settings": settings,
            "seed": (settings.seed + index) % NUM_SEEDS,
            "end_token_ids": () if has_text_behind(row) else ends,
            "is_watched": extension.events,
            "num_top_log_probs": num_top_log_probs,
        }
        search = extension.length_search or SEARCHES[0]
        jobs.append(
            SearchJob(**told, text=text, longest=longest, length_search=search) if text.unknown else Job(**told)
        )
    return Plan(
        kind=kind,
        jobs=jobs,
        echoes=[echo for echo in echoes for _ in range(count)],
        scored=[],
        is_echo_only=False,
        num_prompt_tokens=sum(len(ids) for text in texts for ids in text.given),
        num_top_log_probs=num_top_log_probs,
        is_stream=bool(body.stream),
        has_usage=bool(body.stream_options and body.stream_options.include_usage),
        has_events=extension.events,
    )


def _scored(
    body: CompletionBody, converted: Converted, texts: Sequence[GappedText], prompts: Sequence[str]
) -> list[tuple[list[int], int]]:
    if converted.facts.layout != "causal":
        raise bad_request(
            "'echo' with 'logprobs' asks how probable each token of the prompt is after those before it, which a model "
            f"of layout '{converted.facts.layout}' does not say: ask the one that it was made from (decausal serve "
            "--with_source), or leave one of them out",
            "echo",
            "unsupported_field",
        )
    is_text = isinstance(body.prompt, str) or isinstance(body.prompt[0], str)
    num_before = len(SpecialTokens(converted.tokenizer).prefix) if is_text else 0
    return [
        (text.given[0], num_before if prompt else len(text.given[0]) * is_text)
        for text, prompt in zip(texts, prompts, strict=True)
        for _ in range(body.n or 1)
    ]


def has_text_behind(row: Row) -> bool:
    """Whether text stands behind a gap."""
    return len(row.gaps) > 1 or bool(row.given[-1])


def _settings(body: CompletionBody | ChatBody, converted: Converted) -> SamplerSettings:
    options = sampler_options(body)
    seed = secrets.randbelow(2**31) if body.seed is None else body.seed
    try:
        defaults = settings_for(converted.facts)
        stop = {} if body.stop is None else {"stop": tuple(body.stop)}
        settings = defaults.updated(**options, **stop, seed=seed)
    except UserError as error:
        name = str(error).partition("=")[0]
        raise bad_request(str(error), name if name.isidentifier() else None, "invalid_value") from None
    vocab_size = converted.model.config.get_text_config().vocab_size
    _accepted(lambda: refuse_stop_token_ids(settings, vocab_size), "stop_token_ids")
    return settings


def _completion_texts(
    body: CompletionBody, converted: Converted, settings: SamplerSettings, max_total_tokens: int
) -> tuple[list[GappedText], list[str]]:
    parts = body.decausal.parts if body.decausal else None
    if parts is not None:
        if body.echo:
            raise bad_request("'echo' repeats a prompt, and decausal.parts is none: leave it out", "echo")
        if body.prompt is not None or body.suffix or body.max_tokens is not None:
            raise bad_request(
                "'decausal.parts' holds the whole text and the length of every gap: leave prompt, suffix and "
                "max_tokens out",
                "decausal.parts",
            )
        return [_text_of_parts(parts, converted, settings, max_total_tokens)], [""]
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("'max_tokens' must be at least 1; 0 goes with echo alone", "max_tokens", "invalid_value")
    prompts = _prompts(body, converted)
    texts = []
    behind = ids_behind(converted.tokenizer, body.suffix) if body.suffix else []
    wanted = 1 if body.max_tokens == 0 else body.max_tokens  # a row has a gap, whether or not it is written
    is_unknown = bool(behind) and body.max_tokens is None
    is_text = isinstance(body.prompt, str) or isinstance(body.prompt[0], str)
    for (ids, prompt), name in zip(prompts, named("prompt", prompts), strict=True):
        full_name = f"{name} with its suffix" if behind else name
        num_new = _num_new(len(ids) + len(behind), wanted, settings, max_total_tokens, full_name)
        lengths = (None if is_unknown else num_new,)
        if behind and is_text:  # ids stay as they were sent
            texts.append(GappedText.of(converted, [prompt, body.suffix], lengths, full_name, settings.seed))
        else:
            texts.append(GappedText((ids, behind), lengths, full_name, settings.seed))
    return texts, [text for _, text in prompts]


def _prompts(body: CompletionBody, converted: Converted) -> list[tuple[list[int], str]]:
    """Returns the ids of each prompt, and its text."""
    prompt: Any = body.prompt
    if prompt is None:
        raise bad_request("'prompt' is missing: a string, or a list of them", "prompt", "missing_field")
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]
    found = []
    for each in prompt:
        if isinstance(each, str):
            found.append((_accepted(lambda text=each: prompt_ids(converted, text)), each))
            continue
        vocab_size = converted.model.config.get_text_config().vocab_size
        if max(each) >= vocab_size:
            raise bad_request(f"token id {max(each)} is outside the vocabulary of {vocab_size}", "prompt")
        found.append((each, converted.tokenizer.decode(each, skip_special_tokens=True)))
    return found


def _text_of_parts(
    parts: Sequence[Piece], converted: Converted, settings: SamplerSettings, max_total_tokens: int
) -> GappedText:
    """Neighbouring gaps of known lengths are one."""
    pieces: list[Piece] = []
    for part in parts:
        if type(part) is int and pieces and type(pieces[-1]) is int:
            pieces[-1] += part
        elif part != "":
            pieces.append(part)
    given, lengths = _accepted(lambda: split_gaps(pieces, "the text"), "decausal.parts")
    if lengths[-1] is None and not given[-1]:
        raise bad_request(
            "the text ends with a gap of unknown length, and nothing behind it tells where it ends: give its length",
            "decausal.parts",
        )
    if lengths.count(None) > MAX_UNKNOWN_GAPS:
        raise bad_request(
            f"the text has {lengths.count(None)} gaps of unknown length, and this server searches at most "
            f"{MAX_UNKNOWN_GAPS}: give the lengths of some",
            "decausal.parts",
        )
    text = _accepted(lambda: GappedText.of(converted, given, lengths, "the text", settings.seed))
    _num_new(sum(map(len, text.given)), sum(text.started(1)), settings, max_total_tokens, "the text")
    return text


def _refuse_idle_search(extension: Extension, texts: Sequence[GappedText]) -> None:
    if any(text.unknown for text in texts):
        return
    for name in ("max_gap", "length_search"):
        if getattr(extension, name) is not None:
            raise bad_request(
                f"'decausal.{name}' is for gaps of unknown length, and there is none: leave it out, leave max_tokens "
                "out beside a suffix, or write null for a gap's length in decausal.parts",
                f"decausal.{name}",
            )


def _num_new(num_given: int, wanted: int | None, settings: SamplerSettings, max_total_tokens: int, name: str) -> int:
    room = max_total_tokens - num_given
    num_new = min(settings.max_new_tokens, room) if wanted is None else wanted
    if room < 1 or num_new > room:
        more = f" and {wanted} are to be written" if wanted is not None else ""
        todo = f"write at most {room}, or shorten it" if room >= 1 else "shorten it"
        raise bad_request(
            f"{name} has {num_given} tokens{more}; this server takes rows of at most {max_total_tokens}: {todo}",
            "prompt" if room < 1 else "max_tokens",
            "context_length_exceeded",
        )
    return num_new


def _refuse_unreadable(row: Row, converted: Converted) -> None:
    layout = converted.facts.layout
    if layout != "bidirectional" and has_text_behind(row):
        raise bad_request(
            f"this model has layout '{layout}': a gap cannot see the text behind it; a suffix needs layout "
            "'bidirectional'",
            "suffix",
            "unsupported_field",
        )
    _accepted(lambda: row.check(converted), "prompt")


def _accepted(make: Any, param: str | None = "prompt") -> Any:
    try:
        return make()
    except UserError as error:
        raise bad_request(str(error), param) from None
