"""The forms that records have in well-known data sets, told by the names of their fields."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from decausal.data.formats import kind
from decausal.data.reading import Reading
from decausal.errors import UserError, refuse_broken_text

Record = dict[str, Any]

# Who speaks in ShareGPT's conversations, by the names that its copies use.
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}


class UnknownFormError(UserError):
    """No form of records fits the fields that were found."""


@dataclass(frozen=True)
class Form:
    """One way to read a record.

    Attributes:
        name: What the user is told it is; None for this project's own forms.
        fields: The fields that a record has.
        content: Makes a record's content of a row that has them.
        optional: Fields that a row may have as well, empty or null where it does not.
    """

    name: str | None
    fields: tuple[str, ...]
    content: Callable[[Form, dict[str, Any], str], Record]
    optional: tuple[str, ...] = ()

    def __str__(self) -> str:
        listed = ", ".join(f"'{field}'" for field in (*self.fields[:-1], *self.optional, self.fields[-1]))
        return f"{self.name} ({listed})" if self.name else listed

    def fits(self, found: Collection[str]) -> bool:
        """Whether a row with these fields has this form."""
        return all(field in found for field in self.fields)

    def columns(self, found: Collection[str]) -> list[str]:
        """Returns the fields to read of those found."""
        return [field for field in (*self.fields, *self.optional) if field in found]

    def record(self, row: dict[str, Any], origin: str) -> Record:
        """Makes a record of a row.

        Raises:
            UserError: A field is missing or of another type, or a text is no text.
        """
        missing = [field for field in self.fields if field not in row]
        if missing:
            raise UserError(f"{origin}: no field '{missing[0]}', which earlier records have; found {listed(row)}")
        record = self.content(self, row, origin)
        _refuse_broken_texts(record, origin)
        return {"origin": origin, **record}


def form_of(found: Collection[str], origin: str, reading: Reading) -> Form:
    """Returns the form of rows with the fields `found`: a field named by the user first, then the best known.

    Raises:
        UnknownFormError: There is no such form; says which flags would help.
    """
    own = Form(None, (reading.text_field,), _text)
    pair = Form(None, (reading.prompt_field, reading.completion_field), _pair)
    chosen = (pair,) if reading.maps_fields else (own, Form(None, ("messages",), _conversation), pair, *KNOWN)
    for form in chosen:
        if form.fits(found):
            return form
    if reading.maps_fields:
        raise UnknownFormError(
            f"{origin}: found {listed(found)}, but --prompt_field and --completion_field ask for "
            f"'{reading.prompt_field}' and '{reading.completion_field}'"
        )
    hint = "; name the fields: --text_field NAME, or --prompt_field NAME --completion_field NAME" if found else ""
    raise UnknownFormError(
        f"{origin}: found {listed(found)}, but a record has '{reading.text_field}', or 'messages', "
        f"or 'prompt' and 'completion'{hint}"
    )


def listed(fields: Iterable[str]) -> str:
    """Returns names for a message."""
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
    prompt, completion = form.fields
    return {"prompt": _string(row, prompt, origin), "completion": _string(row, completion, origin)}


def _question(form: Form, row: dict[str, Any], origin: str) -> Record:
    """The parts of the prompt as paragraphs, and the answer on a line of its own: these fields hold no line breaks."""
    *parts, answer = form.fields
    given = [_string(row, part, origin) for part in parts]
    given += [_string(row, part, origin) for part in form.optional if row.get(part)]
    return {"prompt": "\n\n".join(given) + "\n", "completion": _string(row, answer, origin)}


def _conversation(form: Form, row: dict[str, Any], origin: str) -> Record:
    return {"messages": _messages(row[form.fields[0]], origin)}


def _share_gpt(form: Form, row: dict[str, Any], origin: str) -> Record:
    turns = row[form.fields[0]]
    if isinstance(turns, list):
        turns = [_as_message(turn) if isinstance(turn, dict) else turn for turn in turns]
    return {"messages": _messages(turns, origin, form.fields[0])}


def _as_message(turn: dict[str, Any]) -> dict[str, Any]:
    if "from" not in turn:
        return turn
    speaker = turn["from"]
    return {"role": SPEAKERS.get(speaker, speaker), "content": turn.get("value")}


def _messages(messages: Any, origin: str, field: str = "messages") -> list[dict[str, Any]]:
    if not isinstance(messages, list):
        raise UserError(f"{origin}: field '{field}' holds {kind(messages)}, a list of messages is expected")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise UserError(f"{origin}: message {number} is {kind(message)}, where {{role, content}} is expected")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise UserError(f"{origin}: message {number} has no string '{key}'; found {listed(message)}")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{origin}: no message has role 'assistant', so there is no answer to learn")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _refuse_broken_texts(value: Any, origin: str) -> None:
    if isinstance(value, str):
        refuse_broken_text(value, origin)
    elif isinstance(value, dict):
        for part in value.items():
            _refuse_broken_texts(part, origin)
    elif isinstance(value, list | tuple):
        for part in value:
            _refuse_broken_texts(part, origin)


KNOWN = (
    Form("ShareGPT", ("conversations",), _share_gpt),
    Form("ShareGPT", ("conversation",), _share_gpt),
    Form("Alpaca", ("instruction", "output"), _question, optional=("input",)),
    Form("Dolly", ("instruction", "response"), _question, optional=("context",)),
    Form("HumanEval", ("prompt", "canonical_solution"), _pair),
    Form("question and answer", ("question", "answer"), _question),
    Form("question and answer", ("question", "response"), _question),
    Form("question and answer", ("query", "response"), _question),
    Form("question and answer", ("problem", "solution"), _question),
    Form("prompt and answer", ("prompt", "response"), _question),
    Form("input and output", ("input", "output"), _question),
)
