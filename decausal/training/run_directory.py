"""A run's directory: who may write to it, which checkpoints are complete, and what happens on a full disk."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
import yaml

from decausal.errors import UserError
from decausal.files import (
    LOG_FILE,
    RUN_FILE,
    RUN_PAGE,
    content_hash,
    follow_umask,
    is_partial,
    parsed_json,
    write_whole,
)
from decausal.models.facts import FACTS_FILE
from decausal.privacy import without_secrets

STAGING = ".saving"  # a checkpoint is written here and renamed when complete, so a partial one never has its name
SEAL = "checkpoint.json"  # a checkpoint's last file, with names, sizes and hashes of all others
_LOCK = ".lock"
_WEIGHTS_ALONE = "holds weights alone (--save_only_model)"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Libraries in Rust and C++ report a full disk with their own types of errors.
_FOREIGN_DISK_ERROR = re.compile(r"os error \d+|No space left|File too large|PytorchStreamWriter|unexpected pos")
logger = logging.getLogger(__name__)


@dataclass
class RunDirectory:
    """A directory that this run holds.

    Attributes:
        path: The directory.
        is_first_process: The first of several processes writes what they share.
        has_begun: Whether `begin` was called. Before that the run must not change the directory.
    """

    path: Path
    is_first_process: bool = True
    has_begun: bool = False

    def begin(self, values: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Takes over the directory: removes an overwritten run, and records `values` in `run.yaml`.

        Call it after all input has been checked, so that bad input never costs an earlier run.
        """
        if not self.is_first_process:
            return
        self.has_begun = True
        with disk_errors(self.path):
            if overwrite:
                _empty(self.path)
            _remove_leftovers(self.path)
            write_whole(self.path / RUN_FILE, yaml.safe_dump(without_secrets(_plain(values)), sort_keys=False))


