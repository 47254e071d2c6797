"""From the messages of a request to the text that the chat template makes of them."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

from jinja2 import TemplateError

from decausal.serving.errors import bad_request
from decausal.serving.schema import ChatBody, Message

RESERVED = frozenset({"messages", "conversations"})


def conversation_text(body: ChatBody, tokenizer: Any) -> str:
    """Renders a conversation, with the beginning of the answer or with its last message left open.

    Raises:
        ApiError: 400: no template, one that refuses the conversation or does not read what was given for it.
    """
    if not tokenizer.chat_template:
        raise bad_request("this model's tokenizer has no chat template: use /v1/completions", "messages")
    _refuse_kwargs(body.chat_template_kwargs or {}, tokenizer)
    messages = [_as_template_reads(message, number) for number, message in enumerate(body.messages)]
    text = _rendered(body, messages, tokenizer)
    if any("tool_calls" in message for message in messages):
        without = [{k: v for k, v in message.items() if k != "tool_calls"} for message in messages]
        if _rendered(body, without, tokenizer) == text:
            number = next(i for i, message in enumerate(messages) if "tool_calls" in message)
            param = f"messages.{number}.tool_calls"
            raise bad_request(f"this model's chat template leaves '{param}' out: write calls as content", param)
    return text


def _rendered(body: ChatBody, messages: list[dict[str, Any]], tokenizer: Any) -> str:
    is_continued = bool(body.continue_final_message)
    if is_continued and body.messages[-1].role != "assistant":
        raise bad_request(
            "'continue_final_message' continues an assistant's message, and the last one is of role "
            f"'{body.messages[-1].role}': leave it out",
            "continue_final_message",
        )
    begins_answer = not is_continued if body.add_generation_prompt is None else body.add_generation_prompt
    if is_continued and begins_answer:
        raise bad_request(
            "'continue_final_message' and 'add_generation_prompt' exclude each other: leave one out",
            "continue_final_message",
        )
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=begins_answer,
            continue_final_message=is_continued,
            **(body.chat_template_kwargs or {}),
        )
    except (TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
        told = " ".join(str(error).split())
        raise bad_request(f"the chat template refuses this conversation: {told}", "messages") from None


def _refuse_kwargs(kwargs: dict[str, Any], tokenizer: Any) -> None:
    """Refuses names that are not the template's to read, and those that it does not read."""
    reserved = RESERVED | set(inspect.signature(tokenizer.apply_chat_template).parameters)
    for name in kwargs:
        param = f"chat_template_kwargs.{name}"
        if name in reserved:
            raise bad_request(f"'{param}' is not the chat template's: leave it out", param, "unsupported_field")
        if not re.search(rf"\b{re.escape(name)}\b", tokenizer.get_chat_template()):
            raise bad_request(f"this model's chat template reads no '{name}': leave it out", param, "unsupported_field")


def _as_template_reads(message: Message, number: int) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": message.content}
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            found[name] = getattr(message, name)
    if message.tool_calls:
        found["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        for index, call in enumerate(found["tool_calls"]):
            where = f"messages.{number}.tool_calls.{index}.function.arguments"
            call["function"]["arguments"] = _arguments(call["function"]["arguments"], where)
    return found


def _arguments(given: str | dict[str, Any], where: str) -> dict[str, Any]:
    """Arguments as an object: OpenAI's clients send them as JSON, chat templates read objects."""
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise bad_request(f"'{where}' is not JSON: {error}", where) from None
    if not isinstance(found, dict):
        raise bad_request(f"'{where}' must be an object, written as JSON", where)
    return found
