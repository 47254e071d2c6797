"""From a checked body to rows for the engine."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from decausal.errors import UserError
from decausal.models.checkpoint import Converted
from decausal.sampling.defaults import settings_for
from decausal.sampling.generate import end_token_ids
from decausal.sampling.jobs import Job
from decausal.sampling.rows import Row, named, prompt_ids, text_ids
from decausal.sampling.settings import SamplerSettings
from decausal.serving.errors import bad_request
from decausal.serving.schema import ChatBody, CompletionBody, sampler_options


@dataclass(frozen=True)
class Plan:
    """What a request comes to.

    Attributes:
        kind: "text" or "chat".
        jobs: One for each choice of the answer, in its order.
        echoes: Text of the prompt that each choice repeats before its own; empty where it does not.
        num_prompt_tokens: Given tokens, each prompt counted once.
        num_top_log_probs: None: none are told.
        is_stream: Text comes as server-sent events.
        has_usage: The stream ends with counts.
        has_events: The stream tells of every denoising step.
    """

    kind: str
    jobs: list[Job]
    echoes: list[str]
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
    rows, texts = _completion_rows(body, converted, settings, max_total_tokens)
    echoes = texts if body.echo else [""] * len(rows)
    return _plan("text", body, converted, settings, rows, echoes, body.logprobs)


def chat_plan(body: ChatBody, converted: Converted, max_total_tokens: int) -> Plan:
    """Reads /v1/chat/completions: one prompt, made by the tokenizer's chat template.

    Raises:
        ApiError: 400: no template, a conversation that it refuses, or what the model cannot do.
    """
    settings = _settings(body, converted)
    if body.decausal and body.decausal.parts is not None:
        raise bad_request("'decausal.parts' has no place in a conversation: use /v1/completions", "decausal.parts")
    ids = text_ids(converted.tokenizer, _conversation(body, converted.tokenizer))
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    num_new = _num_new(len(ids), wanted, settings, max_total_tokens, "the conversation")
    row = Row((ids, []), (num_new,), "the conversation")
    num_top = (body.top_logprobs or 0) if body.logprobs else None
    return _plan("chat", body, converted, settings, [row], [""], num_top)


def _plan(
    kind: str,
    body: CompletionBody | ChatBody,
    converted: Converted,
    settings: SamplerSettings,
    rows: list[Row],
    echoes: list[str],
    num_top_log_probs: int | None,
) -> Plan:
    for row in rows:
        _refuse_unreadable(row, converted)
    ends = end_token_ids(converted)
    count = body.n or 1
    jobs = [
        Job(
            row=row,
            settings=settings,
            seed=settings.seed + index,
            end_token_ids=() if has_text_behind(row) else ends,
            is_watched=bool(body.decausal and body.decausal.events),
            num_top_log_probs=num_top_log_probs,
        )
        for index, row in enumerate(row for row in rows for _ in range(count))
    ]
    return Plan(
        kind=kind,
        jobs=jobs,
        echoes=[echo for echo in echoes for _ in range(count)],
        num_prompt_tokens=sum(len(ids) for row in rows for ids in row.given),
        num_top_log_probs=num_top_log_probs,
        is_stream=bool(body.stream),
        has_usage=bool(body.stream_options and body.stream_options.include_usage),
        has_events=bool(body.decausal and body.decausal.events),
    )


def has_text_behind(row: Row) -> bool:
    """Whether text stands behind a gap."""
    return len(row.gaps) > 1 or bool(row.given[-1])


def _settings(body: CompletionBody | ChatBody, converted: Converted) -> SamplerSettings:
    options = sampler_options(body)
    seed = body.seed if body.seed is not None else secrets.randbelow(2**31)
    try:
        defaults = settings_for(converted.facts)
        stop = {} if body.stop is None else {"stop": tuple(body.stop)}
        return defaults.updated(**options, **stop, seed=seed)
    except UserError as error:
        name = str(error).partition("=")[0]
        raise bad_request(str(error), name if name.isidentifier() else None, "invalid_value") from None


def _completion_rows(
    body: CompletionBody, converted: Converted, settings: SamplerSettings, max_total_tokens: int
) -> tuple[list[Row], list[str]]:
    parts = body.decausal.parts if body.decausal else None
    if parts is not None:
        if body.prompt is not None or body.suffix or body.max_tokens is not None:
            raise bad_request(
                "'decausal.parts' holds the whole text and the length of every gap: leave prompt, suffix and "
                "max_tokens out",
                "decausal.parts",
            )
        return [_row_of_parts(parts, converted, max_total_tokens)], [""]
    prompts = _prompts(body, converted)
    rows = []
    behind = text_ids(converted.tokenizer, body.suffix) if body.suffix else []
    for (ids, _), name in zip(prompts, named("prompt", prompts), strict=True):
        full_name = f"{name} with its suffix" if behind else name
        num_new = _num_new(len(ids) + len(behind), body.max_tokens, settings, max_total_tokens, full_name)
        rows.append(Row((ids, behind), (num_new,), full_name))
    return rows, [text for _, text in prompts]


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


def _row_of_parts(parts: Sequence[str | int], converted: Converted, max_total_tokens: int) -> Row:
    """Joins neighbouring texts and neighbouring gaps: a row has text and gaps in turn."""
    texts, gaps = [""], []
    for part in parts:
        if isinstance(part, str):
            if len(texts) == len(gaps):
                texts.append("")
            texts[-1] += part
        elif len(gaps) == len(texts):
            gaps[-1] += part
        else:
            gaps.append(part)
    texts += [""] * (len(gaps) + 1 - len(texts))
    first = _accepted(lambda: prompt_ids(converted, texts[0]))
    given = (first, *(text_ids(converted.tokenizer, text) for text in texts[1:]))
    _num_new(sum(map(len, given)), sum(gaps), SamplerSettings(), max_total_tokens, "the text")
    return Row(given, tuple(gaps), "the text")


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


def _conversation(body: ChatBody, tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        raise bad_request("this model's tokenizer has no chat template: use /v1/completions", "messages")
    messages = [
        {"role": "system" if message.role == "developer" else message.role, "content": message.content}
        for message in body.messages
    ]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise bad_request(f"the chat template refuses this conversation: {error}", "messages") from None


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
