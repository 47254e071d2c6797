"""From files to texts and objects, read in bounded pieces: text, JSON Lines, JSON arrays, CSV, Parquet, Arrow.

A reader of objects yields (where, object). For what cannot be read, the object is a `UserError` that says why, and the
caller may go on.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from decausal.data import files
from decausal.data.files import ARROW_STREAM, File
from decausal.errors import UserError
from decausal.files import json_error, parsed_json

if TYPE_CHECKING:
    import pyarrow

Located = tuple[str, Any]
Columns = Callable[[Sequence[str], str], Sequence[str]]
"""Called with the names of a table's columns and where it was read; returns the columns to read."""

PIECE_BYTES = 1 << 20
BATCH_ROWS = 256
NO_TEXTS = {
    b"PK\x03\x04": "a zip archive, or a document of an office program); unpack it, or save it as text or CSV",
    b"%PDF": "a PDF); extract its text",
    b"\xff\xfe": "UTF-16); convert it to UTF-8",
    b"\xfe\xff": "UTF-16); convert it to UTF-8",
}
WHITESPACE = re.compile(r"[ \t\r\n]*")


# Text


def text_pieces(file: File) -> Iterator[dict[str, Any]]:
    """Yields the file as one record, or above `PIECE_BYTES` as records of whole lines (or parts of very long ones)."""
    if file.format == "binary":
        raise UserError(f"{file} is not text ({_what_else(file.head)}")
    offset = 0
    pieces = _pieces(file)
    piece = next(pieces, b"")
    while piece:
        following = next(pieces, b"")
        record: dict[str, Any] = {"origin": str(file), "text": _decode(piece, file, offset)}
        if offset or following:
            record |= {"origin": f"{file}, byte {offset}", "is_start": not offset, "is_end": not following}
        yield record
        offset += len(piece)
        piece = following


def _what_else(head: bytes) -> str:
    if head[257:262] == b"ustar":
        return "a tar archive); unpack it"
    return next(
        (what for magic, what in NO_TEXTS.items() if head.startswith(magic)), "it holds zero bytes); leave it out"
    )


def _pieces(file: File) -> Iterator[bytes]:
    lines: list[bytes] = []
    size = 0
    for line in file.lines(PIECE_BYTES):
        if size and size + len(line) > PIECE_BYTES:
            piece = b"".join(lines)
            end = _whole_characters(piece)
            yield piece[:end]
            lines, size = [piece[end:]], len(piece) - end
        lines.append(line)
        size += len(line)
    yield b"".join(lines)


def _whole_characters(content: bytes) -> int:
    """Returns the number of bytes before a character that is cut off at the end."""
    for back in range(1, min(4, len(content)) + 1):
        byte = content[-back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(content) if back >= length else len(content) - back
        if byte < 0x80:
            break
    return len(content)


def _decode(content: bytes, file: File, offset: int) -> str:
    """Decodes UTF-8 from `offset` bytes into the file, without a byte-order mark."""
    try:
        return content.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 text (byte {offset + error.start}); convert it to UTF-8 or leave it out"
        ) from None


# Objects


def objects(file: File, columns: Columns, start: int = 0) -> Iterator[Located]:
    """Yields the objects of a file that holds records, whatever its format, without the first `start` of them."""
    if file.format == "parquet":
        return _parquet_rows(file, columns, start)
    if file.format == "arrow":
        return _arrow_rows(file, columns, start)
    if file.format == "jsonl":
        return _json_lines(file, start)
    return islice(_csv_rows(file, columns) if file.format == "csv" else _json_array(file), start, None)


def _json_lines(file: File, start: int) -> Iterator[Located]:
    found = ((number, line) for number, line in _decoded_lines(file) if isinstance(line, UserError) or line.strip())
    for number, line in islice(found, start, None):
        origin = f"{file}:{number}"
        is_bad = isinstance(line, UserError)
        yield origin, line if is_bad else parse_json(line, origin, "each line holds one JSON object")


