"""From the messages of a request to the text that the chat template makes of them."""

from __future__ import annotations

from typing import Any

from decausal.data.messages import parsed_arguments
from decausal.data.template import TemplateRefusalError, is_reserved, readable, reads, render
from decausal.serving.errors import bad_request
from decausal.serving.schema import ChatBody, Message


def conversation_text(body: ChatBody, tokenizer: Any) -> str:
    """Renders a conversation, with the beginning of an answer or with its last message left open.

    Raises:
        ApiError: 400. There is no template, it refuses the conversation, or it does not read a given value.
    """
    if not tokenizer.chat_template:
        raise bad_request("this model's tokenizer has no chat template: use /v1/completions", "messages")
    _refuse_kwargs(body.chat_template_kwargs or {}, tokenizer)
    messages = [_as_template_reads(message, number) for number, message in enumerate(body.messages)]
    options = _ending(body) | (body.chat_template_kwargs or {})
    tools = [tool.model_dump(exclude_unset=True) for tool in body.tools or ()]
    try:
        messages = readable(messages, tokenizer, "messages", tools=tools, **options)
        return render(messages, tokenizer, "messages", tools=tools, **options)
    except TemplateRefusalError as error:
        if error.message is not None:
            param = f"messages.{error.message}.tool_calls"
            reason = f"this model's chat template leaves '{param}' out: write calls as content"
            raise bad_request(reason, param) from None
        if tools and "'tools'" in error.reason:
            reason = "this model's chat template leaves 'tools' out: describe them in a message"
            raise bad_request(reason, "tools") from None
        raise bad_request(f"the chat template refuses this conversation: {error.reason}", "messages") from None


def _ending(body: ChatBody) -> dict[str, bool]:
    """Returns whether an answer begins after the messages, instead of continuing the last one."""
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
    return {"add_generation_prompt": begins_answer, "continue_final_message": is_continued}


def _refuse_kwargs(kwargs: dict[str, Any], tokenizer: Any) -> None:
    """Refuses names that are reserved, and names that the template does not read."""
    for name in kwargs:
        param = f"chat_template_kwargs.{name}"
        if is_reserved(name, tokenizer):
            raise bad_request(f"'{param}' is not the chat template's: leave it out", param, "unsupported_field")
        if not reads(name, tokenizer):
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
            try:
                call["function"]["arguments"] = parsed_arguments(call["function"]["arguments"])
            except ValueError as error:
                raise bad_request(f"'{where}' {error}", where) from None
    return found
