"""From sources to records: one record per document, read one by one, whatever the format.

A record is {"origin": where it was read, ...} with one of three contents:
    "text": a document to model as it is;
    "messages": a conversation, a list of messages, see `decausal.data.messages.read_messages`, and maybe "tools"
        and "chat_template_kwargs";
    "prompt" and "completion"; tasks with exact answers also name their "task".
The text of a long file comes in pieces, each a record with "is_start" and "is_end". A record that was cut off, as its
field "finish_reason" says, has "is_end": False too: it is trained without an end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice

from decausal.data.corpus import stdlib_documents
from decausal.data.files import File
from decausal.data.formats import Located, kind, objects, text_pieces
from decausal.data.forms import Form, Record, UnknownFormError, form_of
from decausal.data.messages import Message
from decausal.data.reading import Account, Place, Reading
from decausal.data.sources import Data, Source, Stdlib, Tasks, find_sources
from decausal.data.tables import HubDataset, SavedDataset
from decausal.errors import UserError

ROWS_PER_MARK = 256


def read_documents(data: Data, reading: Reading | None = None) -> Iterator[Record]:
    """Returns the documents that `data` names, read one at a time, without blank ones.

    Args:
        data: See `decausal.data.sources.find_sources`. Files of JSON Lines, JSON arrays, CSV, Parquet and Arrow hold
            records; any other text file is one document.
        reading: Which fields and split to read, and what a bad record does.

    Raises:
        UserError: Nothing was found, a file cannot be read, or a record is malformed. Names the file and the line.
    """
    reading = reading or Reading()
    account = Account()
    return read_sources(find_sources(data, reading.split, account), reading, account)


def read_sources(sources: list[Source], reading: Reading, account: Account) -> Iterator[Record]:
    """Yields the documents of sources already found, and counts them in `account`; see `read_documents`."""
    return (record for record, _ in read_from(Place(), sources, reading, account))


def read_from(
    place: Place, sources: Sequence[Source], reading: Reading, account: Account
) -> Iterator[tuple[Record, Place]]:
    """Yields the documents of sources from a place on, each with the place after it; see `read_sources`."""
    for index in range(place.source, len(sources)):
        source = sources[index]
        reader = _Reader(source, reading, account, place if index == place.source else Place())
        if str(source) not in account.sources:
            account.sources.append(str(source))
        try:
            for record in reader:
                if _is_blank(record, reading.needs_answers):
                    account.num_blank += 1
                else:
                    account.num_records += record.get("is_start", True)
                    account.num_conversations += "messages" in record
                    yield record, reader.place(index)
        except UnknownFormError as error:
            if not (isinstance(source, File) and source.format == "csv" and not source.is_named):
                account.take_bad(error, reading.on_bad_record)
            else:  # many directories hold tables of other things too
                account.sources.remove(str(source))
                account.leave_out(source, "no column that is read")
        except UserError as error:  # an error of the file: nothing more can be read from it
            if isinstance(source, HubDataset):  # nobody wants a run without it because the network is down
                raise
            account.take_bad(error, reading.on_bad_record)
    if not account.num_records:
        raise UserError(_nothing_read(sources, account))


def begin_with_conversations(sources: Sequence[Source], reading: Reading) -> bool:
    """Returns whether one of the sources begins with a conversation. Of a directory's files, one is looked at."""
    reading = replace(reading, on_bad_record="skip")
    kinds = {(source.path.parent, source.suffix) if isinstance(source, File) else source: source for source in sources}
    for source in kinds.values():
        with suppress(UserError):  # reported where the source is read
            for record, _ in read_from(Place(), [source], reading, Account()):
                if "messages" in record:
                    return True
                break
    return False


def _nothing_read(sources: Sequence[Source], account: Account) -> str:
    where = str(sources[0]) if len(sources) == 1 else f"{sources[0]} and {len(sources) - 1} more"
    why = "it has no documents"
    if account.num_bad:
        why = f"none of its records can be used ({account.num_bad} bad): {account.bad[0]}"
    elif account.num_blank:
        why = f"all of its documents are empty ({account.num_blank})"
    return f"no text in {where}: {why}"


def _whole_records(source: File | Stdlib | Tasks) -> Iterator[Record]:
    if isinstance(source, Tasks):
        return _task_records(source)
    if isinstance(source, Stdlib):
        return ({"origin": f"{source}/{path}", "text": text} for path, text in stdlib_documents(source.split))
    return text_pieces(source)


def _task_records(source: Tasks) -> Iterator[Record]:
    for number, example in enumerate(source.examples(), start=1):
        yield {
            "origin": f"{source}, example {number}",
            "prompt": example.prompt,
            "completion": example.completion,
            "task": example.task.name,
        }


