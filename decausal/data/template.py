"""A tokenizer's chat template, and the text that it makes of messages."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from decausal.data.messages import Message
from decausal.data.template_file import read_template
from decausal.errors import UserError
from decausal.privacy import secret_in

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
RESERVED = frozenset({"messages", "conversations", "tools", "add_generation_prompt"})
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError)
# transformers drops null fields before a template sees them, and DeepSeek's templates test whether the content is null.
KEEPS_NULL = (
    "{%- set kept = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- set kept.messages = kept.messages + [message if 'content' in message else dict(message, content=none)] -%}"
    "{%- endfor -%}{%- set messages = kept.messages -%}"
)
ADVICE = "give another with --chat_template FILE"


class TemplateRefusalError(UserError):
    """The chat template refuses a conversation, or leaves a part of it out.

    Attributes:
        reason: The template's reason, without the place.
        message: The index of the message that lost a part, or None.
    """

    def __init__(self, text: str, reason: str, message: int | None = None) -> None:
        super().__init__(text)
        self.reason, self.message = reason, message


def set_template(
    tokenizer: PreTrainedTokenizerBase, template: str | Path | None = None, kwargs: Mapping[str, Any] | None = None
) -> None:
    """Gives a tokenizer a chat template, and values for what it reads apart from messages.

    The values become the template's defaults, so that they are saved with it and hold wherever it is used.

    Args:
        tokenizer: The tokenizer, which is changed.
        template: A file, or the text of a template. None: the tokenizer's own.
        kwargs: Values by name, such as {"enable_thinking": False}.

    Raises:
        UserError: There is no such file or no template in it, the template does not read a name, or a value is a
            secret.
    """
    if template is not None:
        tokenizer.chat_template = read_template(template)
        _refuse_broken(tokenizer, str(template))
    if not kwargs:
        return
    if not tokenizer.chat_template:
        raise UserError("--chat_template_kwargs: this tokenizer has no chat template; give one with --chat_template")
    if (secret := secret_in(dict(kwargs))) is not None:
        raise UserError(f"--chat_template_kwargs holds a secret, '{secret}', which would be saved: leave it out")
    for name in kwargs:
        if not name.isidentifier() or is_reserved(name, tokenizer):
            raise UserError(f"--chat_template_kwargs: '{name}' is not the chat template's to read; leave it out")
        if not reads(name, tokenizer):
            raise UserError(f"--chat_template_kwargs: the chat template reads no '{name}'; leave it out")
    defaults = "".join(
        f"{{%- set {name} = {name} if {name} is defined else {_literal(value)} -%}}" for name, value in kwargs.items()
    )
    held = tokenizer.chat_template
    if isinstance(held, dict):
        tokenizer.chat_template = {name: defaults + text for name, text in held.items()}
    else:
        tokenizer.chat_template = defaults + held


def template_values(
    record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, warn: Callable[[str], None]
) -> dict[str, Any]:
    """Returns a conversation's own values for its template, without those that no template reads, which are reported.

    Raises:
        UserError: A name is reserved for the messages or for transformers.
    """
    given = record.get("chat_template_kwargs", {})
    for name in given:
        if not name.isidentifier() or is_reserved(name, tokenizer):
            where = f"{record['origin']}: '{name}' of 'chat_template_kwargs'"
            raise UserError(f"{where} is not the chat template's to read; leave it out")
    read = {name: value for name, value in given.items() if reads(name, tokenizer)}
    for name in (name for name in given if name not in read):
        warn(f"the chat template reads no '{name}', which 'chat_template_kwargs' of records hold: it changes nothing")
    return read


def refuse_without_template(tokenizer: PreTrainedTokenizerBase, origin: str) -> None:
    """Raises UserError if a tokenizer cannot render the conversation of `origin`."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{origin}: 'messages' need a chat template and this tokenizer has none; "
            "give one with --chat_template FILE, or give 'prompt' and 'completion'"
        )