@contextmanager
def claimed(output_dir: Path, *, resume: bool = False, overwrite: bool = False) -> Iterator[RunDirectory]:
    """Locks `output_dir` for one run. The lock is the kernel's, so it ends with the process in any case.

    A run that fails early leaves nothing: neither files nor directories that it made.

    Raises:
        UserError: Another run holds the directory; it is not empty and neither `resume` nor `overwrite` is set; or one
            of these is set and no run made what it holds.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        yield RunDirectory(output_dir, is_first_process=False)
        return
    refuse_taken(output_dir, resume=resume, overwrite=overwrite)
    made = [path for path in (output_dir, *output_dir.parents) if not path.exists()]
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = _locked(output_dir)
    except OSError as error:
        _remove_empty(made)
        raise UserError(f"cannot write to output_dir {output_dir}: {error.strerror}") from error
    try:
        _check_contents(output_dir, resume=resume, overwrite=overwrite)
        held = RunDirectory(output_dir)
        try:
            yield held
        finally:
            if held.has_begun:
                _leave_tidy(output_dir)
    finally:
        (output_dir / _LOCK).unlink(missing_ok=True)
        os.close(lock)
        _remove_empty(made)


def refuse_taken(output_dir: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuses a directory whose content `claimed` would refuse.

    Raises:
        UserError: It is a file; it is not empty and neither `resume` nor `overwrite` is set; or one of these is set and
            no run made what it holds.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir {output_dir} is a file; name a directory")
    if output_dir.is_dir() and int(os.environ.get("RANK", "0")) == 0:  # other processes see the first one's files
        _check_contents(output_dir, resume=resume, overwrite=overwrite)


def wants_resume(resume_from_checkpoint: str | bool | None) -> bool:
    """Returns whether the flag asks for anything: "false" does not."""
    return resume_from_checkpoint not in (None, False, "", "false", "False")


def checkpoint_to_resume(output_dir: Path, resume_from_checkpoint: str | bool | None) -> Path | None:
    """Returns the checkpoint that the flag names. True or "true" means the latest complete one in `output_dir`, else it
    is a path.

    Returns None if the flag asks for none, or if the run was killed before it saved any. It then starts again.

    Raises:
        UserError: The path is not a complete checkpoint, or files are damaged and no earlier checkpoint is complete.
    """
    if not wants_resume(resume_from_checkpoint):
        return None
    if resume_from_checkpoint in (True, "true", "True", "latest"):
        return _latest(output_dir)
    path = Path(str(resume_from_checkpoint))
    if (reason := unusable(path)) is not None:
        raise UserError(
            f"{path} is not a checkpoint to resume from: {reason}; name another, or 'true' for the latest whole one in "
            "output_dir"
        )
    return path


def _latest(output_dir: Path) -> Path | None:
    """Returns the newest checkpoint whose files are intact."""
    reasons = []
    for path in reversed(_named_checkpoints(output_dir)):
        if (reason := unusable(path)) is None:
            return path
        logger.warning("%s; looking for an earlier checkpoint", reason)
        reasons.append(reason)
    damages = [reason for reason in reasons if not reason.endswith(_WEIGHTS_ALONE)]
    if damages:
        raise UserError(
            f"every checkpoint in {output_dir} is damaged; the newest: {damages[0]}; start again with --overwrite true"
        )
    logger.warning("no whole checkpoint in %s yet: the run starts from the beginning", output_dir)
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """Returns the complete checkpoints in `output_dir`, oldest first."""
    return [path for path in _named_checkpoints(output_dir) if is_whole(path)]


def _named_checkpoints(output_dir: Path) -> list[Path]:
    """Returns all checkpoints that were complete once, oldest first. They get their names when they are."""
    found = [path for path in output_dir.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def seal(checkpoint: Path, *, is_resumable: bool = True, run: Mapping[str, Any] | None = None) -> None:
    """Flushes a checkpoint's files to the disk and lists them with sizes and hashes. Only then it is complete.

    Args:
        checkpoint: The directory.
        is_resumable: Whether training can continue from it.
        run: What is recorded about the run, see `decausal.training.resuming.run_record`.
    """
    sizes, hashes = {}, {}
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    follow_umask(files)
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        name = path.relative_to(checkpoint).as_posix()
        sizes[name], hashes[name] = path.stat().st_size, content_hash(path)
    record = {"is_resumable": is_resumable, "sizes": sizes, "hashes": hashes, "run": dict(run or {})}
    write_whole(checkpoint / SEAL, json.dumps(record | {"hash": _hash_of_record(record)}, indent=2))


def is_whole(checkpoint: Path) -> bool:
    """Returns whether every file that `seal` listed exists at its full size, and training can continue from them."""
    return _incomplete(checkpoint) is None


def unusable(checkpoint: Path) -> str | None:
    """Returns why training cannot continue from a checkpoint, as a clause that names a file, or None.

    Reads all of its files, at several GB/s from memory. Checkpoints of earlier versions have no hashes.
    """
    if (reason := _incomplete(checkpoint)) is not None:
        return reason
    for name, saved in _read_seal(checkpoint).get("hashes", {}).items():
        if content_hash(checkpoint / name) != saved:
            return f"{checkpoint / name} is damaged: it does not hold what was saved"
    return None


def sealed(checkpoint: Path) -> dict[str, Any]:
    """Returns the record of the run in a checkpoint's seal; empty for checkpoints of earlier versions."""
    try:
        return _read_seal(checkpoint).get("run", {})
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint / SEAL} cannot be read: {error}; name another checkpoint") from error


def _incomplete(checkpoint: Path) -> str | None:
    """Returns what is wrong by the seal and the sizes of files, as a clause, or None."""
    try:
        record = _read_seal(checkpoint)
        for name, size in record["sizes"].items():
            path = checkpoint / name
            if not path.is_file() or path.stat().st_size != size:
                return f"{path} is missing or cut short"
        return None if record["is_resumable"] else f"{checkpoint} {_WEIGHTS_ALONE}"
    except FileNotFoundError:
        return f"{checkpoint / SEAL} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{checkpoint / SEAL} is damaged: it does not hold what was saved"


