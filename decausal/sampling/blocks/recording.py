"""Passes that are recorded once and replayed: a CUDA graph each, so that the host launches one instead of hundreds.

A replay runs the same operations on the same memory. So the shapes of a pass are rounded up to few, the rows and tokens
that fill them up are computed in vain, and what differs between passes is read from tensors, which stay where they are.
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
from decausal.sampling.blocks.windows import Reader
from decausal.sampling.row_settings import RowSettings
from decausal.sampling.settings import SamplerSettings

FEWEST_KEYS = 128
MOST_RECORDINGS = 64
"""Recordings held at a time: clients choose settings, so their kinds must not fill the memory."""


class CannotRecordError(RuntimeError):
    """A model does what no recording can hold: no fault of a request."""


@runtime_checkable
class PassRecorder(Protocol):
    """Records a function that reads and writes tensors, and returns what runs it again on these very tensors."""

    def __call__(
        self, function: Callable[[], None], unchanged: Callable[[], AbstractContextManager[None]]
    ) -> Callable[[], None]:
        """Returns the replay.

        Args:
            function: runs without asking the device for anything.
            unchanged: inside of it the function may be run as often as need be.
        """


class CudaGraphs:
    """Records CUDA graphs, which take their memory from one pool.

    Raises:
        UserError: there is no GPU.
        CannotRecordError: when recording, what a model does that cannot be recorded.
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
            function()  # whatever is made once, workspaces and compiled kernels, is made here
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Of this thread alone: other ones, with engines of their own, may ask the device for memory meanwhile.
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
    """Passes over rows whose prompts have been read, at most one finished block and the open one of each.

    Attributes:
        reader: what reads the rows' windows.
        head: the model's head as it is now.
        record: makes replays.
    """

    reader: Reader
    head: Callable[[], Head]
    record: PassRecorder
    _recordings: dict[Any, _Recording] = field(default_factory=dict)

    def takes(self, windows: list[range]) -> bool:
        """Whether no row reads more than two blocks, and all that a pass writes to has its memory."""
        is_ready = self.reader.shift == 0 or self.reader.rows.clean_state is not None
        return is_ready and max(map(len, windows)) <= 2 * self.reader.layout.block_size

    def record_ahead(self, settings: SamplerSettings) -> None:
        """Records passes of all shapes over rows of these settings, so that no request waits for that; the largest
        first, from whose memory the smaller ones take theirs.

        Raises:
            CannotRecordError: see `CudaGraphs`.
        """
        reader, rows = self.reader, self.reader.rows
        shapes = self._shapes()
        if not shapes:
            return
        with rows.unchanged():  # takes the memory that passes write to
            reader.predict_fixed(1, max(shape.width for shape in shapes), min(shape.num_keys for shape in shapes))
        for shape in shapes[:MOST_RECORDINGS]:
            of_rows = RowSettings.of([settings] * shape.num_rows, rows.device)
            self._recordings[shape, of_rows.kinds] = self._recorded(shape, of_rows)

    def _shapes(self) -> list[_Shape]:
        """All that occur while the cache has this length, the largest first."""
        most_rows, most_keys = len(self.reader.rows.start), self.reader.cache.max_length
        size = self.reader.layout.block_size
        widths = [1] if self.reader.is_autoregressive else [2 * size, size]
        rows = sorted({min(1 << power, most_rows) for power in range(most_rows.bit_length() + 1)}, reverse=True)
        keys = sorted({min(FEWEST_KEYS << power, most_keys) for power in range(most_keys.bit_length())}, reverse=True)
        return [_Shape(*shape) for shape in product(rows, widths, keys)]

    def run(self, windows: list[range], settings: RowSettings) -> tuple[Float[Tensor, "b K D"], Int[Tensor, "b told"]]:
        """One pass over rows 0 to b - 1: the states that predict their blocks, and what `BlockRows.keep` tells.

        Both are overwritten by the next pass.
        """
        shape = self._shape(windows)
        key = (shape, settings.kinds)
        recording = self._recordings.pop(key, None) or self._recorded(shape, settings)
        self._recordings[key] = recording  # at the end: the first one is the one that was not used for longest
        if len(self._recordings) > MOST_RECORDINGS:
            del self._recordings[next(iter(self._recordings))]
        if recording.taken is not settings:
            recording.settings.take(_padded(settings, shape.num_rows))
            recording.taken = settings
        recording.replay()
        return recording.states[: len(windows)], recording.told[: len(windows)]

    def forget(self) -> None:
        """Drops all recordings: memory that they write to is given up."""
        self._recordings.clear()

    def _shape(self, windows: list[range]) -> _Shape:
        """Rows and keys rounded up to powers of two; one block or two of each row."""
        rows, cache = self.reader.rows, self.reader.cache
        width = 1 if self.reader.is_autoregressive else max(map(len, windows))
        last = max(window.stop for window in windows)
        num_keys = max(FEWEST_KEYS, 1 << (last - 1).bit_length())
        num_rows = 1 << (len(windows) - 1).bit_length()
        return _Shape(min(num_rows, len(rows.start)), width, min(num_keys, cache.max_length))

    def _recorded(self, shape: _Shape, settings: RowSettings) -> _Recording:
        recording = _Recording(_padded(settings, shape.num_rows))

        def one_pass() -> None:
            recording.states = self.reader.predict_fixed(*shape)
            recording.told = self.reader.rows.keep(
                shape.num_rows, None, recording.states, self.head(), recording.settings
            )

        recording.replay = self.record(one_pass, self.reader.rows.unchanged)
        return recording


def _padded(settings: RowSettings, num_rows: int) -> RowSettings:
    """The settings of more rows, as copies: the last one's for those that fill up."""
    places = torch.arange(num_rows, device=settings.temperature.device)
    return settings.rows(places.clamp(max=len(settings.temperature) - 1))
