"""The benchmark of verified decoding runs, and its formula gives what is counted."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from decausal.models.checkpoint import save_converted
from tests.sampling.tiny_models import converted

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import verified

    return verified


def test_all_shapes_write_the_same_and_as_much_per_pass_as_the_formula_says(
    verified: ModuleType, tmp_path: Path
) -> None:
    save_converted(tmp_path / "model", *converted(layout="block", block_size=4, causal_context=True))
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("import os", "x = [1, 2", "def f(")))
    options = ["--batch_sizes", "1", "2", "--num_rows", "3", "--new_tokens", "20", "--rounds", "1"]
    options += ["--dtypes", "float32", "--draft_lengths", "2", "--json", str(tmp_path / "out.json")]
    verified.main([str(tmp_path / "model"), "--data", str(data), *options])
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [run["case"] for run in runs[:5]] == ["without drafts", "auto", "quadratic 2", "strided 2", "linear 2"]
    for run in runs:
        assert run["same_texts"] == 1
        if run["expected"] is not None and run["batch_size"] == 1:
            assert run["tokens_per_pass"] == pytest.approx(run["expected"], rel=0.1)
