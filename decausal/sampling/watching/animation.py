"""Animates frames of a row: characters on a grid, drawn into an SVG or a GIF.

Every position has the place of its last token, so nothing jumps when tokens appear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from rich.cells import cell_len, set_cell_size

from decausal.sampling.watching.watch import colour_of_step

CHARACTER = (8, 18)
"""Width and height of a character, in pixels."""
MARGIN = 14
FONT_SIZE = 13
BACKGROUND, GIVEN, BOX = "#16181d", "#c9ced6", "#3a404b"
LONGEST_STEP, LONGEST_PLAY, REST = 0.35, 12.0, 2.5
"""Seconds: the most for one step, the most for all steps (though a step has at least 0.03), and of the last frame."""


class Cell(NamedTuple):
    """What a frame shows at a position.

    Attributes:
        text: None if it is open.
        step: The step in which the token was kept; None for a given one.
    """

    text: str | None
    step: int | None


Frame = tuple[Cell, ...]


class Run(NamedTuple):
    """A stretch of a line that belongs to one position, in characters from the upper left corner."""

    column: int
    line: int
    width: int
    text: str


class Span(NamedTuple):
    """What a position shows from one frame on, until another one."""

    start: int
    stop: int
    position: int
    cell: Cell


@dataclass(frozen=True)
class Page:
    """The place of each position: the runs of its last token."""

    runs: list[list[Run]]
    num_columns: int
    num_lines: int

    @classmethod
    def of(cls, frame: Frame, num_columns: int) -> Page:
        """Arranges the tokens of a frame in lines."""
        runs: list[list[Run]] = []
        column = line = 0
        for cell in frame:
            own: list[Run] = []
            for character in cell.text or "?":
                is_break = character == "\n"
                width = 1 if is_break else cell_len(character)
                if column + width > num_columns:
                    column, line = 0, line + 1
                own.append(Run(column, line, width, " " if is_break else character))
                column, line = (0, line + 1) if is_break else (column + width, line)
            runs.append(_joined(own))
        last = max((run.line for own in runs for run in own), default=0)
        widest = max((run.column + run.width for own in runs for run in own), default=1)
        return cls(runs, widest, last + 1)

    @property
    def size(self) -> tuple[int, int]:
        """Pixels."""
        return self.num_columns * CHARACTER[0] + 2 * MARGIN, self.num_lines * CHARACTER[1] + 2 * MARGIN

    def shown(self, position: int, text: str) -> list[Run]:
        """Returns the runs of a token. A token that is not its position's last takes that one's place, cut to fit."""
        own = self.runs[position]
        if text == "".join(run.text for run in own) or not own:
            return own
        left, runs = text.replace("\n", " "), []
        for run in own:
            part = set_cell_size(left, run.width)
            left = left[len(part) :]
            runs.append(run._replace(text=part))
        return runs


def write_svg(path: Path, frames: Sequence[Frame], num_columns: int) -> None:
    """Writes an animation that browsers and GitHub play, without scripts or outside resources."""
    pages, times, total = _prepared(frames, num_columns)
    width, height = (max(sizes) for sizes in zip(*(page.size for _, page in pages), strict=True))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="ui-monospace,Menlo,Consolas,monospace" font-size="{FONT_SIZE}" xml:space="preserve">',
        f'<rect width="{width}" height="{height}" rx="8" fill="{BACKGROUND}"/>',
    ]
    for chunk, page in pages:
        spans = sorted(_spans(frames, chunk), key=lambda span: (span.start, span.stop))
        for (start, stop), group in groupby(spans, key=lambda span: (span.start, span.stop)):
            begin, end = times[start] / total, times[stop] / total
            # Without animation only the last frame is visible.
            parts.append(f'<g visibility="{"visible" if end == 1 else "hidden"}">{_shown_between(begin, end, total)}')
            parts += [_svg_cell(page, span) for span in group]
            parts.append("</g>")
    path.write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


def _shown_between(begin: float, end: float, seconds: float) -> str:
    if begin == 0 and end == 1:
        return ""
    values = [(0.0, "hidden"), (begin, "visible"), (end, "hidden")]
    values = [value for value in values[begin == 0 :] if value[0] < 1]
    names, times = ";".join(name for _, name in values), ";".join(f"{time:.5g}" for time, _ in values)
    return (
        f'<animate attributeName="visibility" calcMode="discrete" dur="{seconds:.2f}s" repeatCount="indefinite" '
        f'values="{names}" keyTimes="{times}"/>'
    )


def _svg_cell(page: Page, span: Span) -> str:
    if span.cell.text is None:
        return "".join(
            '<rect x="{}" y="{}" width="{}" height="{}" rx="2" fill="{}"/>'.format(*_box(run), BOX)
            for run in page.runs[span.position]
        )
    drawn = []
    for run in page.shown(span.position, span.cell.text):
        if run.text.strip():
            x, y = _corner(run)
            length = run.width * CHARACTER[0]
            text = escape(
                "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in run.text)
            )
            drawn.append(
                f'<text x="{x}" y="{y + FONT_SIZE}" textLength="{length}" fill="{_colour(span.cell)}">{text}</text>'
            )
    return "".join(drawn)


def write_gif(path: Path, frames: Sequence[Frame], num_columns: int) -> None:
    """Writes an animation that plays everywhere. matplotlib's font lacks Chinese, Japanese and Korean characters."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")), FONT_SIZE)
    pages, times, _ = _prepared(frames, num_columns)
    size = tuple(max(sizes) for sizes in zip(*(page.size for _, page in pages), strict=True))
    images: list[Any] = []
    for chunk, page in pages:
        for index in chunk:
            image = Image.new("RGB", size, BACKGROUND)
            draw = ImageDraw.Draw(image)
            for position, cell in enumerate(frames[index]):
                _draw_cell(draw, font, page, Span(index, index + 1, position, cell))
            images.append(image.quantize(64))
    durations = [10 * round(100 * (after - before)) for before, after in pairwise(times)]
    images[0].save(path, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=False)