def _decoded_lines(file: File) -> Iterator[tuple[int, str | UserError]]:
    """Yields numbered lines. A line that is too long or not UTF-8 comes as an error."""
    offset = number = 0
    is_rest = False
    for line in file.lines(files.MAX_RECORD_BYTES):
        is_cut = len(line) == files.MAX_RECORD_BYTES and not line.endswith(b"\n")
        number += not is_rest
        if is_cut and not is_rest:
            yield number, UserError(f"{file}:{number}: {_too_long()}")
        elif not is_rest:
            try:
                yield number, _decode(line, file, offset)
            except UserError as error:
                yield number, error
        offset += len(line)
        is_rest = is_cut


def parse_json(text: str, origin: str, expected: str) -> Any:
    """Returns what a JSON text holds, or the error that says why it cannot be read."""
    try:
        return parsed_json(text)
    except ValueError as error:
        return _json_error(error, text, origin, expected)


def _json_error(error: ValueError, text: str, origin: str, expected: str, lines_before: int = 0) -> UserError:
    if not isinstance(error, json.JSONDecodeError):
        return UserError(f"{origin}: {error}")
    line = error.lineno + lines_before
    where = f"line {line}, column {error.colno}" if line > 1 else f"column {error.colno}"
    return UserError(f"{origin}: not JSON ({error.msg.removesuffix(' at')} at {where}); {expected}")


def _too_long() -> str:
    return f"one record of more than {files.MAX_RECORD_BYTES >> 20} MiB; cut it into several"


class _ArrayReader:
    """The elements of one JSON array, decoded one by one from pieces of the file."""

    expected = "the file holds one array of JSON objects"

    def __init__(self, file: File) -> None:
        self.file = file
        self._pieces = _pieces(file)
        self._offset = 0
        self._lines_before = 0
        self._text = ""
        self._place = 0

    def __iter__(self) -> Iterator[Located]:
        opening = self._next_mark()
        if not opening:
            return
        if opening != "[":
            raise self._no_array()
        self._place += 1
        number = 0
        while self._next_mark() not in ("]", ""):
            number += 1
            yield f"{self.file}, record {number}", self._element()
            if self._next_mark() == ",":
                self._place += 1
            elif self._next_mark() != "]":
                raise self._error(json.JSONDecodeError("Expecting ',' delimiter", self._text, self._place))
        if self._next_mark() != "]":
            raise self._error(json.JSONDecodeError("Expecting value", self._text, self._place))

    def _no_array(self) -> UserError:
        while len(self._text) < files.MAX_RECORD_BYTES and self._more():
            pass
        found = parse_json(self._text, str(self.file), self.expected)
        if isinstance(found, UserError):
            return found
        return UserError(f"{self.file}: {kind(found)} where an array of records is expected: [{{...}}, {{...}}]")

    def _element(self) -> Any:
        """Decodes the value at the current place, reading on while the value may be incomplete."""
        wanted = PIECE_BYTES
        while True:
            try:
                value, self._place = json.JSONDecoder().raw_decode(self._text, self._place)
                return value
            except json.JSONDecodeError as error:
                if len(self._text) - self._place > files.MAX_RECORD_BYTES:
                    raise UserError(f"{self.file}: {_too_long()}") from None
                if not self._more(wanted):
                    raise self._error(error) from None
                wanted *= 2  # a long value is decoded again a few times, not once for each piece
            except (ValueError, RecursionError) as error:
                raise self._error(error) from None

    def _error(self, error: ValueError | RecursionError) -> UserError:
        return _json_error(json_error(error), self._text, str(self.file), self.expected, self._lines_before)

    def _next_mark(self) -> str:
        """Moves to the next character that is not a space and returns it; "" at the end."""
        while True:
            spaces = WHITESPACE.match(self._text, self._place)
            self._place = spaces.end() if spaces else self._place
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def _more(self, at_least: int = 1) -> bool:
        """Reads more pieces and drops what has been decoded. Returns whether there was anything to read."""
        self._lines_before += self._text.count("\n", 0, self._place)
        parts = [self._text[self._place :]]
        self._place = 0
        num_read = 0
        while num_read < at_least and (piece := next(self._pieces, b"")):
            parts.append(_decode(piece, self.file, self._offset))
            self._offset += len(piece)
            num_read += len(piece)
        self._text = "".join(parts)
        return num_read > 0


