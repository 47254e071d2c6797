"""The bodies that clients send, as types: JSON schema, and what each field must be.

OpenAI's fields have OpenAI's meaning. The sampler's settings are fields beside them, by their own names, so that
`extra_body` of OpenAI's clients can hold them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    create_model,
    model_validator,
)

from decausal.data.messages import text_of
from decausal.sampling.filling.gaps import Piece
from decausal.sampling.filling.lengths import SEARCHES
from decausal.sampling.settings import ALIASES, COUNTS_BELOW, SamplerSettings
from decausal.serving.settings import (
    MAX_CHOICES,
    MAX_MESSAGES,
    MAX_PROMPTS,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    MAX_TOOL_CALLS,
    MAX_TOOLS,
    MAX_TOP_LOGPROBS,
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
        parts: Instead of the prompt: given texts and gaps (numbers of tokens, null if unknown) in order.
        max_gap: The most tokens of a gap of unknown length.
        length_search: How unknown lengths are found.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    events: bool = False
    parts: Parts = None
    max_gap: Annotated[int, Field(ge=1, lt=COUNTS_BELOW)] | None = None
    length_search: Literal[SEARCHES] | None = None  # type: ignore[valid-type]


class Tool(BaseModel):
    """A tool that the assistant may call. It is passed to the chat template unchanged."""

    model_config = ConfigDict(strict=True, extra="allow")
    type: str
    function: dict[str, Any] | None = None


class FunctionCall(BaseModel):
    """A tool's name and arguments, which are an object or one written as JSON."""

    model_config = ConfigDict(strict=True, extra="allow")
    name: str
    arguments: str | dict[str, Any]


class ToolCall(BaseModel):
    """A call of a tool in an earlier turn."""

    model_config = ConfigDict(strict=True, extra="allow")
    function: FunctionCall


class Message(BaseModel):
    """One turn of a conversation. An assistant's turn may lack content. Tool calls are passed to the chat template."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOL_CALLS)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _settle_content(cls, value: Any) -> Any:
        """Gives an assistant's turn that only calls tools, with null or no content, an empty one."""
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


class Body(_SamplerBody):
    """The fields that completions and chat share."""

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


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: Prompt = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


def sampler_options(body: Body) -> dict[str, Any]:
    """Returns the sampler settings in a body, under our names or those of other samplers."""
    named = {name: getattr(body, name) for name in (*SAMPLER_FIELDS, "stop_token_ids", "temperature", "top_p")}
    aliased = {name: value for name, value in (body.model_extra or {}).items() if name in ALIASES}
    return {name: value for name, value in {**named, **aliased}.items() if value is not None}
