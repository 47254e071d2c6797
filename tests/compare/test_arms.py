"""What `--recipes`, `--set` and flags for all arms make of a comparison, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from decausal.compare.arms import arm_run, read_arms, refuse_unlike_facts, refuse_unlike_templates
from decausal.compare.budget import Budget, steps_for_tokens, training_rows
from decausal.compare.settings import CompareSettings
from decausal.errors import UserError
from tests.families import tiny_tokenizer


def runs(recipes: str, *overrides: str, seed: int = 0, shared: dict[str, str] | None = None, **settings: Any) -> list:
    arms = read_arms(recipes, overrides, shared)
    return [arm_run(CompareSettings(recipes=recipes, **settings), arm, seed, is_bf16=False) for arm in arms]


def test_an_arms_own_setting_wins_over_one_for_all_and_that_over_the_recipes() -> None:
    plain, aligned = runs(
        "mdm,repr-align", "repr-align.align_weight=7", shared={"learning_rate": "0.5", "align_weight": "2"}
    )
    assert plain.conversion.align_weight == 2
    assert aligned.conversion.align_weight == 7
    assert plain.training["learning_rate"] == aligned.training["learning_rate"] == 0.5


def test_one_recipe_can_be_in_a_comparison_under_two_names(tmp_path: Path) -> None:
    first, second = runs("mdm,fast=mdm", "fast.learning_rate=0.25", output_dir=str(tmp_path))
    assert first.directory == tmp_path / "mdm-seed0"
    assert second.directory == tmp_path / "fast-seed0"
    assert second.training["learning_rate"] == 0.25 != first.training["learning_rate"]


def test_a_yaml_file_is_an_arm_named_after_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("layout: bidirectional\nshift: 0\nmax_steps: 9\n")
    (run,) = runs(str(tmp_path / "mine.yaml"))
    assert run.arm.name == "mine"
    assert run.conversion.shift == 0
    assert "max_steps" not in run.training  # the comparison sets it for all


def test_data_may_differ_by_seed_and_not_by_arm() -> None:
    assert {run.conversion.data for run in runs("mdm,repr-align", seed=3, data="tasks:50@{seed}")} == {"tasks:50@3"}


@pytest.mark.parametrize(
    ("recipes", "overrides", "named"),
    [
        ("", (), "--recipes is empty"),
        ("nothing-such", (), "unknown recipe 'nothing-such'"),
        ("mdm,mdm", (), "names 'mdm' twice"),
        ("a/b=mdm", (), "'a/b'"),
        ("mdm", ("mdm.learning_rte=1",), "learning_rate"),
        ("mdm", ("mmd.learning_rate=1",), "did you mean 'mdm'"),
        ("mdm", ("learning_rate=1",), "ARM.KEY=VALUE"),
        ("mdm", ("mdm.max_steps=5",), "--max_steps of the comparison"),
        ("mdm", ("mdm.seed=5",), "--seeds"),
    ],
)
def test_bad_arms_are_refused_by_name(recipes: str, overrides: tuple[str, ...], named: str) -> None:
    with pytest.raises(UserError, match=named):
        runs(recipes, *overrides)


def test_arms_that_decode_in_different_ways_are_refused() -> None:
    with pytest.raises(UserError, match=r"mdm has shift 1, other has 0.*--any_facts"):
        refuse_unlike_facts(runs("mdm,other=mdm", "other.shift=0"))
    refuse_unlike_facts(runs("mdm,repr-align"))


def test_a_run_on_prompts_without_answers_has_a_length(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "the hat "}) + "\n")
    shared = {"rollout_tokens": "8", "gradient_accumulation_steps": "1", "per_device_train_batch_size": "2"}
    (run,) = runs("opdlm", shared=shared, data=str(tmp_path / "prompts.jsonl"))
    tokenizer = tiny_tokenizer()
    per_step = 2 * (len(tokenizer("the hat ").input_ids) + 8)
    assert steps_for_tokens(Budget("tokens", 10.0 * per_step), run, tokenizer) == 10
    (run,) = runs("bd3lm", data=str(tmp_path / "prompts.jsonl"))
    with pytest.raises(UserError, match="no 'completion': a prompt without an answer is for recipes"):
        training_rows(run, tokenizer)


def test_arms_under_different_chat_templates_are_refused() -> None:
    with pytest.raises(UserError, match="bd3lm and opdlm have another chat_template_kwargs"):
        refuse_unlike_templates(runs("bd3lm,opdlm", 'opdlm.chat_template_kwargs={"a": 1}'))
    refuse_unlike_templates(runs("bd3lm,opdlm", shared={"chat_template": "a.jinja"}))
