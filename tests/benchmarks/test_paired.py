"""The benchmark of two checkouts pairs figures of one case, and says how far the ratios spread."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def paired(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import paired

    return paired


class Side:
    """A checkout whose cases take times that are known."""

    def __init__(self, benchmark: str, root: Path) -> None:
        self.slowness = 2.0 if root.name == "slow" else 1.0
        self.asked: list[str] = []

    def answer(self) -> list[str]:
        return ["short", "long", "end"]

    def run(self, case: str) -> dict[str, float]:
        self.asked.append(case)
        return {} if case == "end" else {"": self.slowness * (1.0 if case == "short" else 10.0)}


def test_each_case_is_paired_with_itself_and_the_first_round_does_not_count(paired: Any, monkeypatch: Any) -> None:
    started: list[Side] = []

    def sides(benchmark: str, roots: Any) -> Any:
        started[:] = [Side(benchmark, root) for root in roots]
        return nullcontext(started)

    monkeypatch.setattr(paired, "sides", sides)
    monkeypatch.setattr(paired, "HERE", Path("slow"))
    pairs = paired.measure("decode", Path("fast"), 3, 0)
    assert pairs == {"decode, short": [[2.0, 1.0]] * 3, "decode, long": [[20.0, 10.0]] * 3}
    assert all(sorted(side.asked) == ["end"] + ["long"] * 4 + ["short"] * 4 for side in started)


def test_the_median_of_ratios_is_given_with_their_quartiles(paired: Any) -> None:
    found = paired.summary([(ratio, 1.0) for ratio in (5.0, 1.0, 4.0, 2.0, 3.0)])
    assert (found["ratio"], found["lower_quartile"], found["upper_quartile"], found["pairs"]) == (3.0, 2.0, 4.0, 5)
