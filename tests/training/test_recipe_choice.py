"""A recipe is chosen by what there is and what is wanted, and one line says which and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from decausal.cli import main
from decausal.config import read_recipe
from decausal.errors import UserError
from decausal.models.facts import ConversionFacts, write_facts
from decausal.training.recipe_choice import GOALS, choose_recipe

QUESTION = {"messages": [{"role": "user", "content": "the rain?"}]}
ANSWER = {"messages": [*QUESTION["messages"], {"role": "assistant", "content": "yes"}]}


@pytest.mark.parametrize(
    ("flags", "goal", "recipe"),
    [
        ({}, None, "repr-align"),
        ({"data": "questions.jsonl"}, None, "opdlm"),
        ({"data": "answers.jsonl"}, None, "repr-align"),
        ({"data": "prompts.jsonl"}, None, "opdlm"),
        ({"data": "text.txt"}, None, "repr-align"),
        ({"data": "stdlib"}, None, "repr-align"),
        ({"data": "text.txt", "model_name_or_path": "converted"}, None, "fine-tune"),
        ({"block_size": "8"}, None, "bd3lm"),
        ({"rows": "rollout"}, None, "opdlm"),
        ({"weights": "gated", "block_size": "4"}, None, "lossless"),
        *(({"data": "questions.jsonl"}, goal, recipe) for goal, (recipe, _) in GOALS.items()),
    ],
)
def test_the_recipe_follows_from_model_data_and_goal(
    flags: dict[str, Any], goal: str | None, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, record in (("questions", QUESTION), ("answers", ANSWER), ("prompts", {"prompt": "a", "completion": ""})):
        Path(f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    Path("text.txt").write_text("the rain in spain")
    Path("converted").mkdir()
    write_facts("converted", ConversionFacts(source="tiny", layout="bidirectional", shift=1, mask_token_id=3))
    choice = choose_recipe(flags, goal)
    assert choice.recipe == recipe
    assert read_recipe(recipe)
    assert choice.line.startswith(f"recipe {recipe}: ")
    assert "\n" not in choice.line


def test_the_choice_is_printed_with_the_settings_and_small_models_have_their_own_rate(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for model, rate in (("tiny", 1e-3), ("other/model", read_recipe("repr-align")["learning_rate"])):
        assert main(["convert", model, "--print_config"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("# recipe repr-align: the model fills gaps")
        assert f"learning_rate: {rate}" in out
    assert main(["convert", "tiny", "--recipe", "mdm", "--learning_rate", "2e-5", "--print_config"]) == 0
    assert capsys.readouterr().out.count("learning_rate: 2.0e-05") == 1


@pytest.mark.parametrize("choice", [["--recipe", "lossless"], ["--goal", "exact"]])
def test_gated_weights_learn_from_the_answers_that_the_model_writes_where_data_have_none(
    choice: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("questions.jsonl").write_text(json.dumps(QUESTION) + "\n")
    Path("answers.jsonl").write_text(json.dumps(ANSWER) + "\n")
    for data, rows, given in (
        ("questions.jsonl", "rollout", []),
        ("answers.jsonl", "corpus", []),
        ("questions.jsonl", "corpus", ["--rows", "corpus"]),
    ):
        assert main(["convert", "tiny", *choice, "--data", data, *given, "--print_config"]) == 0
        out = capsys.readouterr().out
        assert f"\nrows: {rows}\n" in out
        assert ("# rows rollout: the data are prompts without answers" in out) == (rows == "rollout")


def test_an_unknown_goal_names_the_nearest_and_a_goal_beside_a_recipe_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(UserError, match="did you mean 'speed'"):
        choose_recipe({}, "sped")
    assert main(["convert", "tiny", "--recipe", "mdm", "--goal", "speed", "--print_config"]) == 2
    assert "give one of them" in capsys.readouterr().err
