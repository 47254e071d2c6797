"""Passes that are recorded once and replayed as CUDA graphs, so that the host launches one graph, not hundreds of
kernels.

A replay runs the same operations on the same memory. So the shapes of passes are rounded up to a few, and the rows and
tokens that fill them are computed in vain. What differs between passes is read from tensors at fixed addresses.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decausal.errors import UserError, first_line
from decausal.models.compiled import compiled
from decausal.objectives.head import Head
from decausal.sampling.blocks.keeping import keep
from decausal.sampling.blocks.reader import Reader
from decausal.sampling.row_settings import RowSettings
from decausal.sampling.settings import SamplerSettings

logger = logging.getLogger(__name__)

FEWEST_KEYS = 128
MOST_RECORDINGS = 64
"""The most recordings at a time. Clients choose settings, so their kinds must not fill the memory."""
PATIENCE = 4
"""Passes of a kind that run as they are before it is recorded, where rows are few: recording costs about as much."""


class CannotRecordError(RuntimeError):
    """A model does something that cannot be recorded. Requests are not to blame."""


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
    """Recorded passes over rows, by what their shape depends on. There are few, and those not used for longest go.

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
            settings: Those of the first of them. Further ones have the last one's.
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


class _Shape(NamedTuple):
    num_rows: int
    width: int
    num_keys: int


@dataclass
class RecordedPasses:
    """Recorded passes over rows whose prompts have been read. Each row reads at most a finished block and the open one.

    Attributes:
        reader: What reads the rows' spans.
        head: Returns the model's current head.
        record: What records functions.
        is_compiled: Whether the decoder layers of these passes are compiled, which fuses most of their kernels.
    """

    reader: Reader
    head: Callable[[], Head]
    record: PassRecorder
    is_compiled: bool = False

    def __post_init__(self) -> None:
        self._recordings = Recordings(self.record, self.reader.rows.unchanged)

    def record_ahead(self, settings: SamplerSettings) -> None:
        """Records passes of all shapes over rows with these settings, so that no request has to wait.

        The largest come first, since smaller ones reuse their memory.

        Raises:
            CannotRecordError: See `CudaGraphs`.
        """
        rows = self.reader.rows
        shapes = self._shapes()
        if not shapes:
            return
        with rows.unchanged():  # allocates the memory that passes write to
            self._states(_Shape(1, max(shape.width for shape in shapes), min(shape.num_keys for shape in shapes)))
        for shape in shapes[:MOST_RECORDINGS]:
            of_rows = RowSettings.of([settings] * shape.num_rows, rows.device)
            self._recordings.add(shape, shape.num_rows, of_rows, self._pass_of(shape))

    def run(
        self, spans: list[range], settings: RowSettings
    ) -> tuple[Float[Tensor, "b K D"], Int[Tensor, "b told"]] | None:
        """Runs a pass over rows 0 to b - 1 and returns the states that predict their blocks, and the result of `keep`.

        Both are overwritten by the next pass. None: the pass has to be run as it is.
        """
        size, reader = self.reader.layout.block_size, self.reader
        if max(map(len, spans)) > 2 * size or (reader.shift and reader.rows.clean_state is None):
            return None  # a prompt, or not everything that a pass writes to is allocated
        shape = self._shape(spans)
        found = self._recordings.run(shape, shape.num_rows, settings, self._pass_of(shape))
        return None if found is None else tuple(part[: len(spans)] for part in found)

    def forget(self) -> None:
        """Drops all recordings, since the memory that they write to is freed."""
        self._recordings.forget()

    def _pass_of(self, shape: _Shape) -> Callable[[RowSettings], Any]:
        def one_pass(settings: RowSettings) -> Any:
            states = self._states(shape)
            return states, keep(self.reader.rows, shape.num_rows, None, states, self.head(), settings)

        return one_pass

    def _states(self, shape: _Shape) -> Float[Tensor, "b K D"]:
        if self.is_compiled:
            from torch._dynamo.exc import TorchDynamoException  # a second of imports

            try:
                with compiled(self.reader.model):
                    return self.reader.predict_fixed(*shape)
            except TorchDynamoException as error:
                logger.warning("decoder layers cannot be compiled: %s; they run as they are", first_line(error))
                self.is_compiled = False
        return self.reader.predict_fixed(*shape)

    def _shapes(self) -> list[_Shape]:
        """Returns all shapes that can occur with this length of the cache, the largest first."""
        most_rows, most_keys = len(self.reader.rows.start), self.reader.cache.max_length
        size = self.reader.layout.block_size
        widths = [1] if self.reader.is_autoregressive else [2 * size, size]
        rows = sorted({min(1 << power, most_rows) for power in range(most_rows.bit_length() + 1)}, reverse=True)
        keys = sorted({min(FEWEST_KEYS << power, most_keys) for power in range(most_keys.bit_length())}, reverse=True)
        return [_Shape(*shape) for shape in product(rows, widths, keys)]

    def _shape(self, spans: list[range]) -> _Shape:
        """Returns the shape: rows and keys rounded up to powers of two, and one or two blocks per row."""
        rows, cache = self.reader.rows, self.reader.cache
        width = 1 if self.reader.is_autoregressive else max(map(len, spans))
        num_rows = 1 << (len(spans) - 1).bit_length()
        num_keys = keys_of_recording(max(span.stop for span in spans), cache.max_length)
        return _Shape(min(num_rows, len(rows.start)), width, num_keys)


def keys_of_recording(num_keys: int, most: int) -> int:
    """Returns a number of keys rounded up to one of few, at most that of a cache."""
    return min(max(FEWEST_KEYS, 1 << (num_keys - 1).bit_length()), most)


def _padded(settings: RowSettings, num_rows: int) -> RowSettings:
    """Returns a copy of the settings for more rows. Added rows have the last one's."""
    places = torch.arange(num_rows, device=settings.temperature.device)
    return settings.rows(places.clamp(max=len(settings.temperature) - 1))
