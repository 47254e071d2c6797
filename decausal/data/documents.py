"""Sources to records: one record per document, read one by one, whatever the format.

A record is {"origin": where it was read, ...} with one of three contents:
    "text": a document to model as it is;
    "messages": a conversation, a list of {"role", "content"};
    "prompt" and "completion"; those of a task with exact answers also name their "task".
The text of a long file comes in pieces, each a record with "is_start" and "is_end".
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Collection, Iterable, Iterator
from gzip import BadGzipFile
from typing import Any

import pyarrow
import pyarrow.parquet

from decausal.data.corpus import stdlib_documents
from decausal.data.sources import Data, File, HubDataset, Source, Tasks, find_sources
from decausal.errors import UserError

Record = dict[str, Any]
Located = tuple[str, Any]  # where an object was read, and the object

PIECE_BYTES = 1 << 20
PARQUET_BATCH_ROWS = 256
ARRAY_OF_OBJECTS = re.compile(rb"\s*\[\s*\{")


def read_documents(data: Data, *, text_field: str = "text", split: str = "train") -> Iterator[Record]:
    """Returns the documents that `data` names, read one at a time. Blank documents are left out.

    Args:
        data: a file, a directory, a glob, a hub data set ("name" or "name:config"), "stdlib", "stdlib-heldout",
            examples of tasks ("tasks", "tasks-heldout", "tasks:sorting+lookup:5000@7"), or a list of these. A .jsonl,
            .json or .parquet file holds records; any other text file is one document.
        text_field: the record's field that holds a plain text.
        split: which split of a hub data set.

    Raises:
        UserError: nothing was found, a file cannot be read, or a record is malformed. Names the file and the line.
    """
    return read_sources(find_sources(data, split), text_field)


def read_sources(sources: list[Source], text_field: str = "text") -> Iterator[Record]:
    """Yields the documents of sources already found; see `read_documents`."""
    num_blank = num_read = 0
    for source in sources:
        for record in _read(source, text_field):
            if _is_blank(record):
                num_blank += 1
            else:
                num_read += 1
                yield record
    if not num_read:
        where = str(sources[0]) if len(sources) == 1 else f"{sources[0]} and {len(sources) - 1} more"
        why = f"all of its documents are empty ({num_blank})" if num_blank else "it has no documents"
        raise UserError(f"no text in {where}: {why}")


def _read(source: Source, text_field: str) -> Iterator[Record]:
    if isinstance(source, HubDataset):
        rows = ((f"{source}, row {number}", row) for number, row in enumerate(source.table, start=1))
        return _records(rows, text_field)
    if isinstance(source, Tasks):
        return _task_records(source)
    if not isinstance(source, File):
        return ({"origin": f"{source}/{path}", "text": text} for path, text in stdlib_documents(source.split))
    if source.kind == ".parquet":
        return _records(_parquet_rows(source, text_field), text_field)
    if source.kind == ".jsonl":
        return _records(_json_lines(source), text_field)
    # In a directory of source code, a .json file is more often a document than a data set.
    if source.kind == ".json" and (source.is_named or ARRAY_OF_OBJECTS.match(source.head())):
        return _records(_json_array(source), text_field)
    return _text_pieces(source)


def _task_records(source: Tasks) -> Iterator[Record]:
    for number, example in enumerate(source.examples(), start=1):
        yield {
            "origin": f"{source}, example {number}",
            "prompt": example.prompt,
            "completion": example.completion,
            "task": example.task.name,
        }


# Files to text


def _lines(file: File) -> Iterator[bytes]:
    try:
        with file.open() as opened:
            yield from opened
    except (BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{file} is not a whole gzip file ({error})") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None


def _decode(content: bytes, file: File, offset: int) -> str:
    """Decodes UTF-8 that begins `offset` bytes into the file, without a byte-order mark."""
    try:
        return content.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 text (byte {offset + error.start}); convert it to UTF-8 or leave it out"
        ) from None


def _text_pieces(file: File) -> Iterator[Record]:
    """Yields the file as one record, or, beyond `PIECE_BYTES`, as records of whole lines."""
    offset = 0
    pieces = _pieces(file)
    piece = next(pieces, b"")
    while piece:
        following = next(pieces, b"")
        record: Record = {"origin": str(file), "text": _decode(piece, file, offset)}
        if offset or following:
            record |= {"origin": f"{file}, byte {offset}", "is_start": not offset, "is_end": not following}
        yield record
        offset += len(piece)
        piece = following


def _pieces(file: File) -> Iterator[bytes]:
    lines: list[bytes] = []
    size = 0
    for line in _lines(file):
        if size and size + len(line) > PIECE_BYTES:
            yield b"".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    yield b"".join(lines)


# Files to objects


def _json_lines(file: File) -> Iterator[Located]:
    offset = 0
    for number, line in enumerate(_lines(file), start=1):
        text = _decode(line, file, offset)
        offset += len(line)
        if text.strip():
            yield f"{file}:{number}", _parse_json(text, f"{file}:{number}", "each line holds one JSON object")


def _json_array(file: File) -> Iterator[Located]:
    text = _decode(b"".join(_lines(file)), file, 0)
    if not text.strip():
        return
    objects = _parse_json(text, str(file), "the file holds one array of JSON objects")
    if not isinstance(objects, list):
        raise UserError(f"{file}: {_kind(objects)} where an array of records is expected: [{{...}}, {{...}}]")
    yield from ((f"{file}, record {number}", object_) for number, object_ in enumerate(objects, start=1))


def _parse_json(text: str, origin: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise UserError(f"{origin}: not JSON ({error.msg} at {where}); {expected}") from None


def _parquet_rows(file: File, text_field: str) -> Iterator[Located]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as parquet:
            names = parquet.schema_arrow.names
            columns = list(_content_fields(names, f"{file}, row 1", text_field))
            for batch in parquet.iter_batches(PARQUET_BATCH_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} is not a whole parquet file ({' '.join(str(error).split())})") from None


# Objects to records


def _records(rows: Iterable[Located], text_field: str) -> Iterator[Record]:
    """Yields a record per object. The first one decides which fields all of a source's objects must have."""
    fields: tuple[str, ...] = ()
    for origin, content in rows:
        if not isinstance(content, dict):
            raise UserError(f'{origin}: {_kind(content)} where an object such as {{"text": "..."}} is expected')
        fields = fields or _content_fields(content, origin, text_field)
        missing = [field for field in fields if field not in content]
        if missing:
            raise UserError(f"{origin}: no field '{missing[0]}', which earlier records have; found {_listed(content)}")
        yield _record(content, fields, origin)


