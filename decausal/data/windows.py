"""Packs the rows of data window by window, in the data's order, from any point that was recorded before."""

from __future__ import annotations

import json
import threading
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from decausal.data.documents import read_from
from decausal.data.encode import encode_each, encode_records
from decausal.data.forms import Record
from decausal.data.packing import Counts, OpenRow, Packer, Row
from decausal.data.reading import Account, Place, Reading
from decausal.data.row_file import record_type, records_of, rows_of
from decausal.data.rows import pad_token_id, share_of
from decausal.data.sources import Source
from decausal.errors import UserError


@dataclass(frozen=True)
class Material:
    """Everything that windows are made from.

    Attributes:
        sources: The data, read again and again.
        reading: How records are read.
        tokenizer: Of the model that will read the rows.
        sequence_length: Tokens per row, T.
        window_rows: Rows per window.
        data_fraction, seed: Which documents are kept; see `decausal.data.rows.load_rows`.
    """

    sources: Sequence[Source]
    reading: Reading
    tokenizer: PreTrainedTokenizerBase
    sequence_length: int
    window_rows: int
    data_fraction: float = 1.0
    seed: int = 0


@dataclass
class State:
    """The place in the data where a window begins, and what was read and packed before it.

    Attributes:
        place: Where reading goes on.
        num_passes: Passes over the data that have ended.
        pass_rows: Rows of the first pass, once it has ended.
        num_unencodable: Records that could not be encoded.
        counts: What was packed.
        forms, unread, bad: See `Account`.
        started: Documents that begin in each of the rows that are being filled.
        num_waiting: Rows that are packed, and belong to the window.
        rows: Records of these rows, and of those that are being filled.
    """

    place: Place = field(default_factory=Place)
    num_passes: int = 0
    pass_rows: int | None = None
    num_unencodable: int = 0
    counts: Counts = field(default_factory=Counts)
    forms: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    started: list[int] = field(default_factory=list)
    num_waiting: int = 0
    rows: np.ndarray | None = None

    def save(self, path: Path) -> None:
        """Writes the state to another file and renames that, so that a file with this name is complete."""
        facts = asdict(self) | {"rows": None}
        aside = path.with_suffix(".unfinished")
        with aside.open("wb") as file:
            rows = np.empty(0, dtype="u1") if self.rows is None else np.frombuffer(self.rows.tobytes(), dtype="u1")
            np.savez_compressed(file, facts=np.array(json.dumps(facts)), rows=rows)
        aside.replace(path)

    @classmethod
    def load(cls, path: Path, sequence_length: int) -> State | None:
        """Reads a state; None if there is none that is whole."""
        try:
            with path.open("rb") as file, np.load(file) as saved:
                facts: dict[str, Any] = json.loads(str(saved["facts"]))
                rows = np.frombuffer(saved["rows"].tobytes(), dtype=record_type(sequence_length))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return None
        source, num_read, fields, mark, numbers = facts.pop("place")
        place = Place(source, num_read, fields and tuple(fields), mark and tuple(mark), tuple(numbers))
        return cls(**facts | {"place": place, "counts": Counts(**facts["counts"]), "rows": rows})

    def account(self, sources: Sequence[Source]) -> Account:
        """Returns the account of what was read before."""
        read = sources if self.num_passes else sources[: self.place.source + 1]
        account = Account([str(source) for source in read], forms=self.forms, bad=self.bad)
        account.take_unread(self.unread)
        account.numbers = self.place.numbers
        account.num_bad += self.num_unencodable
        account.num_unencodable = self.num_unencodable
        return account


class StoppedError(Exception):
    """A window is no longer wanted."""


class Windows:
    """Makes windows one after another, and notes where the next one begins.

    Args:
        material: What to make them of.
        state: Where the first one begins.
        stop: Set once they are no longer wanted.
    """

    def __init__(self, material: Material, state: State, stop: threading.Event) -> None:
        self._material, self._stop = material, stop
        self._place, self._num_passes, self._pass_rows = state.place, state.num_passes, state.pass_rows
        self._account = Account(forms=list(state.forms), bad=list(state.bad))  # of reading, which runs ahead of packing
        self._account.take_unread(state.unread)
        self._unencodable = Account(num_bad=state.num_unencodable, bad=self._account.bad)
        self._packer = Packer(material.sequence_length, pad_token_id(material.tokenizer))
        self._packer.counts = Counts(**asdict(state.counts))
        rows = [] if state.rows is None else rows_of(state.rows)
        self._waiting = rows[: state.num_waiting]
        if unfinished := [OpenRow(*pair) for pair in zip(rows[state.num_waiting :], state.started, strict=True)]:
            self._packer.stream, *self._packer.open_rows = unfinished

    def __iter__(self) -> Iterator[tuple[list[Row], State]]:
        """Yields the rows of each window, and where the one after it begins.

        Raises:
            UserError: The data cannot be read or encoded, or hold no rows.
            StoppedError: Nothing more is wanted.
        """
        size = self._material.window_rows
        while True:
            for _ in self._pass():
                while len(self._waiting) >= size:
                    window, self._waiting = self._waiting[:size], self._waiting[size:]
                    yield window, self._state()

    def _pass(self) -> Iterator[None]:
        """Packs the data from the current place to their end. Pauses after each record, and at the end."""
        for documents, place in self._documents():
            if self._stop.is_set() or not threading.main_thread().is_alive():
                raise StoppedError
            if isinstance(documents, UserError):
                self._unencodable.take_bad(documents, self._material.reading.on_bad_record)
            else:
                for document in documents:
                    self._waiting.extend(self._packer.add(document))
            self._place = place
            yield
        self._waiting.extend(self._packer.end())
        self._refuse_nothing()
        self._place = Place(numbers=self._account.numbers)
        self._num_passes += 1
        self._pass_rows = self._pass_rows or self._packer.counts.num_rows
        yield

    def _documents(self) -> Iterator[tuple[Any, Place]]:
        """Yields what becomes of each record, and the place after it."""
        material, places = self._material, deque[Place]()
        self._account.numbers = self._place.numbers

        def records() -> Iterator[Record]:
            for record, place in read_from(self._place, material.sources, material.reading, self._account):
                if material.data_fraction == 1 or share_of(record, material.seed) < material.data_fraction:
                    places.append(place)
                    yield record

        encode_some = partial(encode_records, tokenizer=material.tokenizer)
        for _, documents in encode_each(records(), encode_some, material.reading.num_proc):
            yield documents, places.popleft()

    def _refuse_nothing(self) -> None:
        """Raises UserError if a whole pass over the data gave no row."""
        counts = self._packer.counts
        if counts.num_rows:
            return
        counts.report_dropped(self._material.sequence_length)
        self._state().account(self._material.sources).refuse_if_all_bad()
        raise UserError(
            f"--data_fraction {self._material.data_fraction}: none of the {self._account.num_records:,} records is in "
            "it; raise it"
        )

    def _state(self) -> State:
        unfinished = [self._packer.stream, *self._packer.open_rows]
        rows = [*self._waiting, *(each.row for each in unfinished)]
        return State(
            place=self._place,
            num_passes=self._num_passes,
            pass_rows=self._pass_rows,
            num_unencodable=self._unencodable.num_bad,
            counts=Counts(**asdict(self._packer.counts)),
            forms=list(self._account.forms),
            unread=list(self._account.unread),
            bad=list(self._account.bad),
            started=[each.num_started for each in unfinished],
            num_waiting=len(self._waiting),
            rows=records_of(rows, self._material.sequence_length),
        )
