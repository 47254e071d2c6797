"""Bodies of 4 MiB cost a server at most 300 MiB, and others 2 seconds: what the benchmark measures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_bodies_of_megabytes_cost_little_and_keep_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import serve_hostile

    limits = ["--memory", "300", "--wait", "2", "--turn", "20"]
    monkeypatch.setattr(sys, "argv", ["serve_hostile.py", "--threads", "1", "--json", str(tmp_path / "found"), *limits])
    assert serve_hostile.main() == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "found").read_text())
    assert found["costs"].keys() == {*serve_hostile.BODIES, "a head without end"}
    assert found["behind_a_full_queue"]["rows"] > 800
