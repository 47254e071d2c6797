"""From messages as data sets and requests hold them to messages that chat templates read."""

from __future__ import annotations

from typing import Any

from decausal.data.formats import kind
from decausal.errors import UserError
from decausal.files import parsed_json

Message = dict[str, Any]

# Roles by the names that ShareGPT and its copies use.
SPEAKERS = {
    "human": "user",
    "prompter": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant"),
    "observation": "tool",
}
CALLER = "function_call"  # LLaMA-Factory's speaker of a tool call, written as JSON
# Fields that say whether a message is trained on: OpenAI and Mistral call it "weight", ms-swift "loss".
WEIGHTS = ("weight", "train", "training", "trainable", "loss")
NO_ANSWER = "no message has role 'assistant', so there is no answer to learn"


def read_messages(value: Any, origin: str, field: str = "messages") -> list[Message]:
    """Returns messages as chat templates read them.

    A content of text parts becomes one text. An assistant's message may have tool calls and null as its content. Fields
    that a table holds as null only because another row has them are dropped at every depth. A message that is not
    trained on has "weight": 0, whatever its data set calls it.

    Args:
        value: A list of messages, of {"role", "content"} or ShareGPT's {"from", "value"}; or one written as JSON.
        origin: Where it was read, for errors.
        field: The field that holds it.

    Raises:
        UserError: It holds something else, or a part that is not text.
    """
    messages = _parsed(value)
    if not isinstance(messages, list):
        raise UserError(f"{origin}: field '{field}' holds {kind(messages)}, a list of messages is expected")
    return [_message(message, f"{origin}: message {number}") for number, message in enumerate(messages, start=1)]


def read_tools(value: Any, origin: str) -> list[dict[str, Any]]:
    """Returns the tools that a conversation may call, from a list or a list written as JSON; null means none.

    Raises:
        UserError: It is not a list of objects.
    """
    tools = _parsed(value)
    tools = [_parsed(tool) for tool in tools] if isinstance(tools, list) else tools
    if not value or tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{origin}: field 'tools' holds {kind(value)}, a list of objects is expected, or one as JSON")
    return without_nulls(tools)


def read_template_kwargs(value: Any, origin: str) -> dict[str, Any]:
    """Returns a conversation's own values for the chat template, from an object or one written as JSON; null means
    none.

    Raises:
        UserError: It is not an object.
    """
    found = _parsed(value)
    if not value or found is None:
        return {}
    if not isinstance(found, dict):
        raise UserError(f"{origin}: field 'chat_template_kwargs' holds {kind(found)}, an object is expected")
    return without_nulls(found)


def read_earlier_turns(value: Any, origin: str, field: str) -> list[list[str]]:
    """Returns earlier questions with their answers, from a list of pairs or one written as JSON; null means none.

    Raises:
        UserError: It is not a list of pairs of strings.
    """
    turns = _parsed(value)
    if not value or not turns:
        return []
    if not isinstance(turns, list) or not all(_is_pair_of_strings(turn) for turn in turns):
        raise UserError(f"{origin}: field '{field}' holds {kind(value)}, a list of [question, answer] is expected")
    return turns


def _is_pair_of_strings(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def without_nulls(value: Any) -> Any:
    """Drops null fields at every depth: in a table, each row has the fields of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def text_of(content: Any) -> str:
    """Returns a message's content as one text.

    Raises:
        ValueError: It is neither a string nor a list of text parts. The message says what it is.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"is {kind(content)}, where a string or a list of parts of type 'text' is expected")
    for part in content:
        found = part.get("type", "text") if isinstance(part, dict) else None
        if found != "text" or not isinstance(part.get("text"), str):
            what = (
                f"a part of type '{found}'" if isinstance(found, str) and found != "text" else "a part without a text"
            )
            raise ValueError(f"holds {what}: only parts of type 'text' can be read")
    return "".join(part["text"] for part in content)


def parsed_arguments(given: Any) -> dict[str, Any]:
    """Returns a tool call's arguments as an object; OpenAI's clients write them as JSON.

    Raises:
        ValueError: They are not an object. The message says why.
    """
    try:
        found = parsed_json(given) if isinstance(given, str) else given
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError("must be an object, written as JSON")
    return found


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, dict):
        raise UserError(f"{where} is {kind(given)}, where {{role, content}} is expected")
    found = without_nulls(given)
    if "from" in found and "role" not in found:
        speaker, content = found.pop("from"), found.pop("value", None)
        found = {"role": SPEAKERS.get(speaker, speaker), "content": content, **found}
        if speaker == CALLER:
            call = _parsed(content)
            found |= {"role": "assistant", "content": None, "tool_calls": call if isinstance(call, list) else [call]}
    if not isinstance(found.get("role"), str):
        raise UserError(f"{where} has no string 'role'; found {', '.join(map(repr, found)) or 'nothing'}")
    calls = _tool_calls(found.pop("tool_calls", None), where)
    content = found.get("content")
    if content is None and not calls:
        raise UserError(f"{where} has no content, and no tool calls in its place")
    try:
        found["content"] = None if content is None else text_of(content)
    except ValueError as error:
        raise UserError(f"{where}: its content {error}") from None
    if found["role"] == "developer":  # OpenAI's newer name, unknown to most templates
        found["role"] = "system"
    is_trained = _is_trained(found, where)
    found = {key: part for key, part in found.items() if key not in WEIGHTS}
    return found | ({"tool_calls": calls} if calls else {}) | ({} if is_trained else {"weight": 0})


def _is_trained(message: Message, where: str) -> bool:
    for name in WEIGHTS:
        if name in message and message[name] not in (0, 1):
            raise UserError(f"{where}: '{name}' is {message[name]!r}, and a message is trained on (1) or not (0)")
    return all(message.get(name, 1) for name in WEIGHTS)


def _tool_calls(given: Any, where: str) -> list[dict[str, Any]]:
    calls = _parsed(given)
    if not calls:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{where}: 'tool_calls' holds {kind(calls)}, a list of objects is expected")
    return [_tool_call(call, f"{where}, tool call {number}") for number, call in enumerate(calls, start=1)]


def _tool_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where} names no function; write {{'function': {{'name', 'arguments'}}}}")
    try:
        function = function | {"arguments": parsed_arguments(function.get("arguments", {}))}
    except ValueError as error:
        raise UserError(f"{where}: its 'arguments' {error}") from None
    return call | {"function": function} if "function" in call else function


def _parsed(value: Any) -> Any:
    """Returns lists that a table's column holds as JSON; any other value unchanged."""
    if isinstance(value, str):
        try:
            return parsed_json(value)
        except ValueError:
            return value
    return value
