"""The forms of records in well-known data sets, recognised by the names of their fields."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from decausal.data.formats import kind
from decausal.data.messages import (
    NO_ANSWER,
    Message,
    read_earlier_turns,
    read_messages,
    read_template_kwargs,
    read_tools,
)
from decausal.data.reading import Reading
from decausal.errors import UserError, refuse_broken_text

Record = dict[str, Any]

SYSTEM = ("system", "system_prompt")  # the system's message, in a separate column
FOR_TEMPLATES = ("tools", "chat_template_kwargs")
BESIDE_MESSAGES = (*FOR_TEMPLATES, *SYSTEM)
HISTORY = "history"  # Alpaca's earlier turns: a list of [question, answer]
FINISH_REASON = "finish_reason"  # OpenAI's name; of an answer that was cut off it says "length"
OF_ANSWERS = ("id", "num_tokens")  # what `decausal answers` tells people; nothing of it is trained
TO_ANSWER = (
    "a prompt without an answer is for recipes that write answers themselves, such as --recipe opdlm; "
    "`decausal answers` writes them to a file for all others"
)


class UnknownFormError(UserError):
    """No form fits the fields that were found."""


@dataclass(frozen=True)
class Form:
    """One way to read a record.

    Attributes:
        name: What messages call it; None for this project's own forms.
        fields: The fields that a record must have.
        content: Makes a record's content from a row with these fields.
        optional: Further fields that a row may have; they may be empty or null.
        beside: The same, but not mentioned to the user.
        needs_answers: Whether a row without an answer is an error.
    """

    name: str | None
    fields: tuple[str, ...]
    content: Callable[[Form, dict[str, Any], str], Record]
    optional: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    needs_answers: bool = True

    def __str__(self) -> str:
        *first, last = self.fields
        names = [*first, *self.optional, *([] if first and not self.needs_answers else [last])]
        return f"{self.name} ({listed(names)})" if self.name else listed(names)

    def fits(self, found: Collection[str]) -> bool:
        """Returns whether a row with these fields has this form."""
        return all(field in found for field in self.fields)

    def columns(self, found: Collection[str]) -> list[str]:
        """Returns the fields to read of those found."""
        return [field for field in (*self.fields, *self.optional, *self.beside, FINISH_REASON) if field in found]

    def unread(self, row: Mapping[str, Any]) -> list[str]:
        """Returns the fields of a row that hold something and are not read, but for numbers beside written answers."""
        known = (*self.columns(row), *(OF_ANSWERS if FINISH_REASON in row else ()))
        return [field for field, value in row.items() if field not in known and value is not None]

    def record(self, row: dict[str, Any], origin: str) -> Record:
        """Turns a row into a record.

        Raises:
            UserError: A field is missing or of another type, or a text is not valid Unicode.
        """
        may_lack_answer = len(self.fields) > 1 and not self.needs_answers
        missing = [field for field in (self.fields[:-1] if may_lack_answer else self.fields) if field not in row]
        if missing:
            raise UserError(f"{origin}: no field '{missing[0]}', which earlier records have; found {listed(row)}")
        record = self.content(self, row, origin)
        refuse_broken_texts(record, origin)
        is_cut = self.needs_answers and row.get(FINISH_REASON) == "length"
        return {"origin": origin, **record, **({"is_end": False} if is_cut else {})}


def form_of(found: Collection[str], origin: str, reading: Reading) -> Form:
    """Returns the form of rows with the fields `found`: fields named by the user first, then the best-known form.

    Raises:
        UnknownFormError: There is no such form. The message says which flags would help.
    """
    own = Form(None, (reading.text_field,), _text)
    pair = Form(None, (reading.prompt_field, reading.completion_field), _pair, beside=BESIDE_MESSAGES)
    chosen = [pair] if reading.maps_fields else [own, CONVERSATION, pair, *KNOWN]
    if not reading.needs_answers:
        chosen.append(Form(None, (reading.prompt_field,), _prompt, beside=BESIDE_MESSAGES))
    for form in chosen:
        if form.fits(found):
            return replace(form, needs_answers=reading.needs_answers)
    asking = None if reading.maps_fields else _asking(found)
    if asking is not None and not reading.needs_answers:
        return replace(asking, needs_answers=False)
    if reading.maps_fields:
        raise UnknownFormError(
            f"{origin}: found {listed(found)}, but --prompt_field and --completion_field ask for "
            f"'{reading.prompt_field}' and '{reading.completion_field}'"
        )
    missing = reading.completion_field if reading.prompt_field in found else asking and asking.fields[-1]
    if reading.needs_answers and missing:
        prompt = "" if reading.prompt_field in found or asking is None else f"--prompt_field {asking.fields[0]} "
        read = {reading.prompt_field, *BESIDE_MESSAGES, *(asking.columns(found) if asking else ())}
        hint = f"name the answer's field with {prompt}--completion_field NAME; " if set(found) - read else ""
        raise UnknownFormError(f"{origin}: found {listed(found)}, and no '{missing}': {hint}{TO_ANSWER}")
    hint = "; name the fields: --text_field NAME, or --prompt_field NAME --completion_field NAME" if found else ""
    raise UnknownFormError(
        f"{origin}: found {listed(found)}, but a record has '{reading.text_field}', or 'messages', "
        f"or 'prompt' and 'completion'{hint}"
    )


def _asking(found: Collection[str]) -> Form | None:
    """Returns the known form that rows with these fields would have with an answer; the one that reads most of them."""
    forms = [form for form in KNOWN if form.content is _question and all(field in found for field in form.fields[:-1])]
    return max(forms, key=lambda form: len(form.columns(found)), default=None)


def listed(fields: Iterable[str]) -> str:
    """Returns names as messages show them."""
    return ", ".join(f"'{field}'" for field in fields) or "no fields"


# Contents


def _string(row: dict[str, Any], field: str, origin: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise UserError(f"{origin}: field '{field}' holds {kind(value)}, a string is expected")
    return value


def _text(form: Form, row: dict[str, Any], origin: str) -> Record:
    return {"text": _string(row, form.fields[0], origin)}


def _pair(form: Form, row: dict[str, Any], origin: str) -> Record:
    """Returns a prompt and its completion: two texts, or two lists of messages. The second one is learned."""
    prompt, completion = form.fields
    if not isinstance(row[prompt], list) and not isinstance(row.get(completion), list):
        return {"prompt": _plain_prompt(row, prompt, origin), "completion": _answer(form, row, completion, origin)}
    is_prompt_alone = not form.needs_answers and not row.get(completion)
    if not isinstance(row[prompt], list) or not (is_prompt_alone or isinstance(row[completion], list)):
        raise UserError(
            f"{origin}: field '{prompt}' holds {kind(row[prompt])} and '{completion}' {kind(row[completion])}; give "
            "two lists of messages, or two strings"
        )
    given: list[Message] = [message | {"weight": 0} for message in read_messages(row[prompt], origin, prompt)]
    if is_prompt_alone:
        return _record_of(form, given, row, origin)
    return _record_of(form, [*given, *read_messages(row[completion], origin, completion)], row, origin)


def _prompt(form: Form, row: dict[str, Any], origin: str) -> Record:
    (prompt,) = form.fields
    if isinstance(row[prompt], list):
        return _record_of(form, read_messages(row[prompt], origin, prompt), row, origin)
    return {"prompt": _plain_prompt(row, prompt, origin), "completion": ""}


def _plain_prompt(row: dict[str, Any], field: str, origin: str) -> str:
    """Returns a prompt that no chat template renders, with the system's message as its first paragraph."""
    for name in FOR_TEMPLATES:
        if row.get(name):
            raise UserError(
                f"{origin}: field '{name}' is for a chat template, which a '{field}' that is a string does not go "
                f"through; give '{field}' as a list of messages, or leave '{name}' out"
            )
    return "\n\n".join(part for part in (_system(row, origin), _string(row, field, origin)) if part)


