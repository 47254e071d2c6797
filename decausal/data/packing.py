"""From encoded documents to rows of one length, with as little padding as possible."""

from __future__ import annotations

import warnings
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32

from decausal.data.encode import Encoded
from decausal.errors import UserError

PADDING_DOCUMENT = -1
OPEN_ROWS = 64


@dataclass(frozen=True)
class Row:
    """One training row of T tokens.

    Attributes:
        clean_ids: Token ids, padding at the end.
        document_ids: 0, 1, ... in the order in which documents stand in the row; -1 for padding.
        is_maskable: Which tokens noise may mask; never padding.
    """

    clean_ids: Int32[np.ndarray, " T"]
    document_ids: Int32[np.ndarray, " T"]
    is_maskable: Bool[np.ndarray, " T"]


@dataclass
class Counts:
    """What has been packed so far.

    Attributes:
        num_rows: Rows yielded.
        num_tokens: Tokens in them, without padding.
        num_documents: Documents whose first token they hold.
        num_dropped: Documents left out because they are longer than a row and may not be cut.
        longest_dropped: Tokens of the longest of these.
    """

    num_rows: int = 0
    num_tokens: int = 0
    num_documents: int = 0
    num_dropped: int = 0
    longest_dropped: int = 0

    def report_dropped(self, sequence_length: int) -> None:
        """Warns about documents that were left out. Raises UserError if no others are left."""
        if not self.num_dropped:
            return
        remedy = f"the longest has {self.longest_dropped} tokens; raise --max_length"
        if not self.num_rows:
            raise UserError(f"every document is longer than a row of {sequence_length} tokens: {remedy}")
        dropped = "1 document" if self.num_dropped == 1 else f"{self.num_dropped} documents"
        warnings.warn(f"left out {dropped} longer than a row of {sequence_length} tokens: {remedy}", stacklevel=3)


def pack(encoded: Iterable[Encoded], sequence_length: int, pad_token_id: int) -> Iterator[Row]:
    """Yields rows that hold all the tokens of the documents; see `Packer`.

    Raises:
        UserError: Every document is longer than a row and may not be cut.
    """
    packer = Packer(sequence_length, pad_token_id)
    yield from packer.rows(encoded)
    packer.counts.report_dropped(sequence_length)


class _OpenRow:
    """A row that is being filled."""

    def __init__(self, sequence_length: int, pad_token_id: int) -> None:
        self.row = Row(
            np.full(sequence_length, pad_token_id, dtype=np.int32),
            np.full(sequence_length, PADDING_DOCUMENT, dtype=np.int32),
            np.zeros(sequence_length, dtype=bool),
        )
        self.space = sequence_length
        self.num_pieces = 0
        self.num_started = 0

    def append(self, document: Encoded, start: int) -> int:
        """Appends as much of the document from token `start` on as fits. Returns the number of tokens."""
        length = min(len(document.ids) - start, self.space)
        first = len(self.row.clean_ids) - self.space
        place, piece = slice(first, first + length), slice(start, start + length)
        self.row.clean_ids[place] = document.ids[piece]
        self.row.is_maskable[place] = document.is_maskable[piece]
        self.row.document_ids[place] = self.num_pieces
        self.space -= length
        self.num_pieces += 1
        self.num_started += start == 0
        return length


def _space(row: _OpenRow) -> int:
    return row.space


class Packer:
    """Packs documents into rows.

    Splittable documents form one stream of tokens in their order, cut every `sequence_length` tokens. Only the last row
    is padded. A document that continues in the next row counts as a new document there: it cannot see the row before. A
    piece of a single token is packed too, although no shift-1 model can predict it, so that the rows hold the stream
    exactly.

    A document that may not be split goes into the fullest of at most `OPEN_ROWS` rows that it fits in. Documents longer
    than a row are left out and counted.
    """

    def __init__(self, sequence_length: int, pad_token_id: int) -> None:
        if sequence_length < 2:
            raise UserError(f"--max_length {sequence_length}: a row needs at least 2 tokens")
        self.sequence_length = sequence_length
        self.pad_token_id = pad_token_id
        self.counts = Counts()

    def rows(self, encoded: Iterable[Encoded]) -> Iterator[Row]:
        """Yields rows as they fill up and counts them. Rows of splittable and other documents are interleaved."""
        stream = self._new_row()
        open_rows: list[_OpenRow] = []  # sorted by space, the fullest first
        for document in encoded:
            if not document.splittable:
                yield from map(self._close, self._place(document, open_rows))
                continue
            start = 0
            while start < len(document.ids):
                start += stream.append(document, start)
                if not stream.space:
                    yield self._close(stream)
                    stream = self._new_row()
        yield from map(self._close, open_rows)
        if stream.space < self.sequence_length:
            yield self._close(stream)

    def _place(self, document: Encoded, open_rows: list[_OpenRow]) -> list[_OpenRow]:
        """Puts the document into an open row, and returns the rows that are now closed."""
        length = len(document.ids)
        if length > self.sequence_length:
            self.counts.num_dropped += 1
            self.counts.longest_dropped = max(self.counts.longest_dropped, length)
            return []
        closed: list[_OpenRow] = []
        fullest_fitting = bisect_left(open_rows, length, key=_space)
        if fullest_fitting < len(open_rows):
            row = open_rows.pop(fullest_fitting)
        else:
            row = self._new_row()
            if len(open_rows) == OPEN_ROWS:
                closed.append(open_rows.pop(0))
        row.append(document, 0)
        if row.space:
            insort(open_rows, row, key=_space)
        else:
            closed.append(row)
        return closed

    def _new_row(self) -> _OpenRow:
        return _OpenRow(self.sequence_length, self.pad_token_id)

    def _close(self, row: _OpenRow) -> Row:
        self.counts.num_rows += 1
        self.counts.num_tokens += self.sequence_length - row.space
        self.counts.num_documents += row.num_started
        return row.row
