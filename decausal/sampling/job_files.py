"""Writes the file of a job line by line. It can be continued after the last whole line, but not by another job.

This module is light, because verbs check the files of a job before anything is loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from decausal.errors import UserError
from decausal.files import JOB_SETTINGS, parsed_json

OnProgress = Callable[[int, int], None]
"""Called with the lines that are written, and all lines."""
_CHUNK = 1 << 20


def check_job_files(prompts: str | Path, answers: str | Path) -> tuple[Path, Path]:
    """Returns the paths of a job's prompts and answers.

    Raises:
        UserError: The prompts cannot be read, or cannot be read twice; or as `check_target`.
    """
    source = Path(prompts)
    if source.exists() and not (source.is_file() or source.is_dir()):  # a device never ends, a pipe is read only once
        raise UserError(f"{source} is not a regular file; write its content to a file, and name that")
    try:
        source.open("rb").close()
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}") from None
    return source, check_target(answers)


def holds_messages(prompts: str | Path) -> bool:
    """Returns whether a line of a job's prompts seems to be a conversation."""
    with Path(prompts).open("rb") as file:
        return any(map(seems_a_conversation, file))


def seems_a_conversation(line: bytes) -> bool:
    """Returns whether a line of a job's prompts seems to be a conversation, without parsing it."""
    return b'"messages"' in line


def check_target(answers: str | Path, *, makes_directory: bool = False) -> Path:
    """Returns the path of what a job writes.

    Args:
        answers: The path.
        makes_directory: Whether the job will make a missing directory for it.

    Raises:
        UserError: It cannot be written, or it exists and no job has begun it.
    """
    target = Path(answers)
    has_place = target.parent.is_dir() or (makes_directory and not target.parent.exists())
    if target.is_dir() or not has_place:
        reason = "it is a directory" if target.is_dir() else f"there is no directory {target.parent}"
        raise UserError(f"cannot write {target}: {reason}")
    if target.exists() and target.stat().st_size:
        recorded_settings(target)
    return target


def settings_path(answers: Path) -> Path:
    """Returns the path of a job's settings, beside its answers."""
    return answers.with_name(answers.name + JOB_SETTINGS)


def recorded_settings(answers: Path) -> dict[str, Any]:
    """Returns the settings that a job's answers were begun with.

    Raises:
        UserError: There are none.
    """
    record = settings_path(answers)
    try:
        found = parsed_json(record.read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{answers} exists and is not of a job of decausal: {record.name} is missing; write elsewhere")
    return found


class JobFile:
    """The lines of a job, open after the last whole one.

    Attributes:
        num_lines: Number of lines in the file.
        last: The last of those that an earlier run wrote, or None.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.num_lines, self.last = _repair(file)

    def write(self, line: bytes) -> None:
        """Adds a line. When this returns, the line is in the file."""
        self._file.write(line + b"\n")
        self._file.flush()
        self.num_lines += 1


@contextmanager
def continued(path: Path, facts: dict[str, Any]) -> Iterator[JobFile]:
    """Opens what a job writes after its last whole line.

    Args:
        path: The file, which is made if it does not exist.
        facts: What decides the lines, which are recorded beside them; those under "settings" are named in errors.

    Raises:
        UserError: It cannot be written, another run is writing it, or it was begun with other facts.
    """
    record = settings_path(path)
    try:
        file = path.open("r+b" if path.exists() else "x+b")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    with file:
        _lock(file, path)
        if file.seek(0, os.SEEK_END):
            _refuse_other_job(path, facts)
        else:
            record.write_text(json.dumps(facts, indent=2) + "\n")
        yield JobFile(file)


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError:  # Windows
        return
    try:
        flock(file, LOCK_EX | LOCK_NB)
    except OSError:
        raise UserError(f"another run is writing {path}: wait for it, or write elsewhere") from None


def _repair(file: BinaryIO) -> tuple[int, bytes | None]:
    """Cuts off a torn last line and goes to the end. Returns the number of whole lines, and the last one."""
    num_lines = end = before = position = file.seek(0)
    while chunk := file.read(_CHUNK):
        num_lines += chunk.count(b"\n")
        if (last := chunk.rfind(b"\n")) >= 0:
            earlier = chunk.rfind(b"\n", 0, last)
            before = position + earlier + 1 if earlier >= 0 else end
            end = position + last + 1
        position += len(chunk)
    file.truncate(end)
    file.seek(before)
    return num_lines, file.read(end - before) if num_lines else None


def _refuse_other_job(path: Path, facts: dict[str, Any]) -> None:
    found = recorded_settings(path)
    flat, wanted = ({**facts.pop("settings", {}), **facts} for facts in (dict(found), dict(facts)))
    changed = [
        f"{name} {flat.get(name)!r}, now {wanted.get(name)!r}" for name in wanted if flat.get(name) != wanted[name]
    ]
    if changed:
        raise UserError(
            f"{path} was begun with {', '.join(changed)}: give the same settings to continue, or write elsewhere"
        )