def _draw_cell(draw: Any, font: Any, page: Page, span: Span) -> None:
    if span.cell.text is None:
        for run in page.runs[span.position]:
            x, y, width, height = _box(run)
            draw.rounded_rectangle((x, y, x + width - 1, y + height - 1), radius=2, fill=BOX)
        return
    for run in page.shown(span.position, span.cell.text):
        x, y = _corner(run)
        for character in run.text:  # the font's own advance is not a whole number of pixels
            draw.text((x, y), character, font=font, fill=_colour(span.cell))
            x += cell_len(character) * CHARACTER[0]


def _prepared(frames: Sequence[Frame], num_columns: int) -> tuple[list[tuple[range, Page]], list[float], float]:
    """Returns the frames with their pages, when each begins and the last one ends, and the last frame once more."""
    pages, start = [], 0
    for _, group in groupby(frames, key=len):
        stop = start + sum(1 for _ in group)
        pages.append((range(start, stop), Page.of(frames[stop - 1], num_columns)))
        start = stop
    seconds = max(0.03, min(LONGEST_STEP, LONGEST_PLAY / len(frames)))
    times = [index * seconds for index in range(len(frames))]
    return pages, [*times, times[-1] + REST], times[-1] + REST


def _spans(frames: Sequence[Frame], chunk: range) -> list[Span]:
    """Returns what every position shows, and for how long."""
    found = []
    for position in range(len(frames[chunk.start])):
        for cell, group in groupby(chunk, key=lambda index: frames[index][position]):
            indices = list(group)
            found.append(Span(indices[0], indices[-1] + 1, position, cell))
    return found


def _joined(runs: list[Run]) -> list[Run]:
    """Returns neighbouring characters of one line as one run."""
    joined = []
    for _, group in groupby(runs, key=lambda run: run.line):
        line = list(group)
        joined.append(line[0]._replace(width=sum(run.width for run in line), text="".join(run.text for run in line)))
    return joined


def _corner(run: Run) -> tuple[int, int]:
    return MARGIN + run.column * CHARACTER[0], MARGIN + run.line * CHARACTER[1]


def _box(run: Run) -> tuple[int, int, int, int]:
    x, y = _corner(run)
    return x + 1, y + 1, run.width * CHARACTER[0] - 2, CHARACTER[1] - 3


def _colour(cell: Cell) -> str:
    return GIVEN if cell.step is None else "#{:02x}{:02x}{:02x}".format(*colour_of_step(cell.step))
