"""The live view: order and colour in a terminal, plain lines elsewhere."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from decausal.sampling.watching.watch import OPEN_POSITION, Watch
from tests.families import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXT = "if x:\n  y"
IDS = torch.tensor([TOKENIZER(TEXT)["input_ids"]] * 2)
ORDER = [3, 1, 0, 2]
"""Positions from 2 on that are open, in the order in which they are kept."""


def play(watch: Watch) -> None:
    is_open = torch.zeros_like(IDS, dtype=torch.bool)
    is_open[:, 2:6] = True
    with watch:
        for step, offset in enumerate(ORDER):
            newly_kept = torch.zeros_like(is_open)
            newly_kept[:, 2 + offset] = True
            is_open = is_open & ~newly_kept
            watch(step, IDS.masked_fill(is_open, 0), is_open.clone(), newly_kept)


def console(is_terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=60, color_system="truecolor", no_color=False)


def test_without_a_terminal_a_line_is_printed_at_each_quarter_and_no_escape_codes() -> None:
    plain = console(False)
    play(Watch(TOKENIZER, plain))
    output = plain.file.getvalue()
    assert "\x1b" not in output
    assert [line for line in output.splitlines() if line.startswith("after step")] == [
        f"after step {step}: {step} of 4 positions" for step in (1, 2, 3, 4)
    ]
    assert output.endswith(TEXT + "\n")
    assert output.count(OPEN_POSITION) == 3 + 2 + 1


def test_frames_show_open_positions_as_blocks_where_they_stand() -> None:
    frames: list[str] = []
    watch = Watch(TOKENIZER, console(False))
    draw = watch.frame
    watch.frame = lambda *arguments: frames.append(draw(*arguments).plain) or draw(*arguments)
    play(watch)
    pieces = [TOKENIZER.decode([token]) for token in IDS[0].tolist()]
    for step, frame in enumerate(frames):
        still_open = {2 + offset for offset in ORDER[step + 1 :]}
        assert frame == "".join(OPEN_POSITION if i in still_open else piece for i, piece in enumerate(pieces))
    assert len(frames) == 4


def test_in_a_terminal_each_step_has_its_colour_and_the_last_frame_stays() -> None:
    terminal = console(True)
    watch = Watch(TOKENIZER, terminal)
    play(watch)
    output = terminal.file.getvalue()
    assert "\x1b[" in output
    last = watch.frame(IDS[0].tolist(), set(), set())
    colours = [watch._style(position, is_new=False).color for position in range(2, 6)]
    assert len(set(colours)) == 4
    assert watch._style(0, is_new=False).color is None
    assert last.plain == TEXT


def test_the_terminal_is_given_back_after_an_error() -> None:
    terminal = console(True)
    watch = Watch(TOKENIZER, terminal)
    with pytest.raises(KeyboardInterrupt), watch:
        raise KeyboardInterrupt
    assert terminal.file.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


def test_a_row_that_finished_earlier_is_not_drawn_again() -> None:
    plain = console(False)
    watch = Watch(TOKENIZER, plain)
    play(watch)
    before = plain.file.getvalue()
    nothing = torch.zeros_like(IDS, dtype=torch.bool)
    watch(4, IDS, nothing, nothing)
    assert plain.file.getvalue() == before
