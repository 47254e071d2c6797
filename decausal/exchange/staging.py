"""The result of an export, and a directory that appears complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from decausal.errors import UserError, first_line
from decausal.files import follow_umask, umask
from decausal.models.facts import ConversionFacts


class Exported(NamedTuple):
    """The result of an export.

    Attributes:
        output_dir: The directory.
        facts: The facts of the model in it.
        commands: How to serve it, by the engine's name.
        notes: What its user should know.
    """

    output_dir: Path
    facts: ConversionFacts
    commands: dict[str, str]
    notes: list[str]


@contextmanager
def staged(output_dir: Path) -> Iterator[Path]:
    """Yields a directory beside `output_dir` to write into. It gets the name `output_dir` if the block succeeds.

    If the block fails or is interrupted, nothing is left: neither files nor new parent directories.

    Raises:
        UserError: `output_dir` is a file or is not empty, or the disk fails.
    """
    refuse_filled(output_dir)
    output_dir = output_dir.absolute()
    made = [path for path in output_dir.parents if not path.exists()]
    staging = None
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.", suffix=".partial", dir=output_dir.parent))
        yield staging
        _settle(staging, output_dir)
        made = []
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot write to output_dir {output_dir}: {reason}") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for path in made:
            with suppress(OSError):  # not there, or not empty: another run has just begun in it
                path.rmdir()


def refuse_filled(output_dir: Path) -> None:
    """Raises UserError if `output_dir` is a file or a directory that is not empty."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir {output_dir} is a file; name a directory")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise UserError(f"output_dir {output_dir} is not empty; name a new directory")


def _settle(staging: Path, output_dir: Path) -> None:
    files = [path for path in staging.rglob("*") if path.is_file()]
    follow_umask(files)
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    staging.chmod(0o777 & ~umask())  # mkdtemp makes directories that only their owner can read
    os.replace(staging, output_dir)  # replaces nothing, or an empty directory
