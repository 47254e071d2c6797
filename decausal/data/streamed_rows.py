"""Rows of data that are read during training. Only a few of them are kept on disk.

Rows are stored in windows, one file each. The process that first needs a row of a window builds that window and
prepares the next one. A second file says where the window begins in the data. So any window can be built again, and a
run that resumes continues reading where it stopped.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from decausal.data.documents import begin_with_conversations
from decausal.data.packing import Row
from decausal.data.reading import Account, Reading, say
from decausal.data.row_file import RowFile, is_whole, write_rows
from decausal.data.rows import CACHE_DIR, FORMAT_VERSION, cache_errors, fingerprint, refuse_out_of_range
from decausal.data.sources import Data, Source, find_sources
from decausal.data.tables import HubDataset
from decausal.data.windows import Material, State, StoppedError, Windows
from decausal.errors import UserError

KEPT_WINDOWS = 3  # with the one that is read; the first window and the next one are kept too


class StreamedRows:
    """An endless sequence of rows: row i is the i-th of the data, which are read repeatedly. See `stream_rows`.

    Args:
        material: What the rows are made of.
        directory: Where their files are.
        num_rows: Rows that the run needs. Rows after them are not prepared.

    Attributes:
        window_rows: Rows of a window.
    """

    def __init__(self, material: Material, directory: Path, num_rows: int) -> None:
        self._material, self._directory, self._num_rows = material, directory, num_rows
        self.window_rows = material.window_rows
        self._forget()

    def _forget(self) -> None:
        """Forgets what belongs to one process."""
        self._process = os.getpid()
        self._mapped: dict[int, RowFile] = {}
        self._states: dict[int, State] = {}
        # The number of the next window, and an iterator from it on.
        self._live: tuple[int, Iterator[tuple[list[Row], State]]] | None = None
        self._thread: threading.Thread | None = None
        self._failure: UserError | None = None
        self._stop = threading.Event()
        self._entered = -1

    def __getstate__(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("_material", "_directory", "_num_rows", "window_rows")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number, offset = divmod(index, self.window_rows)
        self._here()
        if number not in self._mapped:
            window = self._window(number)
            self._mapped = {before: file for before, file in self._mapped.items() if number - before == 1}
            self._mapped[number] = window
            self._enter(number)
        return self._mapped[number][offset]

    @property
    def first(self) -> RowFile:
        """The rows of the first window, which represents data that have not been read to the end."""
        self._here()
        return self._window(0)

    def epochs(self, position: int | float) -> float:
        """Returns how many times the data have been read after so many rows: 0 until they have been read once."""
        self._here()
        state = self._state(int(position) // self.window_rows)
        return position / state.pass_rows if state is not None and state.pass_rows else 0.0

    @property
    def has_conversations(self) -> bool:
        """Whether one of the sources begins with a conversation."""
        return begin_with_conversations(self._material.sources, self._material.reading)

    def say_read(self, num_rows: int) -> None:
        """Says on standard error what was read for the windows of the first `num_rows` rows."""
        state = self._state(-(-num_rows // self.window_rows))
        if state is None:  # somebody emptied the cache
            return
        line = state.account(self._material.sources).line(state.counts.num_tokens)
        say(f"streamed: {line}; ended in pass {state.num_passes + 1} over the data")
        state.counts.report_dropped(self._material.sequence_length)

    def close(self) -> None:
        """Ends the work in the background. Rows can still be read."""
        self._here()
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._forget()

    def _here(self) -> None:
        """Starts afresh in a forked process, which has no thread and no reader of its own yet."""
        if self._process != os.getpid():
            self._inherited = self._live  # not ended here: it is the parent's
            self._forget()

    def _window(self, number: int) -> RowFile:
        """Opens a window, and builds it if it is missing."""
        if self._thread is not None:
            self._thread.join()
            self._thread, failure, self._failure = None, self._failure, None
            if failure is not None:
                raise failure
        while True:
            with cache_errors(self._directory):
                if not self._is_there(number):
                    with FileLock(self._lock):
                        self._build(number)
            try:
                return RowFile(self._path(number), self._material.sequence_length, self.window_rows)
            except FileNotFoundError:  # another process has just removed it
                continue

    def _enter(self, number: int) -> None:
        """Removes an earlier window, and prepares the next one.

        Only the process that built this window prepares the next one, since others would have to find its place in the
        data first. After a start no process has built one, so the first one to arrive does it.
        """
        is_next_mine = self._live is not None and self._live[0] == number + 1
        is_start = self._live is None and self._entered < 0
        self._entered = number
        if number > KEPT_WINDOWS:
            self._path(number - KEPT_WINDOWS).unlink(missing_ok=True)
        if (is_next_mine or is_start) and (number + 1) * self.window_rows < self._num_rows:
            self._thread = threading.Thread(target=self._prepare, args=(number + 1,))
            self._thread.start()

    def _prepare(self, number: int) -> None:
        try:
            with FileLock(self._lock, timeout=0):
                self._build(number)
        except (Timeout, StoppedError):  # somebody else builds it; nobody wants it
            return
        except OSError as error:
            self._failure = UserError(f"cannot keep packed rows in {self._directory}: {error.strerror}")
        except UserError as error:
            self._failure = error

    def _build(self, number: int) -> None:
        """Builds a window, while holding the lock: from where it begins, or from the nearest earlier place known."""
        if self._is_there(number):
            return
        first, windows = self._nearest(number)
        self._live = None
        for each in range(first, number + 1):
            rows, state = next(windows)
            state.save(self._state_path(each + 1))
        unfinished = self._path(number).with_suffix(".unfinished")
        write_rows(unfinished, rows, self._material.sequence_length)
        unfinished.replace(self._path(number))
        self._live = number + 1, windows

    def _nearest(self, number: int) -> tuple[int, Iterator[tuple[list[Row], State]]]:
        """Returns what makes windows, and the number of the first: the current one, or a new one from a saved state."""
        live = self._live
        for each in range(number, 0, -1):
            if live is not None and live[0] == each:
                return live
            if (state := self._state(each)) is not None:
                return each, iter(Windows(self._material, state, self._stop))
        return 0, iter(Windows(self._material, State(), self._stop))

    def _state(self, number: int) -> State | None:
        """Returns where a window begins, if that is known."""
        state = self._states.get(number)
        if state is None:
            state = State.load(self._state_path(number), self._material.sequence_length) if number else State()
            self._states = {} if state is None else {number: state}  # replaced as a whole, since two threads ask
        return state

    @property
    def _lock(self) -> Path:
        return self._directory / "building.lock"

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:08}.rows"

    def _state_path(self, number: int) -> Path:
        return self._directory / f"{number:08}.npz"

    def _is_there(self, number: int) -> bool:
        return is_whole(self._path(number), self._material.sequence_length, self.window_rows)


def stream_rows(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    num_rows: int,
    window_rows: int,
    reading: Reading | None = None,
    cache_dir: str | Path | None = None,
    data_fraction: float = 1.0,
    seed: int = 0,
) -> StreamedRows:
    """Returns rows of `data` that are packed as they are needed. In one pass they are those of `load_rows`.

    Args:
        data, tokenizer, sequence_length, reading, cache_dir, seed: See `decausal.data.rows.load_rows`.
        num_rows: Rows that the run needs.
        window_rows: Rows that are packed at a time.
        data_fraction: As there, but a share without any document is an error.

    A line on standard error says that data are streamed. Only a few windows of rows are on disk at a time.

    Raises:
        UserError: There are no such data, an option is out of its range, or the cache cannot be written. Errors in
            records are raised when their rows are read.
    """
    refuse_out_of_range(sequence_length, data_fraction)
    reading, left_out = reading or Reading(), Account()
    sources = streamed_sources(data, reading.split, left_out)
    subset = (data_fraction, seed) if data_fraction < 1 else None
    options = [FORMAT_VERSION, sequence_length, reading.content, subset, "streamed", window_rows]
    directory = (Path(cache_dir) if cache_dir else CACHE_DIR) / fingerprint(sources, tokenizer, options)
    with cache_errors(cache_dir):
        directory.mkdir(parents=True, exist_ok=True)
    where = str(sources[0]) if len(sources) == 1 else f"{len(sources):,} sources"
    say(f"streaming {where}: read while training goes on; rows are shuffled within windows of {window_rows:,}")
    material = Material(sources, reading, tokenizer, sequence_length, window_rows, data_fraction, seed)
    return StreamedRows(material, directory, num_rows)


def streamed_sources(data: Data, split: str, left_out: Account) -> list[Source]:
    """Returns what `data` name, with data sets of the hub that are read row by row; see `find_sources`."""
    return [
        replace(source, is_streamed=True) if isinstance(source, HubDataset) else source
        for source in find_sources(data, split, left_out)
    ]
