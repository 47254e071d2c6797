"""What the terminal shows: live frames there, plain lines elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

from decausal.demo.history import Measurement
from decausal.demo.terminal import TrainingView, measurement_table


def measurement(step: int) -> Measurement:
    return Measurement(step, step / 2, 9.0 - step / 10, 8.0 - step / 10, None)


def shown(console: Console, num_steps: int = 4) -> str:
    with TrainingView(console, num_steps) as view:
        for arm in ("plain", "aligned"):
            view.begin(arm)
            view.measured(arm, measurement(0))
            for step in range(1, num_steps + 1):
                view.step(arm, step, 7.0)
            view.measured(arm, measurement(num_steps))
    return console.file.getvalue()


def test_without_a_terminal_each_measurement_is_one_line_without_control_codes() -> None:
    lines = shown(Console(file=io.StringIO(), force_terminal=False, width=30)).splitlines()
    assert len(lines) == 6
    assert not any(character < " " for line in lines for character in line)
    assert "step    4/4     2.0 s  masked cross-entropy 8.6000  NELBO 7.6000" in lines[2]


def test_in_a_terminal_bars_and_table_are_drawn_and_the_table_stays() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=30)
    text = shown(console)
    assert "\x1b[" in text
    assert "4/4" in text
    assert "8.600" in text.rpartition("lower is better")[2]


def test_a_long_table_shows_the_latest_steps_of_the_run_in_progress() -> None:
    plain = [measurement(step) for step in range(20)]
    for num_aligned, expected in ((0, range(14, 20)), (3, range(6)), (9, range(3, 9))):
        table = measurement_table({"plain": plain, "aligned": plain[:num_aligned]}, most_rows=6)
        assert list(table.columns[0].cells) == [str(step) for step in expected]
