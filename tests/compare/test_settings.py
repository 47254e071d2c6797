"""Bad comparisons are refused in one line, and leave no files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from decausal.cli import main
from decausal.compare.budget import Budget
from decausal.compare.settings import CompareSettings
from decausal.training.meters import TokenCounts


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--recipes", "no-such"], "unknown recipe 'no-such'"),
        (["--recipes", "mdm,repr-align", "--seeds="], "--seeds is empty"),
        (["--seeds", "1,1"], "twice"),
        (["--budget_tokens", "0"], "--budget_tokens 0"),
        (["--max_steps", "0"], "--max_steps 0"),
        (["--budget_minutes", "0"], "--budget_minutes 0"),
        (["--budget_minutes", "nan"], "--budget_minutes"),
        (["--max_steps", "5", "--budget_tokens", "100"], "exclude each other"),
        (["--thresholds", "1,0"], "--thresholds"),
        (["--eval_at", "0.5,2"], "--eval_at"),
        (["--eval", "guess"], "eval"),
        (["--recipes", "mdm", "--eval_data", "stdlib-heldout"], "--eval nll"),
        (["--recipes", "mdm", "--eval_data", "tasks-heldout:10"], "10 examples"),
        (["--recipes", "mdm", "--reference", "mmd"], "did you mean 'mdm'"),
        (["--recipes", "mdm", "--learnin_rate", "1"], "learning_rate"),
        (["--set"], "--set needs a value"),
    ],
)
def test_bad_input_is_reported_in_one_line_and_leaves_nothing(
    flags: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "tiny", "--output_dir", str(tmp_path / "out"), *flags]) == 2
    reported = capsys.readouterr().err.strip().splitlines()
    assert len(reported) == 1
    assert named in reported[0]
    assert not (tmp_path / "out").exists()


def test_help_lists_the_settings_and_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--help"]) == 0
    reported = capsys.readouterr().out
    assert all(f"--{name}" in reported for name in [*CompareSettings.__dataclass_fields__, "set ARM.KEY=VALUE", "json"])


def test_several_processes_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    assert main(["compare", "tiny", "--recipes", "mdm", "--output_dir", str(tmp_path / "out")]) == 2
    assert "one process" in capsys.readouterr().err


def test_each_budget_counts_its_own_unit() -> None:
    counts = TokenCounts(clean=300, supervised=50, generated=100)
    used = {"max_steps": 8, "budget_tokens": 1000, "budget_minutes": 2.0}
    shares = [Budget.of(CompareSettings(**{name: used[name]})).progress(4, counts, 30.0) for name in used]
    assert shares == [0.5, 0.3, 0.25]
    total = Budget.of(CompareSettings(budget_tokens=1000, tokens="total"))
    assert total.progress(4, counts, 30.0) == 0.4
    assert CompareSettings(eval_at=(0.5, 0.1)).points == (0.1, 0.5, 1.0)
