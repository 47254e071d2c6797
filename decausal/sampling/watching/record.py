"""Records the denoising of one row as an animated SVG or GIF, with tokens coloured by step."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from decausal.errors import UserError
from decausal.sampling.jobs import Progress
from decausal.sampling.token_texts import TokenTexts
from decausal.sampling.watching.animation import Cell, Frame, write_gif, write_svg
from decausal.sampling.watching.followed import Followed
from decausal.sampling.watching.recording_path import SUFFIXES, check_recording

WRITERS = dict(zip(SUFFIXES, (write_svg, write_gif), strict=True))


class Recording:
    """Records one row while it is written: pass it as `on_step` inside a `with` block.

    The file is written at the end of the block, unless the block raises. Open positions are boxes. Tokens have the
    colour of the step in which they were kept. An edit of several rounds is one recording.

    Example:
        >>> with Recording("denoising.svg", model.tokenizer) as recording:
        ...     model.infill(prefix, suffix, length=48, on_step=recording)

    Args:
        path: A file name that ends in .svg or .gif.
        tokenizer: Decodes ids.
        row: Which row of the call, from 0.
        num_columns: Characters of a line.

    Raises:
        UserError: The suffix is another one, or there is no such directory.
    """

    def __init__(self, path: str | Path, tokenizer: Any, row: int = 0, num_columns: int = 80) -> None:
        self.path, self.tokenizer, self.row, self.num_columns = check_recording(path), tokenizer, row, num_columns
        self.frames: list[Frame] = []
        self._followed: Followed | None = None
        self._texts = TokenTexts(tokenizer)

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and self.frames:
            try:
                WRITERS[self.path.suffix.lower()](self.path, self.frames, self.num_columns)
            except OSError as problem:
                raise UserError(f"cannot write the recording '{self.path}': {problem.strerror}") from None

    def __call__(self, progress: Progress) -> None:
        """Takes a step of any row and draws the one that is recorded: the signature of `jobs.OnStep`."""
        if progress.ticket != self.row:
            return
        if progress.row is not None:
            self._followed = Followed(progress.row)
            self.frames.append(self._frame(self._followed))
        if self._followed is not None:
            self._followed.take(progress)
            self.frames.append(self._frame(self._followed))

    def _frame(self, followed: Followed) -> Frame:
        texts = self._texts.of(followed.kept[: followed.length])
        texts += [""] * (len(followed.kept) - followed.length)
        return tuple(Cell(text, followed.step_of.get(position)) for position, text in enumerate(texts))
