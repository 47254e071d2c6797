"""The benchmark of start-up waits for what a command writes, and compares rounds with rounds."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import startup

    return startup


def test_a_command_is_ended_when_it_has_written_what_is_waited_for(benchmark: ModuleType, tmp_path: Path) -> None:
    script = "import pathlib, time; print('first token'); time.sleep(600); pathlib.Path('late').touch()"
    found = benchmark.seconds_until(benchmark.Command(("-c", script), until="token", directory=str(tmp_path)))
    assert found.processor > 0
    assert 0 < found.wall < 600
    assert not (tmp_path / "late").exists()


def test_a_command_that_does_not_write_it_is_an_error(benchmark: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="did not write 'token'"):
        benchmark.seconds_until(benchmark.Command(("-c", "print('nothing')"), until="token"))


def test_ratios_are_those_of_the_same_round(benchmark: ModuleType) -> None:
    named = {"plain": benchmark.Command(("-c", "")), "ours": benchmark.Command(("-c", ""), floor="plain", target=5)}
    found = {
        "plain": [benchmark.Seconds(1, 1), benchmark.Seconds(10, 10), benchmark.Seconds(2, 2)],
        "ours": [benchmark.Seconds(3, 1.5), benchmark.Seconds(11, 20), benchmark.Seconds(4, 3)],
    }
    figures = benchmark.summary(named, found)
    assert figures["ours"] == {"seconds": 3, "processor_seconds": 1.5, "ratio": 1.5, "target_seconds": 5}
    assert figures["plain"]["ratio"] is None
    assert benchmark.as_table(figures, "").row_count == 2


def test_every_command_of_ours_has_a_target_and_every_floor_is_timed(benchmark: ModuleType, tmp_path: Path) -> None:
    named = benchmark.commands("tiny", tmp_path / "converted", tmp_path, "mdm")
    assert all((command.target is not None) == name.startswith("decausal") for name, command in named.items())
    assert {command.floor for command in named.values()} - {None} <= set(named)