class _Reader:
    """Makes records from one source, from a place on. The first good row decides the form of all of them."""

    def __init__(self, source: Source, reading: Reading, account: Account, place: Place) -> None:
        self._source, self._reading, self._account = source, reading, account
        self._num_read, self._fields, self._mark = place.num_read, place.fields, place.mark
        self._form = None if place.fields is None else form_of(place.fields, str(source), reading)

    def place(self, index: int) -> Place:
        """Returns the place after the record that was yielded last."""
        return Place(index, self._num_read, self._fields, self._mark, self._account.numbers)

    def __iter__(self) -> Iterator[Record]:
        source = self._source
        if isinstance(source, HubDataset) and source.is_streamed:
            return self._of_rows(self._streamed_rows(source))
        if isinstance(source, HubDataset | SavedDataset):
            return self._of_rows(self._table_rows(source))
        if isinstance(source, File) and source.format not in ("text", "binary"):
            return self._of_rows(objects(source, self._columns, self._num_read))
        return self._counted(_whole_records(source))

    def _counted(self, records: Iterable[Record]) -> Iterator[Record]:
        for record in islice(records, self._num_read, None):
            self._num_read += 1
            yield record

    def _table_rows(self, source: HubDataset | SavedDataset) -> Iterator[Located]:
        wanted = self._columns(source.table.column_names, f"{source}, row 1")
        rows = source.table.select_columns(list(wanted))  # nothing else is decoded: images, audio
        rows = rows.select(range(self._num_read, len(rows)))
        return ((f"{source}, row {number}", row) for number, row in enumerate(rows, start=self._num_read + 1))

    def _streamed_rows(self, source: HubDataset) -> Iterator[Located]:
        """Reads on where the hub's own state says, and takes such a state now and then."""
        num_read, state = self._mark or (0, None)
        rows = source.stream
        if rows.column_names is not None:
            rows = rows.select_columns(list(self._columns(rows.column_names, f"{source}, row 1")))
        if state is not None:
            rows.load_state_dict(state)
        for number, row in enumerate(rows, start=num_read + 1):
            if number > self._num_read:
                yield f"{source}, row {number}", row
            if number % ROWS_PER_MARK == 0:
                self._mark = number, rows.state_dict()

    def _columns(self, found: Sequence[str], origin: str) -> Sequence[str]:
        """Decides on the form of a table, whose columns are known before its rows."""
        form = self._form_of(found, origin)
        self._account.take_unread(form.unread(dict.fromkeys(found, ...)))
        return form.columns(found)

    def _of_rows(self, rows: Iterable[Located]) -> Iterator[Record]:
        """Yields a record per row. Bad rows raise, or are counted and skipped."""
        for origin, row in rows:
            self._num_read += 1
            try:
                record = self._record(origin, row)
            except UserError as error:
                self._account.take_bad(error, self._reading.on_bad_record)
            else:
                self._account.num_cut += not record.get("is_end", True)
                yield record

    def _record(self, origin: str, row: object) -> Record:
        if isinstance(row, UserError):
            raise row
        if not isinstance(row, dict):
            raise UserError(f'{origin}: {kind(row)} where an object such as {{"text": "..."}} is expected')
        form = self._form_of(row, origin)
        record = form.record(row, origin)
        self._account.take_unread(form.unread(row))
        if "messages" in record and not self._reading.takes_conversations:
            raise UserError(
                f"{origin}: a conversation, and pretraining reads plain text, or prompts and completions; convert and "
                "its recipe fine-tune read conversations"
            )
        return record

    def _form_of(self, found: Iterable[str], origin: str) -> Form:
        if self._form is None:
            self._form, self._fields = form_of(list(found), origin, self._reading), tuple(found)
            self._account.take_form(str(self._form))
        return self._form


def _is_blank(record: Record, needs_answers: bool) -> bool:
    """Returns whether there is nothing to learn from: no text, completion or answer, or no prompt if those are not
    needed."""
    if "messages" in record:
        messages = record["messages"]
        if not needs_answers:
            return not any(_says_something(message) for message in messages)
        answers = (message for message in messages if message["role"] == "assistant" and message.get("weight", 1))
        return not any(_says_something(message) for message in answers)
    if not needs_answers and "prompt" in record:
        return not (record["prompt"] + record["completion"]).strip()
    return not record.get("text", record.get("completion", "")).strip()


def _says_something(message: Message) -> bool:
    return bool((message["content"] or "").strip() or message.get("tool_calls"))