def is_reserved(name: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether a name is reserved for the messages or for transformers."""
    return name in RESERVED or name in inspect.signature(tokenizer.apply_chat_template).parameters


def reads(name: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether a tokenizer's template, or one of several, reads a value of this name."""
    held = tokenizer.chat_template
    texts = held.values() if isinstance(held, dict) else [held]
    return any(re.search(rf"\b{re.escape(name)}\b", text) for text in texts)


def marks_answers(tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]] = ()) -> bool:
    """Returns whether the template itself marks what the assistant writes, as `{% generation %}`."""
    try:
        return bool(GENERATION_BLOCK.search(tokenizer.get_chat_template(tools=list(tools) or None)))
    except ValueError:  # none of several templates fits; rendering reports it
        return False


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    origin: str,
    *,
    tools: Sequence[dict[str, Any]] = (),
    add_generation_prompt: bool = False,
    **options: Any,
) -> Any:
    """Returns the text that the chat template makes of messages.

    Args:
        messages: Messages from `read_messages`. The template does not see whether they are trained on.
        tokenizer: A tokenizer with a chat template.
        origin: Where the messages were read, for errors.
        tools: What the assistant may call.
        add_generation_prompt: Whether an answer begins after the messages.
        **options: Options of `apply_chat_template`, and values that the template reads.

    Raises:
        TemplateRefusalError: The template refuses them. The message names `origin`.
    """
    given = [{key: part for key, part in message.items() if key != "weight"} for message in messages]
    options.setdefault("tokenize", False)
    try:
        if any("content" in message and message["content"] is None for message in given):
            held = tokenizer.get_chat_template(tools=list(tools) or None)
            options["chat_template"] = KEEPS_NULL + held
        return tokenizer.apply_chat_template(
            given, tools=list(tools) or None, add_generation_prompt=add_generation_prompt, **options
        )
    except TEMPLATE_ERRORS as error:
        reason = " ".join(str(error).split())
        raise TemplateRefusalError(f"{origin}: the chat template refuses these messages ({reason})", reason) from None


def readable(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    origin: str,
    *,
    tools: Sequence[dict[str, Any]] = (),
    **options: Any,
) -> list[Message]:
    """Returns messages with tool calls as this template reads them, and refuses a template that drops them.

    Templates differ. Most read a call's arguments as an object, some as JSON. In a message that only calls tools, the
    content is missing, null or "".

    Args:
        messages, tokenizer, origin, tools, **options: See `render`.

    Raises:
        TemplateRefusalError: The template refuses the messages in every form, or leaves tool calls or tools out.
    """
    found = list(messages)
    calling = [index for index, message in enumerate(found) if message.get("tool_calls")]

    def text(messages: Sequence[Message], tools: Sequence[dict[str, Any]] = tools) -> str:
        return render(messages, tokenizer, origin, tools=tools, **options)

    if calling:
        found, rendered = _first_readable(found, text)
        without = [{key: part for key, part in message.items() if key != "tool_calls"} for message in found]
        if _is_same(rendered, text, without):
            reason = f"leaves the tool calls of message {calling[0] + 1} out"
            advice = "write calls as content, or give a template that reads them with --chat_template FILE"
            raise TemplateRefusalError(f"{origin}: the chat template {reason}; {advice}", reason, calling[0])
    if tools and text(found) == text(found, ()):
        reason = "leaves 'tools' out"
        advice = "give one that reads them with --chat_template FILE, or write them into the system's message"
        raise TemplateRefusalError(f"{origin}: the chat template {reason}; {advice}", reason)
    return found


def _first_readable(messages: list[Message], text: Any) -> tuple[list[Message], str]:
    refusal: TemplateRefusalError | None = None
    for empty in ({}, {"content": None}, {"content": ""}):
        for as_json in (False, True):
            form = [_in_form(message, as_json, empty) for message in messages]
            try:
                rendered = text(form)
            except TemplateRefusalError as error:
                refusal = refusal or error
                continue
            return form, rendered
    assert refusal is not None
    raise refusal


def _in_form(message: Message, as_json: bool, empty: dict[str, str | None]) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = [_call_in_form(call, as_json) for call in message["tool_calls"]]
    found = message | {"tool_calls": calls}
    if not message.get("content"):
        found.pop("content", None)
        found |= empty
    return found


def _call_in_form(call: dict[str, Any], as_json: bool) -> dict[str, Any]:
    if "function" in call:
        return call | {"function": _call_in_form(call["function"], as_json)}
    given = call["arguments"]
    return call | {"arguments": json.dumps(given, ensure_ascii=False) if as_json else given}


def _is_same(rendered: str, text: Any, others: list[Message]) -> bool:
    try:
        return text(others) == rendered
    except TemplateRefusalError:
        return False


def _refuse_broken(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        where = f"line {error.lineno}: {' '.join(str(error.message).split())}"
        shown = "the template given" if "{%" in name or "{{" in name else name
        raise UserError(f"--chat_template {shown} is not Jinja ({where}); correct it") from None
    except TEMPLATE_ERRORS:  # this template may need other messages
        return


def _literal(value: Any) -> str:
    """Returns a value as Jinja writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_literal(part) for part in value) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
