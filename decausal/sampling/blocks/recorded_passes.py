"""Recorded passes of block models. Their shapes are rounded up to a few, and a pass of each shape is recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from decausal.models.compiled import CompiledPasses
from decausal.objectives.head import Head
from decausal.sampling.blocks.keeping import keep
from decausal.sampling.blocks.reader import Reader
from decausal.sampling.blocks.recording import FEWEST_KEYS, PassRecorder, Recordings, keys_of_recording
from decausal.sampling.row_settings import RowSettings
from decausal.sampling.settings import SamplerSettings


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
        self._compiled = CompiledPasses(self.reader.model, has_lengths=True) if self.is_compiled else None

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
        for shape in shapes[: self._recordings.most]:
            of_rows = RowSettings.of([settings] * shape.num_rows, rows.device)
            self._recordings.add(shape, shape.num_rows, of_rows, self._pass_of(shape))

    def run(
        self, spans: list[range], settings: RowSettings
    ) -> tuple[Float[Tensor, "b K D"], Int[Tensor, "b outcome"]] | None:
        """Runs a pass over rows 0 to b - 1 and returns the states that predict their blocks, and the result of `keep`.

        Both are overwritten by the next pass. None: the pass cannot be replayed and has to be run.
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
        def states() -> Float[Tensor, "b K D"]:
            return self.reader.predict_fixed(*shape)

        return states() if self._compiled is None else self._compiled.run(states)

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
