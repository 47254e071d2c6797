"""The runs of a comparison. Wrong paths and values are found here before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from decausal.compare.arms import Arm, ArmRun, arm_run, refuse_unlike_facts, refuse_unlike_templates
from decausal.compare.settings import CompareSettings
from decausal.data.sources import refuse_missing, task_source
from decausal.data.tasks import Example
from decausal.data.template_file import read_template
from decausal.errors import UserError, one_of
from decausal.files import parsed_yaml
from decausal.models.names import check_source
from decausal.training.run_directory import RUN_FILE, refuse_taken
from decausal.wording import quantity

MARK = {"verb": "compare"}


def check_inputs(settings: CompareSettings, arms: Sequence[Arm]) -> None:
    """Refuses early what `run_compare` would refuse after its slow import.

    Raises:
        UserError: Arms contradict themselves or each other, there is no such model or data, or the directory is another
            verb's.
    """
    output_dir = Path(settings.output_dir)
    refuse_other_verb(output_dir)
    refuse_taken(output_dir, resume=True)
    runs = all_runs(settings, arms, is_bf16=False)
    check_source(settings.model_name_or_path)
    for data in dict.fromkeys(run.conversion.data for run in runs):
        refuse_missing(data)
    if runs[0].conversion.chat_template is not None:
        read_template(runs[0].conversion.chat_template)
    if settings.eval == "tasks":
        held_out_problems(settings)
    else:
        refuse_missing(settings.measured_data)


def all_runs(settings: CompareSettings, arms: Sequence[Arm], *, is_bf16: bool) -> list[ArmRun]:
    """Returns every run, a seed of each arm before the next seed.

    Raises:
        UserError: The reference is not an arm, a setting is not accepted, or facts differ that must agree.
    """
    names = [arm.name for arm in arms]
    if settings.reference is not None and settings.reference not in names:
        raise UserError(
            f"--reference {settings.reference}: there is no such arm{one_of(settings.reference, names, 'arms')}"
        )
    runs = [arm_run(settings, arm, seed, is_bf16=is_bf16) for seed in settings.seeds for arm in arms]
    refuse_unlike_templates(runs)
    if not settings.any_facts:
        refuse_unlike_facts(runs)
    return runs


def refuse_other_verb(output_dir: Path) -> None:
    """Raises UserError if the directory holds a run of another verb."""
    try:
        recorded: Any = parsed_yaml((output_dir / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return  # a directory that no run of ours made is refused when it is claimed
    if not (isinstance(recorded, dict) and MARK.items() <= recorded.items()):
        raise UserError(f"{output_dir} holds the run of another verb; choose another --output_dir")


def held_out_problems(settings: CompareSettings) -> list[Example]:
    """Returns all held-out examples, the tasks in turn. Their longest answer does not depend on how many are measured.

    Raises:
        UserError: `--eval_data` names no held-out tasks, or too few examples.
    """
    name = settings.measured_data
    if name.partition(":")[0].partition("@")[0] != "tasks-heldout":
        raise UserError(
            f"--eval_data {name}: --eval tasks measures exact answers on tasks-heldout, or on some of its tasks, such "
            "as tasks-heldout:sorting+lookup; for other data give --eval nll"
        )
    most = max(settings.eval_prompts, settings.final_prompts)
    problems = list(task_source(name).examples())
    if len(problems) < most:
        raise UserError(
            f"--eval_data {name} has {quantity(len(problems), 'example')}, "
            f"{most} are to be measured; raise its count, such as "
            f"tasks-heldout:{most}, or lower --eval_prompts and --final_prompts"
        )
    return problems
