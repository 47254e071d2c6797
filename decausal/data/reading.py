"""Settings for reading records, and the account of what was read, what was left out and why."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

from decausal.errors import UserError
from decausal.wording import quantity

OnBadRecord = Literal["error", "skip"]
ON_BAD_RECORD: tuple[OnBadRecord, ...] = ("error", "skip")
SKIP_HINT = "; --on_bad_record skip leaves such records out"
_SAID: set[str] = set()
NAMED = 3  # bad records and skipped files that are named; the others are counted
NAMED_FIELDS = 8
NUMBERS = ("num_records", "num_conversations", "num_blank", "num_cut", "num_bad")


@dataclass(frozen=True)
class Reading:
    """How records are read, whatever the source.

    Attributes:
        text_field: The field that holds a plain text.
        prompt_field, completion_field: The fields that hold a prompt and its completion.
        split: Which split of a data set.
        on_bad_record: "error": a record that cannot be used raises. "skip": it is left out and counted.
        needs_answers: Whether a prompt without an answer is useless.
        takes_conversations: Whether there is a chat template for conversations.
        num_proc: Processes that tokenise. They do not change what is read.
    """

    text_field: str = "text"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    split: str = "train"
    on_bad_record: OnBadRecord = "error"
    needs_answers: bool = True
    takes_conversations: bool = True
    num_proc: int = 1

    def __post_init__(self) -> None:
        if self.prompt_field == self.completion_field:
            raise UserError(f"--prompt_field and --completion_field both name '{self.prompt_field}'; they must differ")

    @property
    def content(self) -> tuple[object, ...]:
        """The settings that decide which records are read, and how."""
        return tuple(getattr(self, each.name) for each in fields(self) if each.name != "num_proc")

    @property
    def maps_fields(self) -> bool:
        """Whether the user named the fields of prompts and completions."""
        return (self.prompt_field, self.completion_field) != ("prompt", "completion")


class Place(NamedTuple):
    """Where the reading of sources goes on.

    Attributes:
        source: Index of the source.
        num_read: Rows of it (records, pieces of a text, documents) that were read, bad and blank ones too.
        fields: The fields that decided how its rows are read; None: those of its first good row will.
        mark: Where the hub has to go on, and how many rows lie before that.
        numbers: What the account had counted.
    """

    source: int = 0
    num_read: int = 0
    fields: tuple[str, ...] | None = None
    mark: tuple[int, dict[str, Any]] | None = None
    numbers: tuple[int, ...] = (0,) * len(NUMBERS)


@dataclass
class Account:
    """What was read so far.

    Attributes:
        sources: The sources that held records.
        num_records: Documents read, except blank ones and those that could not be read.
        num_conversations: How many of them are conversations.
        forms: How records were read, such as "Alpaca ('instruction', 'output')".
        unread: Names of fields that records have and that were not read.
        left_out: Names of files that were not read, by reason.
        num_blank: Records without a text or an answer.
        num_cut: Records whose answer was cut off, so that it is trained on without an end.
        num_bad: Records that could not be used.
        num_unencodable: How many of those had been read, and could not be encoded.
        bad: What was wrong with the first of them.
    """

    sources: list[str] = field(default_factory=list)
    num_records: int = 0
    num_conversations: int = 0
    forms: list[str] = field(default_factory=list)
    unread: dict[str, None] = field(default_factory=dict)  # in order of their appearance
    left_out: dict[str, list[str]] = field(default_factory=dict)
    num_blank: int = 0
    num_cut: int = 0
    num_bad: int = 0
    num_unencodable: int = 0
    bad: list[str] = field(default_factory=list)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The counts of records."""
        return tuple(getattr(self, name) for name in NUMBERS)

    @numbers.setter
    def numbers(self, numbers: Iterable[int]) -> None:
        for name, number in zip(NUMBERS, numbers, strict=True):
            setattr(self, name, number)

    def leave_out(self, name: object, reason: str) -> None:
        """Notes a file that is not read."""
        self.left_out.setdefault(reason, []).append(str(name))

    def take_form(self, form: str) -> None:
        """Notes how records are read."""
        if form not in self.forms:
            self.forms.append(form)

    def take_unread(self, fields: Iterable[str]) -> None:
        """Notes fields that are not read."""
        self.unread.update(dict.fromkeys(fields))

    def take_bad(self, error: UserError, on_bad_record: OnBadRecord) -> None:
        """Counts a record that cannot be used, or raises if bad records are errors.

        Raises:
            UserError: Bad records are errors.
        """
        if on_bad_record != "skip":
            text = str(error)
            raise UserError(text if text.endswith(SKIP_HINT) else text + SKIP_HINT) from None
        self.num_bad += 1
        if len(self.bad) < NAMED:
            self.bad.append(str(error))

    def take_unencodable(self, error: UserError, on_bad_record: OnBadRecord) -> None:
        """The same for a record that has been counted as read."""
        self.take_bad(error, on_bad_record)
        self.num_unencodable += 1

    def refuse_if_all_bad(self) -> None:
        """Raises UserError if all records were bad."""
        if self.num_bad:
            raise UserError(f"none of the records can be used ({self.num_bad:,} bad): {self.bad[0]}")

    def line(self, num_tokens: int) -> str:
        """Returns one line that says what was read, and what was skipped and why."""
        where = self.sources[0] if len(self.sources) == 1 else f"{len(self.sources):,} sources"
        records = quantity(self.num_records - self.num_unencodable, "record")
        read = f"read {where}: {records}, {quantity(num_tokens, 'token')}"
        if self.forms:
            read += f", as {' and '.join(self.forms)}"
        if self.unread:
            read += f"; not read: {_some([repr(name) for name in self.unread], shown=NAMED_FIELDS)}"
        cut = [f"{self.num_cut:,} of finish_reason 'length' trained without an end"] if self.num_cut else []
        return "; ".join([read, *cut, *self._skipped()])

    def _skipped(self) -> list[str]:
        parts = [f"skipped {_some(names)} ({reason})" for reason, names in self.left_out.items()]
        if self.num_blank:
            parts.append(f"skipped {quantity(self.num_blank, 'empty record')}")
        if self.num_bad:
            parts.append(f"skipped {quantity(self.num_bad, 'bad record')}: {_some(self.bad, self.num_bad, ' | ')}")
        return parts


def say(line: str) -> None:
    """Writes a line to standard error, once per run even with several processes and measurements."""
    if os.environ.get("RANK", "0") == "0" and line not in _SAID:
        _SAID.add(line)
        print(f"decausal: {line}", file=sys.stderr)


def _some(names: list[str], number: int | None = None, separator: str = ", ", shown: int = NAMED) -> str:
    first = names[:shown]
    rest = (len(names) if number is None else number) - len(first)
    return separator.join(first) + (f" and {rest:,} more" if rest else "")
