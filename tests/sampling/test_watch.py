"""The live view: order and colour in a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from decausal.sampling.watching.watch import OPEN_POSITION, Watch
from tests.families import tiny_tokenizer
from tests.sampling.denoising import steps

TOKENIZER = tiny_tokenizer()
TEXT = "if x:\n  y"
IDS = TOKENIZER(TEXT)["input_ids"]
ORDER = [3, 1, 0, 2]
"""Positions from 2 on that are open, in the order in which they are kept."""


def play(watch: Watch) -> None:
    with watch:
        for step in steps(IDS, ORDER):
            watch(step)
            watch(replace(step, ticket=1))  # another row, which is not shown


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
    pieces = [TOKENIZER.decode([token]) for token in IDS]
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
    last = watch.frame(watch._followed)
    colours = [span.style.color for span in last.spans if span.style.color is not None]
    assert len(set(colours)) == len(colours) == 4  # given text has none
    assert last.plain == TEXT


def test_the_terminal_is_given_back_after_an_error() -> None:
    terminal = console(True)
    watch = Watch(TOKENIZER, terminal)
    with pytest.raises(KeyboardInterrupt), watch:
        raise KeyboardInterrupt
    assert terminal.file.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


def test_what_lies_after_an_early_end_is_not_shown() -> None:
    plain = console(False)
    watch = Watch(TOKENIZER, plain)
    for step in steps(IDS, [2, 0], end=1):
        watch(step)
    output = plain.file.getvalue()
    assert "after step 2: 4 of 4 positions" in output
    assert output.endswith(TOKENIZER.decode(IDS[:3]) + "\n")


def test_every_round_of_an_edit_is_shown_from_its_beginning() -> None:
    plain = console(False)
    watch = Watch(TOKENIZER, plain)
    for _ in range(2):
        play(watch)
    assert plain.file.getvalue().count("after step 4: 4 of 4 positions") == 2
