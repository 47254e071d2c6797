"""Checks a run's paths and values before torch and transformers are imported."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from decausal.data.sources import refuse_missing
from decausal.data.template_file import read_template
from decausal.errors import UserError
from decausal.models.names import check_source, is_left_to_the_hub, located, refuse_as_base
from decausal.training.argument_values import PRETRAIN_DEFAULTS, check_values
from decausal.training.run_directory import refuse_taken, wants_resume
from decausal.training.sample_prompts import read_sample_prompts
from decausal.training.settings import ConversionSettings
from decausal.training.settings.pretraining import PretrainSettings
from decausal.training.settings.weights import NEEDS_PEFT


def check_conversion(settings: ConversionSettings, training: Mapping[str, Any]) -> None:
    """Refuses early what `convert` would refuse after its slow import.

    Raises:
        UserError: A value is out of range, the output directory is not free, or there are no such model, data or
            prompts.
    """
    if settings.data is None:
        raise UserError("--data is missing: name a file, a directory, a glob, a hub data set, or 'stdlib'")
    check_values(training)
    if settings.lora_r and find_spec("peft") is None:
        raise UserError(NEEDS_PEFT)
    _check_length(settings, training)
    _check_output(training, overwrite=settings.overwrite)
    _check_named(settings)


def check_plan(settings: ConversionSettings, training: Mapping[str, Any]) -> None:
    """Refuses early what `plan` would refuse after its slow import.

    Raises:
        UserError: A value is out of range, or there are no such model, data or prompts.
    """
    check_values({"output_dir": "unused"} | dict(training))
    _check_length(settings, training)
    _check_named(settings)


def _check_length(settings: ConversionSettings | PretrainSettings, training: Mapping[str, Any]) -> None:
    if settings.streaming and training.get("max_steps", -1) < 1:
        raise UserError(
            "--streaming true needs --max_steps: how many rows the data give is not known before they have been read"
        )


def _check_named(settings: ConversionSettings) -> None:
    """Raises UserError unless all models and files that the settings name are there."""
    check_source(
        settings.model_name_or_path,
        settings.revision,
        may_be_converted=True,
        merge_adapter=settings.merge_adapter,
    )
    if settings.weights == "gated" and not is_left_to_the_hub(settings.model_name_or_path):
        found = located(settings.model_name_or_path, settings.revision, may_be_converted=True, merge_adapter=True)
        refuse_as_base(settings.model_name_or_path, *found)
    if settings.teacher_model_name_or_path is not None:
        check_source(settings.teacher_model_name_or_path)
    _check_data(settings)
    if settings.chat_template is not None:
        read_template(settings.chat_template)
    if settings.sample_prompts is not None:
        read_sample_prompts(settings.sample_prompts)


def check_pretraining(settings: PretrainSettings, training: Mapping[str, Any]) -> None:
    """Refuses early what `pretrain` would refuse after its slow import.

    Raises:
        UserError: A value is out of range, the output directory is not free, or there are no such data.
    """
    training = PRETRAIN_DEFAULTS | dict(training)
    check_values(training)
    _check_length(settings, training)
    _check_output(training, overwrite=settings.overwrite)
    _check_data(settings)


def _check_output(training: Mapping[str, Any], *, overwrite: bool) -> None:
    resume = wants_resume(training.get("resume_from_checkpoint"))
    refuse_taken(Path(training["output_dir"]), resume=resume, overwrite=overwrite)


def _check_data(settings: ConversionSettings | PretrainSettings) -> None:
    for data in (settings.data, settings.eval_data):
        if data is not None:
            refuse_missing(data)