def _content_fields(found: Collection[str], origin: str, text_field: str) -> tuple[str, ...]:
    for fields in ((text_field,), ("messages",), ("prompt", "completion")):
        if all(field in found for field in fields):
            return fields
    hint = "" if not found else "; --text_field names another field to read as text"
    raise UserError(
        f"{origin}: found {_listed(found)}, but a record has '{text_field}', or 'messages', "
        f"or 'prompt' and 'completion'{hint}"
    )


def _record(content: dict[str, Any], fields: tuple[str, ...], origin: str) -> Record:
    if fields == ("messages",):
        return {"origin": origin, "messages": _messages(content["messages"], origin)}
    for field in fields:
        if not isinstance(content[field], str):
            raise UserError(f"{origin}: field '{field}' holds {_kind(content[field])}, a string is expected")
    if len(fields) == 1:
        return {"origin": origin, "text": content[fields[0]]}
    return {"origin": origin, **{field: content[field] for field in fields}}


def _messages(messages: Any, origin: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list):
        raise UserError(f"{origin}: field 'messages' holds {_kind(messages)}, a list of messages is expected")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise UserError(f"{origin}: message {number} is {_kind(message)}, where {{role, content}} is expected")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise UserError(f"{origin}: message {number} has no string '{key}'; found {_listed(message)}")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{origin}: no message has role 'assistant', so there is no answer to learn")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _is_blank(record: Record) -> bool:
    """Whether there is nothing to learn from: no text, no completion, or no answer."""
    if "messages" in record:
        return not any(message["content"].strip() for message in record["messages"] if message["role"] == "assistant")
    return not record.get("text", record.get("completion", "")).strip()


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def _listed(fields: Iterable[str]) -> str:
    return ", ".join(f"'{field}'" for field in fields) or "no fields"