def _json_array(file: File) -> Iterator[Located]:
    return iter(_ArrayReader(file))


def _csv_rows(file: File, columns: Columns) -> Iterator[Located]:
    csv.field_size_limit(files.MAX_RECORD_BYTES)
    rows = csv.reader(_csv_lines(file), delimiter=_delimiter(file), strict=True)
    names: list[str] = []
    try:
        for number, row in enumerate(rows):
            if not names:
                names = row
                columns(names, f"{file}, row 1")
                continue
            if not row:  # an empty line
                continue
            origin = f"{file}, row {number}"
            if len(row) == len(names):
                yield origin, dict(zip(names, row, strict=True))
            else:
                yield origin, UserError(f"{origin}: {len(row)} fields where the header has {len(names)}")
    except csv.Error as error:
        raise UserError(f"{file}, line {rows.line_num}: not CSV ({error})") from None


def _csv_lines(file: File) -> Iterator[str]:
    for _, line in _decoded_lines(file):
        if isinstance(line, UserError):
            raise line  # a quoted field may span lines, so the start of the next row is not known
        yield line


def _delimiter(file: File) -> str:
    if file.suffix == ".tsv":
        return "\t"
    header = file.head.split(b"\n")[0].decode("utf-8", errors="replace")
    return max(",;\t|", key=header.count)


def _parquet_rows(file: File, columns: Columns, start: int) -> Iterator[Located]:
    import pyarrow.parquet

    if file.compression:
        raise UserError(f"{file}: a parquet file inside a {file.compression} file; decompress it")
    try:
        with pyarrow.parquet.ParquetFile(file.path) as parquet:
            wanted = list(columns(parquet.schema_arrow.names, f"{file}, row 1"))
            yield from _numbered(file, parquet.iter_batches(BATCH_ROWS, columns=wanted), start)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} is not a whole parquet file ({' '.join(str(error).split())})") from None


def _arrow_rows(file: File, columns: Columns, start: int) -> Iterator[Located]:
    import pyarrow

    if file.compression:
        raise UserError(f"{file}: an arrow file inside a {file.compression} file; decompress it")
    try:
        with pyarrow.memory_map(str(file.path)) as mapped:
            batches = (
                batch.select(list(columns(batch.schema.names, f"{file}, row 1"))).slice(first, BATCH_ROWS)
                for batch in _arrow_batches(file, mapped)
                for first in range(0, batch.num_rows, BATCH_ROWS)
            )
            yield from _numbered(file, batches, start)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} is not a whole arrow file ({' '.join(str(error).split())})") from None


def _numbered(file: File, batches: Iterable[pyarrow.RecordBatch], start: int) -> Iterator[Located]:
    number = 0
    for batch in batches:
        num_before = min(max(start - number, 0), batch.num_rows)
        number += num_before
        for row in batch.slice(num_before).to_pylist():
            number += 1
            yield f"{file}, row {number}", row


def _arrow_batches(file: File, mapped: pyarrow.MemoryMappedFile) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow

    if file.head.startswith(ARROW_STREAM):
        yield from pyarrow.ipc.open_stream(mapped)
        return
    reader = pyarrow.ipc.open_file(mapped)
    yield from (reader.get_batch(index) for index in range(reader.num_record_batches))


def kind(value: Any) -> str:
    """Returns what JSON calls a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
