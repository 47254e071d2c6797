"""The settings of a comparison. This file is light: the command line reads the class to print its help."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from decausal.errors import UserError
from decausal.training.settings.field import setting

STATIC = 1.0
"""The threshold that no probability exceeds: one token per forward."""

SPECULATIVE = "speculative"
"""Stands for self-speculation, which has no threshold."""

Schedule = float | str | None
"""A threshold, SPECULATIVE, or None if nothing is decoded."""

DEFAULT_TOKENS = 200_000
EVAL_DATA = {"tasks": "tasks-heldout", "nll": "stdlib-heldout"}


@dataclass(frozen=True)
class CompareSettings:
    """One comparison: recipes, seeds, the budget of each run, and what is measured.

    Raises:
        UserError: A setting is out of its range, or two contradict each other.
    """

    output_dir: str = setting(
        "decausal-compare", "where all runs and the report go; the same command again continues what is missing"
    )
    model_name_or_path: str = setting("tiny-tasks", "AR model: a directory, a hub id, 'tiny-tasks' or 'tiny'")
    recipes: str = setting(
        "bd3lm,opdlm,align-distill",
        "recipes or YAML files, with commas; NAME=RECIPE names a run so that one recipe can be in it twice",
    )
    seeds: tuple[int, ...] = setting((0, 1, 2), "one run of each recipe for each, with commas")
    reference: str | None = setting(
        None, "the arm whose best quality the others should reach; unset: the first of --recipes"
    )
    any_facts: bool = setting(
        False, "compare recipes whose layout, block size or shift differ; they decode in different ways"
    )

    data: str = setting(
        "tasks:1000@{seed}", "training data of all arms, as for convert; {seed} stands for the run's seed"
    )
    budget_tokens: int | None = setting(
        None, f"training tokens of each run, as --tokens counts them; {DEFAULT_TOKENS} where no budget is given"
    )
    max_steps: int | None = setting(None, "training steps of each run")
    budget_minutes: float | None = setting(None, "training time of each run; measuring is not counted")
    tokens: Literal["clean", "supervised", "total"] = setting(
        "clean",
        "what the figure and --budget_tokens count. clean: tokens of the clean rows that training forwards read; "
        "supervised: targets of the loss; total: clean, and what rollouts generated",
    )

    eval: Literal["tasks", "nll"] = setting("tasks", "tasks: exact answers; nll: NELBO per token of held-out text")
    eval_data: str | None = setting(None, "what to measure on; unset: tasks-heldout, or stdlib-heldout for nll")
    eval_at: tuple[float, ...] = setting(
        (0.1, 0.2, 0.35, 0.5, 0.75, 1.0), "shares of the budget after which each run is measured"
    )
    eval_prompts: int = setting(140, "held-out prompts while a run trains, the same for all (tasks)")
    final_prompts: int = setting(420, "held-out prompts at its end, the same for all (tasks)")
    eval_thresholds: tuple[float, ...] = setting((1.0, 0.9), "thresholds while a run trains (tasks)")
    thresholds: tuple[float, ...] = setting(
        (1.0, 0.95, 0.9, 0.8, 0.7), "thresholds at its end; 1 is the static schedule, one token per forward (tasks)"
    )
    speculative: bool = setting(
        True, "at its end, also by self-speculation, where the layout is block: masks draft, the weights verify (tasks)"
    )
    max_new_tokens: int | None = setting(None, "most tokens of an answer; unset: what the longest needs (tasks)")
    eval_batch_size: int = setting(140, "prompts answered together (tasks)")
    eval_rows: int = setting(32, "held-out rows to measure on (nll)")
    eval_samples: int = setting(2, "mask patterns per held-out row (nll)")

    bf16: bool | None = setting(
        None, "compute in bfloat16 (weights stay fp32); unset: on a GPU that multiplies it in hardware"
    )
    num_workers: int | None = setting(
        None, "runs at the same time, each on its share of the cores; unset: one per core for small models on a CPU"
    )
    overwrite: bool = setting(False, "train all runs again, also finished ones")

    def __post_init__(self) -> None:
        for name in ("eval_prompts", "final_prompts", "eval_batch_size", "eval_rows", "eval_samples"):
            _refuse_unless(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("budget_tokens", "max_steps", "num_workers", "max_new_tokens"):
            value = getattr(self, name)
            _refuse_unless(value is None or value >= 1, name, value, "must be at least 1")
        minutes = self.budget_minutes
        _refuse_unless(
            minutes is None or 0 < minutes < math.inf, "budget_minutes", minutes, "must be above 0, and a number"
        )
        given = [name for name in ("budget_tokens", "max_steps", "budget_minutes") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"--{given[0]} and --{given[1]} exclude each other: runs are matched in one budget")
        self._check_lists()

    def _check_lists(self) -> None:
        if not self.seeds:
            raise UserError("--seeds is empty: give at least one, such as --seeds 0,1,2")
        _refuse_unless(min(self.seeds) >= 0, "seeds", self.seeds, "must not be negative")
        for name in ("seeds", "thresholds", "eval_thresholds", "eval_at"):
            values = getattr(self, name)
            _refuse_unless(bool(values), name, "''", "give at least one value")
            _refuse_unless(len(set(values)) == len(values), name, values, "holds a value twice")
        for name in ("thresholds", "eval_thresholds", "eval_at"):
            values = getattr(self, name)
            _refuse_unless(all(0 < value <= 1 for value in values), name, values, "must be above 0 and at most 1")

    @property
    def points(self) -> tuple[float, ...]:
        """Shares of the budget at which a run is measured, ascending. The last is always the whole budget."""
        return tuple(sorted({*self.eval_at, 1.0}))

    @property
    def measured_data(self) -> str:
        """The data to measure on."""
        return self.eval_data or EVAL_DATA[self.eval]


def _refuse_unless(is_good: bool, name: str, value: object, accepted: str) -> None:
    if not is_good:
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        raise UserError(f"--{name} {shown}: {accepted}")
