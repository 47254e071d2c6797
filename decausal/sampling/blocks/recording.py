"""Passes that are recorded once and replayed as CUDA graphs, so that the host launches one graph, not hundreds of
kernels.

A replay runs the same operations on the same memory. So the shapes of passes are rounded up to a few, and the rows and
tokens that fill them are computed in vain. What differs between passes is read from tensors at fixed addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decausal.errors import UserError, first_line
from decausal.objectives.head import Head
from decausal.sampling.blocks.keeping import keep
from decausal.sampling.blocks.reader import Reader
from decausal.sampling.row_settings import RowSettings
from decausal.sampling.settings import SamplerSettings

FEWEST_KEYS = 128
MOST_RECORDINGS = 64
"""The most recordings at a time. Clients choose settings, so their kinds must not fill the memory."""


class CannotRecordError(RuntimeError):
    """A model does something that cannot be recorded. Requests are not to blame."""


@runtime_checkable
class PassRecorder(Protocol):
    """Records a function that reads and writes tensors, and returns a function that replays it on the same tensors."""

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

    Raises:
        UserError: There is no GPU.
        CannotRecordError: While recording, if the model does something that cannot be recorded.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise UserError("CUDA graphs need a GPU: leave cuda_graphs out")
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


class _Shape(NamedTuple):
    num_rows: int
    width: int
    num_keys: int


@dataclass
class _Recording:
    settings: RowSettings
    replay: Callable[[], None] | None = None
    states: Float[Tensor, "b K D"] | None = None
    told: Int[Tensor, "b told"] | None = None
    taken: RowSettings | None = None


@dataclass
class RecordedPasses:
    """Recorded passes over rows whose prompts have been read. Each row reads at most a finished block and the open one.

    Attributes:
        reader: What reads the rows' spans.
        head: Returns the model's current head.
        record: What records functions.
    """

    reader: Reader
    head: Callable[[], Head]
    record: PassRecorder
    _recordings: dict[Any, _Recording] = field(default_factory=dict)

    def takes(self, spans: list[range]) -> bool:
        """Returns whether no row reads more than two blocks, and everything that a pass writes to is allocated."""
        is_ready = self.reader.shift == 0 or self.reader.rows.clean_state is not None
        return is_ready and max(map(len, spans)) <= 2 * self.reader.layout.block_size

    def record_ahead(self, settings: SamplerSettings) -> None:
        """Records passes of all shapes over rows with these settings, so that no request has to wait.

        The largest come first, since smaller ones reuse their memory.

        Raises:
            CannotRecordError: See `CudaGraphs`.
        """
        reader, rows = self.reader, self.reader.rows
        shapes = self._shapes()
        if not shapes:
            return
        with rows.unchanged():  # allocates the memory that passes write to
            reader.predict_fixed(1, max(shape.width for shape in shapes), min(shape.num_keys for shape in shapes))
        for shape in shapes[:MOST_RECORDINGS]:
            of_rows = RowSettings.of([settings] * shape.num_rows, rows.device)
            self._recordings[shape, of_rows.kinds] = self._recorded(shape, of_rows)

    def _shapes(self) -> list[_Shape]:
        """Returns all shapes that can occur with this length of the cache, the largest first."""
        most_rows, most_keys = len(self.reader.rows.start), self.reader.cache.max_length
        size = self.reader.layout.block_size
        widths = [1] if self.reader.is_autoregressive else [2 * size, size]
        rows = sorted({min(1 << power, most_rows) for power in range(most_rows.bit_length() + 1)}, reverse=True)
        keys = sorted({min(FEWEST_KEYS << power, most_keys) for power in range(most_keys.bit_length())}, reverse=True)
        return [_Shape(*shape) for shape in product(rows, widths, keys)]

    def run(self, spans: list[range], settings: RowSettings) -> tuple[Float[Tensor, "b K D"], Int[Tensor, "b told"]]:
        """Runs a pass over rows 0 to b - 1 and returns the states that predict their blocks, and the result of `keep`.

        Both are overwritten by the next pass.
        """
        shape = self._shape(spans)
        key = (shape, settings.kinds)
        recording = self._recordings.pop(key, None) or self._recorded(shape, settings)
        self._recordings[key] = recording  # at the end, so that the first one is the least recently used
        if len(self._recordings) > MOST_RECORDINGS:
            del self._recordings[next(iter(self._recordings))]
        if recording.taken is not settings:
            recording.settings.take(_padded(settings, shape.num_rows))
            recording.taken = settings
        recording.replay()
        return recording.states[: len(spans)], recording.told[: len(spans)]

    def forget(self) -> None:
        """Drops all recordings, since the memory that they write to is freed."""
        self._recordings.clear()

    def _shape(self, spans: list[range]) -> _Shape:
        """Returns the shape: rows and keys rounded up to powers of two, and one or two blocks per row."""
        rows, cache = self.reader.rows, self.reader.cache
        width = 1 if self.reader.is_autoregressive else max(map(len, spans))
        last = max(span.stop for span in spans)
        num_keys = max(FEWEST_KEYS, 1 << (last - 1).bit_length())
        num_rows = 1 << (len(spans) - 1).bit_length()
        return _Shape(min(num_rows, len(rows.start)), width, min(num_keys, cache.max_length))

    def _recorded(self, shape: _Shape, settings: RowSettings) -> _Recording:
        recording = _Recording(_padded(settings, shape.num_rows))

        def one_pass() -> None:
            recording.states = self.reader.predict_fixed(*shape)
            recording.told = keep(
                self.reader.rows, shape.num_rows, None, recording.states, self.head(), recording.settings
            )

        recording.replay = self.record(one_pass, self.reader.rows.unchanged)
        return recording


def _padded(settings: RowSettings, num_rows: int) -> RowSettings:
    """Returns a copy of the settings for more rows. Added rows have the last one's."""
    places = torch.arange(num_rows, device=settings.temperature.device)
    return settings.rows(places.clamp(max=len(settings.temperature) - 1))