def _read_seal(checkpoint: Path) -> dict[str, Any]:
    record = parsed_json((checkpoint / SEAL).read_text(encoding="utf-8"))
    saved = record.pop("hash", None)
    if saved is not None and saved != _hash_of_record(record):
        raise ValueError("it does not hold what was saved")
    return record


def _hash_of_record(record: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())


def discard(directory: Path) -> None:
    """Removes a directory. It is renamed first, so that a killed removal leaves no partial checkpoint."""
    if directory.exists():
        doomed = directory.parent / STAGING / f"{directory.name}.old"
        doomed.parent.mkdir(exist_ok=True)
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(directory, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def disk_errors(output_dir: Path) -> Iterator[None]:
    """Turns any library's error about a full or failing disk into one line that says what is left.

    Raises:
        UserError: The disk failed. Other errors pass.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        elif found := _FOREIGN_DISK_ERROR.search(str(error)):
            reason = "No space left on device" if "Stream" in found[0] or "pos" in found[0] else str(error)
        else:
            raise
        kept = checkpoints(output_dir)
        rest = (
            f"{kept[-1]} is whole: make room and continue with --resume_from_checkpoint true"
            if kept
            else "no earlier checkpoint exists; make room and start again"
        )
        raise UserError(f"cannot save to {output_dir}: {reason}; {rest}") from error


def _locked(output_dir: Path) -> int:
    """Returns the open, locked file, unless its last holder has just removed it."""
    while True:
        lock = os.open(output_dir / _LOCK, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise UserError(
                f"output_dir {output_dir} is in use by another run; wait for it or choose another directory"
            ) from error
        try:
            if os.fstat(lock).st_ino == os.stat(output_dir / _LOCK).st_ino:
                return lock
        except FileNotFoundError:
            pass
        os.close(lock)


def _check_contents(output_dir: Path, *, resume: bool, overwrite: bool) -> None:
    contents = _contents(output_dir)
    if not contents:
        return
    if not (resume or overwrite):
        raise UserError(
            f"output_dir {output_dir} is not empty; continue its run with --resume_from_checkpoint true, "
            "start again with --overwrite true, or choose another directory"
        )
    if not (output_dir / RUN_FILE).is_file():
        verb = "continue in" if resume else "overwrite"
        raise UserError(f"will not {verb} output_dir {output_dir}: it holds files, but no run of decausal made it")


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _contents(output_dir: Path) -> list[Path]:
    """Returns a directory's content without what a run that was killed at its start may have left."""
    try:
        return [path for path in output_dir.iterdir() if path.name != _LOCK and not is_partial(path)]
    except FileNotFoundError:  # another run, which failed early, has just removed it
        return []


def _empty(output_dir: Path) -> None:
    """Removes an earlier run. If killed meanwhile, the directory holds no model, and is still known as a run's."""
    (output_dir / FACTS_FILE).unlink(missing_ok=True)
    for path in _contents(output_dir):
        if path.name not in (RUN_FILE, STAGING):
            discard(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _remove_leftovers(output_dir: Path) -> None:
    shutil.rmtree(output_dir / STAGING, ignore_errors=True)
    for path in output_dir.iterdir():
        if is_partial(path):
            path.unlink(missing_ok=True)


def _leave_tidy(output_dir: Path) -> None:
    """Removes an unfinished checkpoint, and the record of a run that failed early."""
    _remove_leftovers(output_dir)
    if {path.name for path in _contents(output_dir)} <= {RUN_FILE, LOG_FILE, RUN_PAGE}:
        for path in _contents(output_dir):
            path.unlink()


def _remove_empty(directories: list[Path]) -> None:
    for directory in directories:
        with suppress(OSError):  # not empty: another run has just started in it
            directory.rmdir()
