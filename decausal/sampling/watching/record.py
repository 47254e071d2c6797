"""A recording of the denoising of one row: an animated SVG or GIF for a page, tokens coloured by step."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from decausal.sampling.token_texts import TokenTexts
from decausal.sampling.watching.animation import Cell, Frame, write_gif, write_svg
from decausal.sampling.watching.recording_path import check_recording

WRITERS = {".svg": write_svg, ".gif": write_gif}


class Recorder:
    """Records one row of the batch while it is denoised: pass it as `on_step` inside a `with` block.

    The file is written at the end of the block, unless that ends in an error. Open positions are boxes, tokens have
    the colour of the step in which they were kept. An edit of several rounds is one recording.

    Example:
        >>> with Recorder("denoising.svg", model.tokenizer) as recorder:
        ...     model.infill(prefix, suffix, length=48, on_step=recorder)

    Args:
        path: Ends in .svg or .gif.
        tokenizer: Decodes.
        row: Which row of the batch.
        num_columns: Characters of a line.

    Raises:
        UserError: Another suffix, or no such directory.
    """

    def __init__(self, path: str | Path, tokenizer: Any, row: int = 0, num_columns: int = 80) -> None:
        self.path, self.tokenizer, self.row, self.num_columns = check_recording(path), tokenizer, row, num_columns
        self.frames: list[Frame] = []
        self._step_of_position: dict[int, int] = {}
        self._texts = TokenTexts(tokenizer)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and self.frames:
            try:
                WRITERS[self.path.suffix.lower()](self.path, self.frames, self.num_columns)
            except OSError as problem:
                raise UserError(f"cannot write the recording '{self.path}': {problem.strerror}") from None

    def __call__(
        self, step: int, ids: Int[Tensor, "B T"], is_open: Bool[Tensor, "B T"], newly_kept: Bool[Tensor, "B T"]
    ) -> None:
        """Takes a row after a step: the signature of `sampler.OnStep`."""
        opened = set(is_open[self.row].nonzero().squeeze(1).tolist())
        new = newly_kept[self.row].nonzero().squeeze(1).tolist()
        if not new and self.frames:  # the row has ended, others have not
            return
        tokens = ids[self.row].tolist()
        if step == 0:
            self._step_of_position.clear()
            self.frames.append(self._frame(tokens, opened.union(new)))
        self._step_of_position.update(dict.fromkeys(new, step))
        for position in opened:
            self._step_of_position.pop(position, None)
        self.frames.append(self._frame(tokens, opened))

    def _frame(self, tokens: list[int], opened: set[int]) -> Frame:
        kept = [None if position in opened else token for position, token in enumerate(tokens)]
        texts = self._texts.of(kept)
        return tuple(Cell(text, self._step_of_position.get(position)) for position, text in enumerate(texts))
