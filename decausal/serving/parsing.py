"""From the bytes of a request to a checked body.

Fields that clients send routinely and that do not change the answer are ignored. Fields that would change the answer
but are not supported are refused by name.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from reprlib import Repr
from typing import Any, TypeVar

from pydantic import ValidationError

from decausal.errors import nearest
from decausal.sampling.settings import ALIASES
from decausal.serving.errors import ApiError, bad_request
from decausal.serving.schema import Body, Extension
from decausal.serving.settings import LARGE, MAX_BRACKETS, MAX_FIELDS

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
"""Fields that OpenAI's clients send and that do not change the text."""

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
"""Unsupported fields of OpenAI and other servers, with the values that have no effect. Null never has one."""

WHY_NOT = dict.fromkeys(
    ("frequency_penalty", "presence_penalty", "repetition_penalty"),
    "a pass writes many tokens at once, and they do not see each other's repetitions",
)


BodyType = TypeVar("BodyType", bound=Body)


def parse(raw: bytes, kind: type[BodyType]) -> BodyType:
    """Reads a body.

    Raises:
        ApiError: 400. The error names the field that is wrong.
    """
    with _no_collection() if len(raw) > LARGE else nullcontext():
        return _parsed(raw, kind)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pauses garbage collection. A body holds no cycles, and looking for them among millions of parts stops every
    thread."""
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


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not a number in JSON")


def _refuse_surrogates(raw: bytes, value: dict[str, Any]) -> None:
    """Refuses text without UTF-8: half of a surrogate pair, which JSON can write as an escape."""
    if b"\\u" not in raw:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise bad_request(f"the body is not JSON that can be read: {error}", code="invalid_json") from None
    except UnicodeEncodeError:
        raise bad_request("the body holds half of a surrogate pair (\\ud800 to \\udfff)", code="invalid_utf8") from None


def _refuse_sprawl(value: dict[str, Any]) -> None:
    """Refuses objects with so many fields that an error for each would fill the memory."""
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
    """Returns the name of a field as the client knows it, without the branches of unions that pydantic adds."""
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


def _refuse_what_is_not_there(body: Body) -> None:
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
