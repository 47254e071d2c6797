"""A sweep may ask the harness's own tasks, as `decausal eval harness` does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from decausal.cli import main
from decausal.errors import UserError
from decausal.evaluation.harness.run import HarnessSettings, evaluate_harness
from decausal.evaluation.harness.written import HarnessQuestions
from decausal.models.checkpoint import load_converted


@pytest.mark.parametrize("options", [{}, {"threshold": 1e-9}], ids=str)
def test_the_score_is_the_one_of_the_harness(models: dict[str, Path], tasks: Path, options: dict[str, float]) -> None:
    questions = HarnessQuestions(["small_answer"], HarnessSettings(limit=4), tasks)
    answered = questions.ask(load_converted(models["block"]), options)
    found = evaluate_harness(
        models["block"], ["small_answer"], HarnessSettings(limit=4, sampler=options), include_path=tasks, device="cpu"
    )
    (score,) = found.scores
    assert answered.values == {"small_answer": pytest.approx([score.value] * 4)}
    assert found.speed is not None
    assert answered.num_tokens / answered.num_forwards == pytest.approx(found.speed["tokens_per_forward"])
    assert answered.texts == found.texts["small_answer"]


def test_the_command_draws_each_setting_and_the_source(
    models: dict[str, Path], tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "sweep.json"
    command = ["sweep", str(models["one"]), "--tasks", "small_answer", "--include_path", str(tasks), "--limit", "3"]
    assert main([*command, "--over", "temperature=0,0.5", "--output", str(output), "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [point["series"] for point in points] == ["AR", "temperature", "temperature", "verified"]
    assert all(point["num_examples"] == 3 for point in points)
    assert points[1]["accuracy"] == points[0]["accuracy"]
    assert output.exists()


def test_only_what_is_written_can_be_asked_and_metrics_are_named(models: dict[str, Path], tasks: Path) -> None:
    with pytest.raises(UserError, match="task 'small_choices' asks how likely answers are"):
        HarnessQuestions(["small_choices"], HarnessSettings(), tasks)
    questions = HarnessQuestions(["small_answer"], HarnessSettings(limit=2), tasks, metric="acc")
    with pytest.raises(UserError, match=r"--metric acc: task 'small_answer' has no such score.*it has exact_match"):
        questions.ask(load_converted(models["block"]), {})
