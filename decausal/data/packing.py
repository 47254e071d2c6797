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
from decausal.wording import quantity

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
        remedy = f"the longest has {quantity(self.longest_dropped, 'token')}; raise --max_length"
        row = f"a row of {quantity(sequence_length, 'token')}"
        if not self.num_rows:
            raise UserError(f"every document is longer than {row}: {remedy}")
        dropped = quantity(self.num_dropped, "document")
        warnings.warn(f"left out {dropped} longer than {row}: {remedy}", stacklevel=3)


def pack(encoded: Iterable[Encoded], sequence_length: int, pad_token_id: int) -> Iterator[Row]:
    """Yields rows that hold all the tokens of the documents; see `Packer`.

    Raises:
        UserError: Every document is longer than a row and may not be cut.
    """
    packer = Packer(sequence_length, pad_token_id)
    yield from packer.rows(encoded)
    packer.counts.report_dropped(sequence_length)


class OpenRow:
    """A row that is being filled.

    Args:
        row: Its tokens so far, and padding after them.
        num_started: Documents whose first token it holds.
    """

    def __init__(self, row: Row, num_started: int = 0) -> None:
        self.row, self.num_started = row, num_started
        self.space = int((row.document_ids == PADDING_DOCUMENT).sum())
        self.num_pieces = int(row.document_ids.max()) + 1

    def append(self, document: Encoded, start: int) -> int:
        """Appends as much of the document from token `start` on as fits, after what comes before every piece of it.
        Returns the number of tokens from `start` on."""
        if start:
            self._fill(document, slice(0, document.num_before))
        length = min(len(document.ids) - start, self.space)
        self._fill(document, slice(start, start + length))
        self.num_pieces += 1
        self.num_started += start == 0
        return length

    def _fill(self, document: Encoded, piece: slice) -> None:
        first, length = len(self.row.clean_ids) - self.space, piece.stop - piece.start
        place = slice(first, first + length)
        self.row.clean_ids[place] = document.ids[piece]
        self.row.is_maskable[place] = document.is_maskable[piece]
        self.row.document_ids[place] = self.num_pieces
        self.space -= length


def _space(row: OpenRow) -> int:
    return row.space


class Packer:
    """Packs documents into rows.

    Splittable documents form one stream of tokens in their order, which fills one row after another. Only the last row
    is padded. A document that continues in the next row counts as a new document there: it cannot see the row before,
    and begins with the same BOS. A piece of a single token is packed too, although no shift-1 model can predict it, so
    that the rows hold the whole stream.

    A document that may not be split goes into the fullest of at most `OPEN_ROWS` rows that it fits in. Documents longer
    than a row are left out and counted.
    """

    def __init__(self, sequence_length: int, pad_token_id: int) -> None:
        if sequence_length < 2:
            raise UserError(f"--max_length {sequence_length}: a row needs at least 2 tokens")
        self.sequence_length = sequence_length
        self.pad_token_id = pad_token_id
        self.counts = Counts()
        self.stream = self._new_row()  # of splittable documents
        self.open_rows: list[OpenRow] = []  # of others; sorted by space, the fullest first

    def rows(self, encoded: Iterable[Encoded]) -> Iterator[Row]:
        """Yields rows as they fill up and counts them. Rows of splittable and other documents are interleaved."""
        for document in encoded:
            yield from self.add(document)
        yield from self.end()

    def add(self, document: Encoded) -> Iterator[Row]:
        """Packs a document, and yields the rows that are filled by it."""
        if not document.splittable:
            yield from map(self._close, self._place(document))
            return
        if self.sequence_length <= document.num_before:
            raise UserError(
                f"--max_length {self.sequence_length}: a row needs at least {document.num_before + 1} tokens"
            )
        start = 0
        while start < len(document.ids):
            start += self.stream.append(document, start)
            if not self.stream.space:
                yield self._close(self.stream)
                self.stream = self._new_row()

    def end(self) -> Iterator[Row]:
        """Yields the rows that are not full, and begins new ones."""
        unfinished, self.open_rows = self.open_rows, []
        if self.stream.space < self.sequence_length:
            unfinished.append(self.stream)
            self.stream = self._new_row()
        yield from map(self._close, unfinished)

    def _place(self, document: Encoded) -> list[OpenRow]:
        """Puts the document into an open row, and returns the rows that are now closed."""
        length = len(document.ids)
        if length > self.sequence_length:
            self.counts.num_dropped += 1
            self.counts.longest_dropped = max(self.counts.longest_dropped, length)
            return []
        closed: list[OpenRow] = []
        fullest_fitting = bisect_left(self.open_rows, length, key=_space)
        if fullest_fitting < len(self.open_rows):
            row = self.open_rows.pop(fullest_fitting)
        else:
            row = self._new_row()
            if len(self.open_rows) == OPEN_ROWS:
                closed.append(self.open_rows.pop(0))
        row.append(document, 0)
        if row.space:
            insort(self.open_rows, row, key=_space)
        else:
            closed.append(row)
        return closed

    def _new_row(self) -> OpenRow:
        length = self.sequence_length
        return OpenRow(
            Row(
                np.full(length, self.pad_token_id, dtype=np.int32),
                np.full(length, PADDING_DOCUMENT, dtype=np.int32),
                np.zeros(length, dtype=bool),
            )
        )

    def _close(self, row: OpenRow) -> Row:
        self.counts.num_rows += 1
        self.counts.num_tokens += self.sequence_length - row.space
        self.counts.num_documents += row.num_started
        return row.row
