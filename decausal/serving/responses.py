"""Answers as OpenAI's clients read them: whole, or as chunks of a stream."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from decausal.sampling.jobs import Drafts
from decausal.serving.choices import Choice, Delta, TokenLogProb
from decausal.serving.plans import Plan

DONE = "data: [DONE]\n\n"


def whole(
    plan: Plan, header: dict[str, Any], choices: Sequence[Choice], deltas: Sequence[list[Delta]]
) -> dict[str, Any]:
    """Returns the answer in one piece.

    Args:
        plan: What was asked for.
        header: The fields id, created and model.
        choices: All choices, which have ended.
        deltas: The deltas of each choice, in order.
    """
    kind = "text_completion" if plan.kind == "text" else "chat.completion"
    bodies = [_whole_choice(plan, choice, found) for choice, found in zip(choices, deltas, strict=True)]
    return {**header, "object": kind, "choices": bodies, "usage": usage(plan, choices), "decausal": totals(choices)}


def chunk(
    plan: Plan, header: dict[str, Any], choice: Choice, delta: Delta, is_first: bool = False
) -> dict[str, Any] | None:
    """Returns one piece of a stream, or None if a step brought nothing visible and no event is reported."""
    if not (delta.text or delta.log_probs or delta.finish_reason or delta.event or is_first):
        return None
    body: dict[str, Any] = {"index": choice.index, "logprobs": None, "finish_reason": delta.finish_reason}
    if plan.kind == "text":
        body["text"] = delta.text
    else:
        body["delta"] = {"role": "assistant", "content": delta.text} if is_first else {"content": delta.text}
        if delta.finish_reason and not delta.text:
            body["delta"] = {}
    if plan.num_top_log_probs is not None:
        body["logprobs"] = log_probs(plan, delta.log_probs)
    if choice.ended is not None:
        body["decausal"] = facts(choice)
    kind = "text_completion" if plan.kind == "text" else "chat.completion.chunk"
    found = {**header, "object": kind, "choices": [body]}
    if plan.has_usage:
        found["usage"] = None
    return found | ({"decausal": delta.event} if delta.event else {})


def usage_chunk(plan: Plan, header: dict[str, Any], choices: Sequence[Choice]) -> dict[str, Any]:
    """Returns the last piece of a stream, which only holds counts."""
    kind = "text_completion" if plan.kind == "text" else "chat.completion.chunk"
    return {**header, "object": kind, "choices": [], "usage": usage(plan, choices), "decausal": totals(choices)}


def usage(plan: Plan, choices: Sequence[Choice]) -> dict[str, int]:
    """Returns counts of tokens."""
    written = sum(len(choice.ended.ids) for choice in choices if choice.ended)
    given = plan.num_prompt_tokens
    return {"prompt_tokens": given, "completion_tokens": written, "total_tokens": given + written}


def totals(choices: Sequence[Choice]) -> dict[str, Any]:
    """Returns the total cost of the choices."""
    ended = [choice.ended for choice in choices if choice.ended]
    passes = sum(row.num_forwards for row in ended)
    written = sum(len(row.ids) for row in ended)
    found = {"num_forwards": passes, "tokens_per_forward": round(written / max(1, passes), 4)}
    return found | _drafts(Drafts.sum(row.drafts for row in ended))


def _drafts(drafts: Drafts | None) -> dict[str, Any]:
    return {} if drafts is None else {"drafts": drafts.as_dict()}


def facts(choice: Choice) -> dict[str, Any]:
    """Returns the facts of one choice apart from its text."""
    ended = choice.ended
    if ended is None:
        return {}
    return {
        "seed": choice.job.seed,
        "num_forwards": ended.num_forwards,
        "tokens_per_forward": round(len(ended.ids) / max(1, ended.num_forwards), 4),
        "step_of_token": ended.step_of_token,
        "lengths": list(choice.row.gaps),
    } | _drafts(ended.drafts)


def log_probs(plan: Plan, tokens: Sequence[TokenLogProb]) -> dict[str, Any]:
    """Returns log-probabilities in the shape of the plan's endpoint."""
    if plan.kind == "chat":
        return {
            "content": [
                _chat_log_prob(token.text, token.bytes, token.log_prob)
                | {"top_logprobs": [_chat_log_prob(*alternative) for alternative in token.top]}
                for token in tokens
            ],
            "refusal": None,
        }
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.log_prob for token in tokens],
        "top_logprobs": [{text: value for text, _, value in token.top} if token.top else None for token in tokens]
        if plan.num_top_log_probs
        else None,
        "text_offset": [token.offset for token in tokens],
    }


def sse(value: dict[str, Any]) -> str:
    """Returns one server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _chat_log_prob(text: str, content: bytes, log_prob: float | None) -> dict[str, Any]:
    # Stands for tokens of given text inside the answer, in a form that clients can read.
    return {"token": text, "logprob": 0.0 if log_prob is None else log_prob, "bytes": list(content)}


def _whole_choice(plan: Plan, choice: Choice, deltas: list[Delta]) -> dict[str, Any]:
    body: dict[str, Any] = {
        "index": choice.index,
        "finish_reason": deltas[-1].finish_reason,
        "logprobs": None,
        "decausal": facts(choice),
    }
    if plan.kind == "chat":
        body["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
    else:
        body["text"] = plan.echoes[choice.index] + choice.text
    if plan.num_top_log_probs is not None:
        body["logprobs"] = log_probs(plan, [token for delta in deltas for token in delta.log_probs])
    return body
