"""One run, one directory: who may write to it, and which checkpoints in it are whole."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from decausal.errors import UserError

RUN_FILE = "run.yaml"
STAGING = ".saving"  # a checkpoint is written here and renamed when whole, so a half-written one never has its name
_LOCK = ".lock"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@contextmanager
def claimed(
    output_dir: Path, settings: Any, training: dict[str, Any], *, resume: bool, overwrite: bool
) -> Iterator[None]:
    """Holds `output_dir` for one run; the lock is the kernel's, so it ends with the process, however that ends.

    The directory then holds `run.yaml`, the run's settings as resolved. Of several processes of one run, the first
    holds the directory.

    Raises:
        UserError: another run holds the directory, it is not empty and neither `resume` nor `overwrite` is set, it
            is to be overwritten but no run made it, or it is to be resumed but holds no whole checkpoint.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        yield
        return
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir {output_dir} is a file; name a directory")
    existed = output_dir.exists()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(output_dir / _LOCK, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UserError(f"cannot write to output_dir {output_dir}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"output_dir {output_dir} is in use by another run; wait for it or choose another directory"
            ) from error
        try:
            _check_contents(output_dir, resume=resume, overwrite=overwrite)
            shutil.rmtree(output_dir / STAGING, ignore_errors=True)
            (output_dir / RUN_FILE).write_text(yaml.safe_dump(_plain(asdict(settings) | training), sort_keys=False))
            yield
        finally:
            _leave_tidy(output_dir, existed)
    finally:
        os.close(lock)


def checkpoints(output_dir: Path) -> list[Path]:
    """Returns the whole checkpoints in `output_dir`, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def checkpoint_to_resume(output_dir: Path, resume_from_checkpoint: str | bool | None) -> Path | None:
    """Returns the checkpoint that the flag names: True or "true" is the latest in `output_dir`, else a path.

    Raises:
        UserError: there is none.
    """
    if resume_from_checkpoint in (None, False, "", "false", "False"):
        return None
    if resume_from_checkpoint in (True, "true", "True", "latest"):
        found = checkpoints(output_dir)
        if not found:
            raise UserError(
                f"no whole checkpoint in {output_dir} to resume from; start the run without --resume_from_checkpoint"
            )
        return found[-1]
    path = Path(str(resume_from_checkpoint))
    if not (path / "trainer_state.json").is_file():
        raise UserError(f"{path} is not a checkpoint to resume from (it has no trainer_state.json)")
    return path


def _check_contents(output_dir: Path, *, resume: bool, overwrite: bool) -> None:
    contents = [path for path in output_dir.iterdir() if path.name != _LOCK]
    if resume or not contents:
        return
    if not overwrite:
        raise UserError(
            f"output_dir {output_dir} is not empty; continue its run with --resume_from_checkpoint true, "
            "start anew with --overwrite true, or choose another directory"
        )
    if not (output_dir / RUN_FILE).is_file():
        raise UserError(f"will not overwrite {output_dir}: it holds files but no run of decausal made it")
    for path in contents:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _leave_tidy(output_dir: Path, existed: bool) -> None:
    """Removes the lock, and what a run that came to nothing has left."""
    shutil.rmtree(output_dir / STAGING, ignore_errors=True)
    (output_dir / _LOCK).unlink(missing_ok=True)
    if [path.name for path in output_dir.iterdir()] == [RUN_FILE]:
        (output_dir / RUN_FILE).unlink()
    if not existed and not any(output_dir.iterdir()):
        output_dir.rmdir()


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
