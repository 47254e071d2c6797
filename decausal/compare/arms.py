"""The arms of a comparison: named recipes, overrides for one or all of them, and facts that must agree."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decausal.compare.defaults import default_settings
from decausal.compare.settings import CompareSettings
from decausal.config import read_recipe, resolve
from decausal.errors import UserError, nearest
from decausal.training.settings import ConversionSettings

_NAME = re.compile(r"[\w.+-]+")
_FACTS = ("layout", "block_size", "causal_context", "shift", "causal_groups", "weights")
_SET_HERE = {
    "output_dir": "--output_dir of the comparison",
    "overwrite": "--overwrite of the comparison",
    "resume_from_checkpoint": "the same command again, which continues what is missing",
    "model_name_or_path": "--model_name_or_path of the comparison",
    "model": "--model_name_or_path of the comparison",
    "seed": "--seeds",
    "max_steps": "--max_steps of the comparison",
    "num_train_epochs": "--max_steps of the comparison",
    "eval_data": "--eval_data of the comparison",
    "eval_steps": "--eval_at",
    "eval_strategy": "--eval_at",
    "save_steps": "--eval_at",
    "save_strategy": "--eval_at",
    "bf16": "--bf16 of the comparison",
}


@dataclass(frozen=True)
class Arm:
    """One recipe in a comparison.

    Attributes:
        name: The name in the report. The names of its runs' directories begin with it too.
        recipe: The name of a recipe that comes with decausal, or a YAML file.
        overrides: Settings of this arm that override the recipe's, as strings.
    """

    name: str
    recipe: str
    overrides: dict[str, str] = field(default_factory=dict)

    def directory(self, output_dir: str | Path, seed: int) -> Path:
        """Returns the directory of the run with one seed."""
        return Path(output_dir, f"{self.name}-seed{seed}")


@dataclass(frozen=True)
class ArmRun:
    """A run to be trained: an arm, a seed, and all settings except the length."""

    arm: Arm
    seed: int
    conversion: ConversionSettings
    training: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.arm.name}-seed{self.seed}"

    @property
    def directory(self) -> Path:
        return Path(self.training["output_dir"])


def read_arms(recipes: str, overrides: Sequence[str] = (), shared: Mapping[str, str | bool] | None = None) -> list[Arm]:
    """Reads `--recipes` and every `--set ARM.KEY=VALUE`.

    Args:
        recipes: Names or YAML files with commas, each optionally after `NAME=`.
        overrides: `ARM.KEY=VALUE`, for one arm.
        shared: Keys and values for all arms. An arm's own override them.

    Raises:
        UserError: There is no recipe, a name is bad or given twice, or an override is for an unknown arm or for a
            setting of the comparison.
    """
    entries = [entry.strip() for entry in recipes.split(",") if entry.strip()]
    if not entries:
        raise UserError("--recipes is empty: name at least one, such as --recipes bd3lm,opdlm")
    arms: dict[str, Arm] = {}
    for entry in entries:
        name, equals, recipe = entry.partition("=")
        recipe = recipe if equals else entry
        name = name if equals else Path(entry).stem if entry.endswith((".yaml", ".yml")) else entry
        if not _NAME.fullmatch(name):
            raise UserError(f"--recipes {entry}: '{name}' cannot be a directory's name; use letters, digits, - and _")
        if name in arms:
            raise UserError(f"--recipes names '{name}' twice; call one of them otherwise, such as {name}-2={recipe}")
        arms[name] = Arm(name, recipe, _checked({key: _text(value) for key, value in (shared or {}).items()}))
    for override in overrides:
        arm_name, key, value = _parts(override, arms)
        arms[arm_name].overrides.update(_checked({key: value}))
    return list(arms.values())


def arm_run(settings: CompareSettings, arm: Arm, seed: int, *, is_bf16: bool) -> ArmRun:
    """Returns all settings of one run except its length.

    Raises:
        UserError: An unknown recipe or setting, or a value that is not accepted.
    """
    recipe = read_recipe(arm.recipe)
    recipe = {key: value for key, value in recipe.items() if key not in _SET_HERE}
    if recipe.get("layout") == "block" and recipe.get("noise") != "all":
        recipe |= default_settings(settings.model_name_or_path, arm.recipe)
    flags = [f"--{key}={value}" for key, value in ({"data": settings.data} | arm.overrides).items()]
    flags = [flag.replace("{seed}", str(seed)) for flag in flags]
    own = {"model_name_or_path": settings.model_name_or_path, "seed": seed}
    conversion, training = resolve(ConversionSettings, recipe | own, flags, where=f"recipe {arm.recipe}")
    if conversion.streaming:
        raise UserError(f"streaming of {arm.name}: a comparison packs all rows before a clock starts; leave it out")
    return ArmRun(
        arm,
        seed,
        conversion.with_facts(),
        {"per_device_train_batch_size": 8}
        | training
        | {
            "output_dir": str(arm.directory(settings.output_dir, seed)),
            "bf16": is_bf16,
            "logging_steps": 1,
            "save_strategy": "no",
            "save_total_limit": 1,
            "disable_tqdm": True,
            "report_to": "none",
        },
    )


def refuse_unlike_templates(runs: Sequence[ArmRun]) -> None:
    """Raises UserError if arms would render conversations, and held-out ones, with different templates."""
    first, *others = runs
    for run in others:
        for name in ("chat_template", "chat_template_kwargs"):
            if getattr(run.conversion, name, None) != getattr(first.conversion, name, None):
                raise UserError(
                    f"{first.arm.name} and {run.arm.name} have another {name}: what they are measured on would differ; "
                    f"give --{name} for all"
                )


def refuse_unlike_facts(runs: Sequence[ArmRun]) -> None:
    """Raises UserError if arms would read and decode differently, since that alone would change the results."""
    first, *others = runs
    for run in others:
        for fact in _FACTS:
            if not (hasattr(run.conversion, fact) and hasattr(first.conversion, fact)):
                continue
            value, expected = getattr(run.conversion, fact), getattr(first.conversion, fact)
            if value != expected:
                raise UserError(
                    f"{first.arm.name} has {fact} {expected}, {run.arm.name} has {value}: they decode in different "
                    f"ways; give --{fact} for all, or --any_facts true to compare them all the same"
                )


def _parts(override: str, arms: Mapping[str, Arm]) -> tuple[str, str, str]:
    left, equals, value = override.partition("=")
    arm_name, dot, key = left.rpartition(".")
    if not (equals and dot and arm_name and key):
        raise UserError(f"--set {override}: write ARM.KEY=VALUE, such as --set {next(iter(arms))}.learning_rate=1e-4")
    if arm_name not in arms:
        raise UserError(f"--set {override}: no arm is called '{arm_name}'{nearest(arm_name, arms)}")
    return arm_name, key, value


def _checked(overrides: dict[str, str]) -> dict[str, str]:
    for key in overrides:
        if key in _SET_HERE:
            raise UserError(f"'{key}' is the comparison's own to set: use {_SET_HERE[key]}")
    return overrides


def _text(value: str | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else value
