"""From a checked body to jobs for the engine."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from decausal.data.encode import SpecialTokens
from decausal.errors import UserError
from decausal.models.checkpoint import Converted
from decausal.sampling.filling.infilling import MAX_GAP
from decausal.sampling.filling.lengths import SEARCHES, GappedText
from decausal.sampling.filling.searching import SearchJob
from decausal.sampling.jobs import Job
from decausal.sampling.rows import Row
from decausal.sampling.settings import ALIASES, NUM_SEEDS, SamplerSettings
from decausal.sampling.settings.of_model import refuse_for, settings_for
from decausal.sampling.stopping import end_token_ids, refuse_stop_token_ids
from decausal.sampling.texts import text_ids
from decausal.serving.counting import Work, refuse_long_text
from decausal.serving.errors import bad_request
from decausal.serving.rendering import conversation_text
from decausal.serving.schema import ChatBody, CompletionBody, Extension, sampler_options
from decausal.serving.texts import accepted, completion_texts, num_new


@dataclass(frozen=True)
class Plan:
    """What a request asks for, as jobs.

    Attributes:
        kind: "text" or "chat".
        jobs: One job for each choice of the answer, in order.
        echoes: Text of the prompt that each choice repeats before its own; empty if it does not.
        scored: For each choice, ids of the prompt whose log-probabilities are reported with the echo, and how many of
            them were put before its text; empty if none are.
        is_echo_only: Whether nothing is written.
        num_prompt_tokens: Given tokens. Each prompt counts once.
        num_top_log_probs: Alternatives to report for each token. None: no log-probabilities.
        is_stream: Whether text is sent as server-sent events.
        has_usage: Whether the stream ends with counts.
        has_events: Whether the stream reports every denoising step.
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


def completion_plan(body: CompletionBody, converted: Converted, max_total_tokens: int, work: Work) -> Plan:
    """Reads /v1/completions: prompts, or a gap before a suffix, or gaps anywhere.

    Raises:
        ApiError: 400. The model cannot do this; the error says why.
    """
    settings = _settings(body, converted)
    texts, prompts = completion_texts(body, converted, settings, max_total_tokens, work)
    echoes = prompts if body.echo else [""] * len(texts)
    plan = _plan("text", body, converted, settings, texts, echoes, body.logprobs, max_total_tokens)
    if not body.echo:
        return plan
    scored = [] if body.logprobs is None else _scored(body, converted, texts, prompts)
    return replace(plan, scored=scored, is_echo_only=body.max_tokens == 0)


def chat_plan(body: ChatBody, converted: Converted, max_total_tokens: int, work: Work) -> Plan:
    """Reads /v1/chat/completions: one prompt, made by the tokenizer's chat template.

    Raises:
        ApiError: 400. There is no template, it refuses the conversation, or the model cannot do this.
    """
    settings = _settings(body, converted)
    if body.decausal and body.decausal.parts is not None:
        raise bad_request("'decausal.parts' is not for conversations: use /v1/completions", "decausal.parts")
    text = conversation_text(body, converted.tokenizer)
    work.check()
    refuse_long_text(converted.tokenizer, text, max_total_tokens, "the conversation", "messages", work)
    ids = text_ids(converted.tokenizer, text)
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    length = num_new(len(ids), wanted, settings, max_total_tokens, "the conversation", ("messages", field))
    gapped = GappedText((ids, []), (length,), "the conversation", settings.seed)
    num_top = (body.top_logprobs or 0) if body.logprobs else None
    return _plan("chat", body, converted, settings, [gapped], [""], num_top, max_total_tokens)


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
            _refuse_unreadable(row, converted, "prompt" if kind == "text" else "messages")
        common = {
            "row": row,
            "settings": settings,
            "seed": (settings.seed + index) % NUM_SEEDS,
            "end_token_ids": () if has_text_after(row) else ends,
            "is_watched": extension.events,
            "num_top_log_probs": num_top_log_probs,
        }
        search = extension.length_search or SEARCHES[0]
        jobs.append(
            SearchJob(**common, text=text, longest=longest, length_search=search) if text.unknown else Job(**common)
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
    if converted.facts.layout != "causal" and not converted.facts.only_drafts:
        raise bad_request(
            "'echo' with 'logprobs' asks how probable each token of the prompt is after those before it, which a model "
            f"of layout '{converted.facts.layout}' does not define: ask the model that it was made from (decausal "
            "serve --with_source), or leave one of them out",
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


def has_text_after(row: Row) -> bool:
    """Returns whether text follows a gap."""
    return len(row.gaps) > 1 or bool(row.given[-1])


def _settings(body: CompletionBody | ChatBody, converted: Converted) -> SamplerSettings:
    options = sampler_options(body)
    seed = secrets.randbelow(2**31) if body.seed is None else body.seed
    try:
        defaults = settings_for(converted.facts)
        stop = {} if body.stop is None else {"stop": tuple(body.stop)}
        settings = defaults.updated(**options, **stop, seed=seed)
        refuse_for(converted.facts, settings)
    except UserError as error:
        raise bad_request(str(error), _setting_in(str(error), options), "invalid_value") from None
    accepted(lambda: refuse_stop_token_ids(settings, converted), "stop_token_ids")
    return settings


def _setting_in(message: str, options: Iterable[str]) -> str | None:
    """Returns which of the settings in a body an error names first."""
    given = {ALIASES.get(name, name) for name in options}
    return next((word for word in re.findall(r"\w+", message) if word in given), None)


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


def _refuse_unreadable(row: Row, converted: Converted, field: str) -> None:
    layout = converted.facts.layout
    if layout != "bidirectional" and has_text_after(row):
        raise bad_request(
            f"this model has layout '{layout}': a gap cannot see the text after it; a suffix needs layout "
            "'bidirectional'",
            "suffix",
            "unsupported_field",
        )
    accepted(lambda: row.check(converted), field)
