"""The bodies that clients send, as JSON schema and as checked values.

OpenAI's fields have OpenAI's meaning. The sampler's settings are fields beside them, by their own names, so that
`extra_body` of OpenAI's clients can hold them. What is sent routinely and changes nothing here is ignored; what would
change the answer and is not there is refused.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from reprlib import Repr
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    create_model,
    model_validator,
)

from decausal.data.messages import text_of
from decausal.errors import nearest
from decausal.sampling.filling.gaps import Piece
from decausal.sampling.filling.lengths import SEARCHES
from decausal.sampling.settings import ALIASES, COUNTS_BELOW, SamplerSettings
from decausal.serving.errors import ApiError, bad_request
from decausal.serving.settings import (
    LARGE,
    MAX_BRACKETS,
    MAX_CHOICES,
    MAX_FIELDS,
    MAX_MESSAGES,
    MAX_PROMPTS,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    MAX_TOOL_CALLS,
    MAX_TOOLS,
    MAX_TOP_LOGPROBS,
)

IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
"""Fields that OpenAI's clients send and that say nothing about the text."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (),
    "audio": (),
    "best_of": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "web_search_options": (),
}
"""Fields of OpenAI's and of other servers that are not there, and the values at which nothing is missed; null always
is one."""

WHY_NOT = dict.fromkeys(
    ("frequency_penalty", "presence_penalty", "repetition_penalty"),
    "a pass writes many tokens at once, and none of them sees what the others repeat",
)


def _prompt(value: Any) -> str | list[str] | list[int] | list[list[int]] | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if len(value) > MAX_PROMPTS and type(value[0]) is not int:
            raise ValueError(f"must hold at most {MAX_PROMPTS} prompts")
        if all(isinstance(part, str) for part in value) or _are_ids(value):
            return value
        if all(isinstance(part, list) and part and _are_ids(part) for part in value):
            return value
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of lists of token ids")


def _are_ids(values: list[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _stop(value: Any) -> list[str] | None:
    if value is None:
        return None
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, list) and len(stops) > MAX_STOPS:
        raise ValueError(f"must hold at most {MAX_STOPS} strings")
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("must be a string or a list of strings, none of them empty")
    if max(map(len, stops), default=0) > MAX_STOP_LENGTH:
        raise ValueError(f"must hold strings of at most {MAX_STOP_LENGTH} characters")
    return stops


def _content(value: Any) -> str:
    try:
        return text_of(value)
    except ValueError:
        raise ValueError("must be a string or a list of parts of type 'text'") from None


def _parts(value: Any) -> list[Piece] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(part is None or type(part) in (str, int) for part in value):
        raise ValueError("must be a list of strings (given text), integers (tokens of a gap) and null (unknown length)")
    if all(type(part) is str for part in value) or any(type(part) is int and part < 1 for part in value):
        raise ValueError("must hold at least one gap, and every gap at least 1 token, or null for an unknown length")
    return value


_ids_schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_texts_schema = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_parts_schema = {
    "type": "array",
    "items": {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 1}, {"type": "null"}]},
}

Prompt = Annotated[
    Any,
    PlainValidator(_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                _texts_schema,
                _ids_schema,
                {**_ids_schema, "items": dict(_ids_schema)},
                {"type": "null"},
            ]
        }
    ),
]
Stop = Annotated[
    Any,
    PlainValidator(_stop),
    WithJsonSchema({"anyOf": [{"type": "string"}, {**_texts_schema, "maxItems": MAX_STOPS}, {"type": "null"}]}),
]
_pieces_schema = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
    },
}
Content = Annotated[Any, PlainValidator(_content), WithJsonSchema({"anyOf": [{"type": "string"}, _pieces_schema]})]
Parts = Annotated[Any, PlainValidator(_parts), WithJsonSchema({"anyOf": [_parts_schema, {"type": "null"}]})]


class StreamOptions(BaseModel):
    """What a stream holds beside text."""

    model_config = ConfigDict(strict=True, extra="ignore")
    include_usage: bool | None = None


class Extension(BaseModel):
    """What only this server understands.

    Attributes:
        events: Streams carry every denoising step: the draft, positions, confidence, and whether tokens were reopened.
        parts: Instead of the prompt: given text and gaps (numbers of tokens, null where unknown) in turn.
        max_gap: The most tokens of a gap of unknown length.
        length_search: How unknown lengths are found.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    events: bool = False
    parts: Parts = None
    max_gap: Annotated[int, Field(ge=1, lt=COUNTS_BELOW)] | None = None
    length_search: Literal[SEARCHES] | None = None  # type: ignore[valid-type]


class Tool(BaseModel):
    """What the assistant may call; it goes to the chat template as it was given."""

    model_config = ConfigDict(strict=True, extra="allow")
    type: str
    function: dict[str, Any] | None = None


class FunctionCall(BaseModel):
    """What a tool was called with; the arguments are an object, or one written as JSON."""

    model_config = ConfigDict(strict=True, extra="allow")
    name: str
    arguments: str | dict[str, Any]


class ToolCall(BaseModel):
    """A call of a tool in an earlier turn."""

    model_config = ConfigDict(strict=True, extra="allow")
    function: FunctionCall


class Message(BaseModel):
    """One turn of a conversation. An assistant's may have no content; calls of tools go to the chat template."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOL_CALLS)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _settle_content(cls, value: Any) -> Any:
        """An assistant's turn that only calls tools has null for content, or none at all."""
        if isinstance(value, dict) and value.get("role") == "assistant" and value.get("content") is None:
            return {**value, "content": ""}
        return value


