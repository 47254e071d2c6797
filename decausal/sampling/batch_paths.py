"""The files of a batch job, checked before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from decausal.errors import UserError


def check_job_files(prompts: str | Path, answers: str | Path) -> tuple[Path, Path]:
    """Returns the paths of a job's prompts and answers.

    Raises:
        UserError: The prompts cannot be read, the answers cannot be written, or a file of something else is in their
            place.
    """
    source, target = Path(prompts), Path(answers)
    try:
        source.open("rb").close()
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}") from None
    if target.is_dir() or not target.parent.is_dir():
        reason = "it is a directory" if target.is_dir() else f"there is no directory {target.parent}"
        raise UserError(f"cannot write {target}: {reason}")
    if target.exists() and target.stat().st_size:
        recorded_settings(target)
    return source, target


def settings_path(answers: Path) -> Path:
    """Returns the path of a job's settings, beside its answers."""
    return answers.with_name(f"{answers.name}.settings.json")


def recorded_settings(answers: Path) -> dict[str, Any]:
    """Returns the settings that a job's answers were begun with.

    Raises:
        UserError: There are none.
    """
    record = settings_path(answers)
    try:
        found = json.loads(record.read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{answers} exists and is not of a batch job: {record.name} is missing; write elsewhere")
    return found