def _question(form: Form, row: dict[str, Any], origin: str) -> Record:
    """Returns the parts of the prompt as paragraphs and each answer on a new line, since these fields hold no line
    breaks."""
    *parts, answer = form.fields
    given = [_system(row, origin)] if _system(row, origin) else []
    given += ["\n".join(turn) for turn in read_earlier_turns(row.get(HISTORY), origin, HISTORY)]
    given += [_string(row, part, origin) for part in parts]
    given += [_string(row, part, origin) for part in form.optional if row.get(part)]
    return {"prompt": "\n\n".join(given) + "\n", "completion": _answer(form, row, answer, origin)}


def _answer(form: Form, row: dict[str, Any], field: str, origin: str) -> str:
    """Returns the last field's text, or "" if there is none and none is needed."""
    return "" if not form.needs_answers and row.get(field) is None else _string(row, field, origin)


def _conversation(form: Form, row: dict[str, Any], origin: str) -> Record:
    (field,) = form.fields
    return _record_of(form, read_messages(row[field], origin, field), row, origin)


def _record_of(form: Form, messages: list[Message], row: dict[str, Any], origin: str) -> Record:
    if form.needs_answers and not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{origin}: {NO_ANSWER}; {TO_ANSWER}")
    beside = {
        "tools": read_tools(row.get("tools"), origin),
        "chat_template_kwargs": read_template_kwargs(row.get("chat_template_kwargs"), origin),
    }
    given = {name: value for name, value in beside.items() if value}
    return {"messages": _with_system(messages, _system(row, origin), origin), **given}


def _system(row: dict[str, Any], origin: str) -> str:
    """Returns the system's message from its own column, or ""."""
    return next((_string(row, name, origin) for name in SYSTEM if row.get(name)), "")


def _with_system(messages: list[Message], system: str, origin: str) -> list[Message]:
    if not system:
        return messages
    first = messages[0] if messages else {}
    if first.get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    if first["content"] != system:
        raise UserError(f"{origin}: the system's message and the system's field differ; keep one of them")
    return messages


def refuse_broken_texts(value: Any, origin: str) -> None:
    """Raises UserError if a text anywhere in a value is not valid Unicode."""
    if isinstance(value, str):
        refuse_broken_text(value, origin)
    elif isinstance(value, dict):
        for part in value.items():
            refuse_broken_texts(part, origin)
    elif isinstance(value, list | tuple):
        for part in value:
            refuse_broken_texts(part, origin)


CONVERSATION = Form(None, ("messages",), _conversation, beside=BESIDE_MESSAGES)
KNOWN = (
    Form("ShareGPT", ("conversations",), _conversation, beside=BESIDE_MESSAGES),
    Form("ShareGPT", ("conversation",), _conversation, beside=BESIDE_MESSAGES),
    Form("Alpaca", ("instruction", "output"), _question, optional=("input",), beside=(*SYSTEM, HISTORY)),
    Form("Dolly", ("instruction", "response"), _question, optional=("context",), beside=SYSTEM),
    Form("HumanEval", ("prompt", "canonical_solution"), _pair),
    Form("question and answer", ("question", "answer"), _question, beside=SYSTEM),
    Form("question and answer", ("question", "response"), _question, beside=SYSTEM),
    Form("question and answer", ("query", "response"), _question, beside=SYSTEM),
    Form("question and answer", ("problem", "solution"), _question, beside=SYSTEM),
    Form("prompt and answer", ("prompt", "response"), _question, beside=SYSTEM),
    Form("input and output", ("input", "output"), _question, beside=SYSTEM),
)