SAMPLER_FIELDS = {
    name: hint
    for name, hint in get_type_hints(SamplerSettings).items()
    if name not in ("max_new_tokens", "seed", "stop", "stop_token_ids", "temperature", "top_p")
}
_SamplerBody = create_model(
    "_SamplerBody", **{name: (hint | None, Field(None, description="sampler")) for name, hint in SAMPLER_FIELDS.items()}
)


class _Body(_SamplerBody):
    """What completions and chat have in common."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: Stop = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    decausal: Extension | None = None


class CompletionBody(_Body):
    """POST /v1/completions."""

    prompt: Prompt = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class ChatBody(_Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


BodyType = TypeVar("BodyType", bound=_Body)


def parse(raw: bytes, kind: type[BodyType]) -> BodyType:
    """Reads a body.

    Raises:
        ApiError: 400, and the field that is wrong.
    """
    with _no_collection() if len(raw) > LARGE else nullcontext():
        return _parsed(raw, kind)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collects no garbage: a body's parts are in no cycles, and to look for these among millions stops every thread."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _parsed(raw: bytes, kind: type[BodyType]) -> BodyType:
    num_brackets = raw.count(b"[") + raw.count(b"{")
    if num_brackets > MAX_BRACKETS:
        raise bad_request(f"the body has {num_brackets} brackets, and at most {MAX_BRACKETS} are read: send less")
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8: {error.reason} at byte {error.start}", code="invalid_utf8") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise bad_request(f"the body is not JSON: {error.msg} at {where}", code="invalid_json") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits; NaN
        raise bad_request(f"the body is not JSON that can be read: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request(f"the body must be a JSON object, not {type(value).__name__}", code="invalid_json")
    _refuse_surrogates(raw, value)
    _refuse_sprawl(value)
    try:
        body = kind.model_validate(value)
    except ValidationError as error:
        raise _first_fault(error, value) from None
    _refuse_what_is_not_there(body)
    return body


def sampler_options(body: _Body) -> dict[str, Any]:
    """Returns the sampler's settings that a body gives, under our names or others'."""
    named = {name: getattr(body, name) for name in (*SAMPLER_FIELDS, "stop_token_ids", "temperature", "top_p")}
    aliased = {name: value for name, value in (body.model_extra or {}).items() if name in ALIASES}
    return {name: value for name, value in {**named, **aliased}.items() if value is not None}


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _refuse_surrogates(raw: bytes, value: dict[str, Any]) -> None:
    """Refuses text that has no UTF-8: half of a pair, which JSON can write as an escape."""
    if b"\\u" not in raw:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise bad_request(f"the body is not JSON that can be read: {error}", code="invalid_json") from None
    except UnicodeEncodeError:
        raise bad_request("the body holds half of a surrogate pair (\\ud800 to \\udfff)", code="invalid_utf8") from None


def _refuse_sprawl(value: dict[str, Any]) -> None:
    """Refuses objects of so many fields that a fault in each would fill the memory."""
    for name in (None, "decausal", "stream_options"):
        fields = value if name is None else value.get(name)
        if isinstance(fields, dict) and len(fields) > MAX_FIELDS:
            what = "the body" if name is None else f"'{name}'"
            raise bad_request(f"{what} has {len(fields)} fields, and at most {MAX_FIELDS} are read", name)


def _first_fault(error: ValidationError, value: dict[str, Any]) -> ApiError:
    fault = error.errors(include_url=False, include_context=False)[0]
    param = _path(fault["loc"], value, is_missing=fault["type"] == "missing")
    if fault["type"] == "extra_forbidden":
        hint = nearest(str(fault["loc"][-1]), Extension.model_fields)
        return bad_request(f"unknown field '{param}'{hint}", param, "unknown_field")
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = message if message.startswith(("must", "should")) else f"is not accepted: {message}"
    given = "" if fault["type"] == "missing" else f" (given: {_short(fault['input'])})"
    return bad_request(f"'{param}' {message}{given}", param, "missing_field" if not given else "invalid_value")


_shortened = Repr()
_shortened.maxlist = _shortened.maxdict = 20
_shortened.maxstring = _shortened.maxlong = _shortened.maxother = 80


def _path(location: Sequence[str | int], value: Any, *, is_missing: bool) -> str | None:
    """The name of a field as the client knows it: pydantic also names the branches of unions."""
    path = []
    for i, part in enumerate(location):
        is_there = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
        if not is_there and not (is_missing and i == len(location) - 1):
            break
        path.append(str(part))
        value = value[part] if is_there else None
    return ".".join(path) or None


def _short(value: Any) -> str:
    text = _shortened.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse_what_is_not_there(body: _Body) -> None:
    accepted = {*type(body).model_fields, *IGNORED, *NEUTRAL, *ALIASES}
    for name, value in (body.model_extra or {}).items():
        if name in NEUTRAL:
            harmless = (*NEUTRAL[name], body.n or 1) if name == "best_of" else NEUTRAL[name]
            if value is not None and value not in harmless:
                why = f" ({WHY_NOT[name]})" if name in WHY_NOT else ""
                raise bad_request(f"'{name}' is not supported here{why}: leave it out", name, "unsupported_field")
        elif name == "max_new_tokens":
            raise bad_request("'max_new_tokens' is called 'max_tokens' here", name, "unknown_field")
        elif name not in IGNORED and name not in ALIASES:
            raise bad_request(f"unknown field '{name}'{nearest(name, accepted)}", name, "unknown_field")
    for index, message in enumerate(getattr(body, "messages", ())):
        is_assistant = message.role == "assistant"
        for name in ("function_call", "audio", *(() if is_assistant else ("tool_calls",))):
            if getattr(message, name, None) is not None:
                where = f"messages.{index}.{name}"
                raise bad_request(f"'{where}' is not supported here: leave it out", where, "unsupported_field")
