"""The lines of a batch job: prompts read one by one, and what is written for each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from decausal.data.formats import kind
from decausal.data.forms import Record, refuse_broken_texts
from decausal.data.messages import read_messages, read_template_kwargs, read_tools
from decausal.data.prompts import before_answer
from decausal.errors import UserError, nearest, refuse_broken_text
from decausal.files import parsed_json
from decausal.models.checkpoint import Converted
from decausal.sampling.generation import Generation, Wanted
from decausal.sampling.job_files import seems_a_conversation
from decausal.sampling.settings import ALIASES, SamplerSettings

CONVERSATION = ("messages", "tools", "chat_template_kwargs")


class Lines:
    """The remaining lines, read one at a time.

    Attributes:
        labels: For prompts in progress, by their number from 0: the id, and the line in the file, from 1.
    """

    def __init__(self, path: Path, defaults: SamplerSettings, chat: bool, num_done: int) -> None:
        self._path, self._defaults, self._chat, self._num_done = path, defaults, chat, num_done
        self.labels: dict[int, tuple[Any, int]] = {}

    def __iter__(self) -> Iterator[Wanted | UserError]:
        for index, number, line in islice(_numbered(self._path), self._num_done, None):
            fields: dict[str, Any] | None = None
            try:
                fields = _parsed(line)
                self.labels[index] = fields.get("id", index), number
                yield self._wanted(fields, index)
            except UserError as error:
                self.labels.setdefault(index, (index, number))
                yield error

    def _wanted(self, fields: dict[str, Any], index: int) -> Wanted:
        options = {name: value for name, value in fields.items() if name not in ("prompt", "id", *CONVERSATION)}
        settings = self._defaults.updated(**{"seed": self._defaults.seed + index, **options})
        if "messages" in fields:
            return Wanted("", settings, conversation=_conversation(fields))
        return Wanted(fields["prompt"], settings, self._chat)


def _numbered(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yields the number of a prompt (from 0), the number of its line (from 1), and the line."""
    index = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield index, number, line
                index += 1


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        fields = parsed_json(line)
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(f"this is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise UserError('a line must be an object, such as {"prompt": "def add(a, b):"}')
    if ("prompt" in fields) == ("messages" in fields):
        raise UserError("both 'prompt' and 'messages'; give one" if "prompt" in fields else "no 'prompt' or 'messages'")
    accepted = {*SamplerSettings.__dataclass_fields__, *ALIASES, "id"}
    accepted |= {"prompt"} if "prompt" in fields else set(CONVERSATION)
    for name in fields.keys() - accepted:
        raise UserError(f"unknown field '{name}'{nearest(name, accepted)}")
    if "prompt" in fields:
        if not isinstance(fields["prompt"], str):
            raise UserError(f"'prompt' must be a text, and is {kind(fields['prompt'])}")
        refuse_broken_text(fields["prompt"], "'prompt'")
    return fields


def _conversation(fields: dict[str, Any]) -> Record:
    """Returns the record of a conversation, read as in training data; a last answer is left out."""
    where = "this conversation"
    messages = read_messages(fields["messages"], where)
    if messages:
        messages = before_answer(messages)
    if not messages:
        raise UserError("'messages' hold nothing to answer")
    record = {
        "origin": where,
        "messages": messages,
        "tools": read_tools(fields.get("tools"), where),
        "chat_template_kwargs": read_template_kwargs(fields.get("chat_template_kwargs"), where),
    }
    refuse_broken_texts(record, where)
    return record


def encoded(label: Any, answer: Generation | UserError) -> bytes:
    """Returns the line that answers a prompt: what was written, or the error."""
    if isinstance(answer, UserError):
        fields = {"id": label, "error": str(answer)}
    else:
        fields = {
            "id": label,
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "num_tokens": len(answer.ids),
            "num_forwards": answer.num_forwards,
        }
        if answer.drafts is not None:
            fields["drafts"] = answer.drafts.as_dict()
    # ASCII: an id may hold half of a surrogate pair, which UTF-8 cannot.
    return json.dumps(fields).encode()


def look_through(path: Path) -> tuple[int, bool]:
    """Returns the number of prompts in a file, and whether one seems to be a conversation.

    Raises:
        UserError: The file cannot be read.
    """
    num_lines, has_messages = 0, False
    try:
        for _, _, line in _numbered(path):
            num_lines += 1
            has_messages = has_messages or seems_a_conversation(line)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return num_lines, has_messages


def job_facts(converted: Converted, settings: SamplerSettings, chat: bool, has_template: bool) -> dict[str, Any]:
    """Returns what decides the answers, apart from the prompts. `has_template`: some go through the chat template."""
    facts = {**model_facts(converted, has_template), "settings": asdict(settings), "chat": chat}
    return json.loads(json.dumps(facts))


def model_facts(converted: Converted, chat: bool) -> dict[str, Any]:
    """Returns what a job records of its model and, if prompts go through it, of the chat template."""
    facts = {"source": converted.facts.source, "layout": converted.facts.layout, "shift": converted.facts.shift}
    if not chat:
        return {"model": facts}
    template = json.dumps(converted.tokenizer.chat_template)
    return {"model": facts, "chat_template": sha256(template.encode()).hexdigest()[:16]}
