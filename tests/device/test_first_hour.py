"""The command that fills in every GPU figure runs from end to end, here at tiny size, and goes on where it ended.

Serving is left out here: it needs processes of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import first_hour
import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 90, "head_dim": 16}
    config = Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256)
    path = tmp_path_factory.mktemp("model")
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["first_hour.py", "--tiny", "--device", "cpu", *map(str, arguments)])
    return first_hour.main()


def test_all_stages_run_once_and_are_summed_up(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--model", model, "--output_dir", tmp_path) == 0
    names = {path.stem for path in tmp_path.glob("*.json")}
    assert names == {stage.name for stage in first_hour.STAGES if stage.tiny}
    text = (tmp_path / "summary.md").read_text()
    assert "| kinds / plain / utilisation |" in text
    assert text.count("**Missing**: not run yet") == len(first_hour.STAGES) - len(names)
    capsys.readouterr()
    (tmp_path / "train.json").unlink()
    assert run(monkeypatch, "--model", model, "--output_dir", tmp_path) == 0
    reported = [line for line in capsys.readouterr().out.splitlines() if line.startswith("== ")]
    assert [line.split()[1] for line in reported] == ["train:", "train:"]


def test_a_stage_that_fails_is_reported_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "--model", tmp_path / "none", "--output_dir", tmp_path / "out", "--stages", "train") == 1
    assert "**Missing**: SystemExit" in (tmp_path / "out" / "summary.md").read_text()


def test_the_limits_are_under_25_minutes() -> None:
    assert sum(stage.seconds for stage in first_hour.STAGES) < 60 * first_hour.MINUTES
