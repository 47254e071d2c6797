"""Passes that are recorded once and replayed as CUDA graphs, so that the host launches one graph, not hundreds of
kernels.

A replay runs the same operations on the same memory. So the shapes of passes are rounded up to a few, and computing the
padding rows and tokens is wasted. What differs between passes is read from tensors at fixed addresses.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from decausal.errors import UserError, first_line
from decausal.sampling.row_settings import RowSettings

logger = logging.getLogger(__name__)

FEWEST_KEYS = 128
MOST_RECORDINGS = 64
"""The most recordings at a time. Clients choose settings, so without a limit their kinds could fill the memory."""
PATIENCE = 4
"""Passes of a kind that run as they are before it is recorded, where rows are few: recording costs about as much."""


class CannotRecordError(RuntimeError):
    """A model does something that cannot be recorded. This is no fault of a request."""


@runtime_checkable
class PassRecorder(Protocol):
    """Records a function that reads and writes tensors, and returns a function that replays it on the same tensors.

    Attributes:
        patience: Passes of a kind that run as they are before it is recorded.
    """

    patience: int

    def __call__(
        self, function: Callable[[], None], unchanged: Callable[[], AbstractContextManager[None]]
    ) -> Callable[[], None]:
        """Returns the replay.

        Args:
            function: Runs without waiting for the device.
            unchanged: A context in which the function may be run any number of times.
        """


class CudaGraphs:
    """Records CUDA graphs, which take their memory from one pool.

    Args:
        patience: See `PassRecorder`.

    Raises:
        UserError: There is no GPU.
        CannotRecordError: While recording, if the model does something that cannot be recorded.
    """

    def __init__(self, patience: int = 0) -> None:
        if not torch.cuda.is_available():
            raise UserError("CUDA graphs need a GPU: leave cuda_graphs out")
        self.patience = patience
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, function: Callable[[], None], unchanged: Callable[[], AbstractContextManager[None]]
    ) -> Callable[[], None]:
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream), unchanged():
            function()  # workspaces and compiled kernels are made here, once
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Only for this thread: other threads with their own engines may allocate memory meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                function()
        except RuntimeError as error:
            raise CannotRecordError(f"a pass of this model cannot be recorded: {first_line(error)}") from error
        return graph.replay


@dataclass
class _Recording:
    settings: RowSettings
    replay: Callable[[], None] | None = None
    found: Any = None
    taken: RowSettings | None = None


class Recordings:
    """Recorded passes over rows, by what their shape depends on. Only a few are held: the least recently used ones are
    dropped.

    Args:
        record: What records functions.
        unchanged: See `PassRecorder`.
    """

    def __init__(self, record: PassRecorder, unchanged: Callable[[], AbstractContextManager[None]]) -> None:
        self._record: PassRecorder | None = record
        self._unchanged = unchanged
        self._held: dict[Any, _Recording] = {}
        self._num_seen: Counter[Any] = Counter()

    def run(
        self, shape: Any, num_rows: int, settings: RowSettings, one_pass: Callable[[RowSettings], Any]
    ) -> Any | None:
        """Returns the result of a pass, which the next one of its shape overwrites.

        None: it is not to be recorded yet, or this model's passes cannot be, which is logged once.

        Args:
            shape: What the shapes of all tensors of the pass depend on, apart from the kinds of settings.
            num_rows: Rows of the pass.
            settings: The settings of the first rows. Further rows have the last one's.
            one_pass: The pass, without waiting for the device.
        """
        key = (shape, settings.kinds)
        recording = self._held.pop(key, None)
        if recording is None:
            if self._record is None or self._num_seen[key] < self._record.patience:
                self._num_seen[key] += 1
                return None
            try:
                recording = self._recorded(num_rows, settings, one_pass)
            except CannotRecordError as error:
                logger.warning("%s; passes go on as they are", error)
                self._record = None
                return None
        self._hold(key, recording)
        if recording.taken is not settings:
            recording.settings.take(_padded(settings, num_rows))
            recording.taken = settings
        recording.replay()
        return recording.found

    @property
    def most(self) -> int:
        """The most that are held."""
        return MOST_RECORDINGS

    def add(self, shape: Any, num_rows: int, settings: RowSettings, one_pass: Callable[[RowSettings], Any]) -> None:
        """Records a pass ahead. Raises CannotRecordError, see `CudaGraphs`."""
        self._hold((shape, settings.kinds), self._recorded(num_rows, settings, one_pass))

    def forget(self) -> None:
        """Drops all recordings, since the memory that they write to is freed."""
        self._held.clear()

    def _hold(self, key: Any, recording: _Recording) -> None:
        self._held[key] = recording  # at the end, so that the first one is the least recently used
        if len(self._held) > MOST_RECORDINGS:
            del self._held[next(iter(self._held))]

    def _recorded(self, num_rows: int, settings: RowSettings, one_pass: Callable[[RowSettings], Any]) -> _Recording:
        recording = _Recording(_padded(settings, num_rows))

        def function() -> None:
            recording.found = one_pass(recording.settings)

        recording.replay = self._record(function, self._unchanged)
        return recording


def keys_of_recording(num_keys: int, most: int) -> int:
    """Returns a number of keys rounded up to one of few, at most that of a cache."""
    return min(max(FEWEST_KEYS, 1 << (num_keys - 1).bit_length()), most)


def _padded(settings: RowSettings, num_rows: int) -> RowSettings:
    """Returns a copy of the settings for more rows. Added rows have the last one's."""
    places = torch.arange(num_rows, device=settings.temperature.device)
    return settings.rows(places.clamp(max=len(settings.temperature) - 1))
