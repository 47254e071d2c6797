"""Reads files that users name within bounds, and writes files completely or not at all."""

from __future__ import annotations

import errno
import io
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

DATA_SUFFIX = re.compile(r"\.(txt|md|py|jsonl?|ndjson|jsonlines|csv|tsv|parquet|arrow|gz|bz2|xz|zst)$", re.IGNORECASE)
FACTS_FILE = "decausal.json"
RUN_FILE = "run.yaml"
LOG_FILE = "log.jsonl"
SAMPLES_FILE = "samples.jsonl"
RUN_PAGE = "report.html"
"""Files of a run's directory."""
JOB_SETTINGS = ".settings.json"
"""Suffix, after the name of a file that a job writes, of the file with the job's settings."""
MOST_GIVEN_BYTES = 2**26
_PIECE = 2**22
_PARTIAL = re.compile(r".+\.tmp\d+")


def read_bounded(file: io.BufferedIOBase) -> bytes:
    """Reads a whole file of at most `MOST_GIVEN_BYTES`, because a device may never end.

    Raises:
        OSError: As `read`, and EFBIG for a longer file.
    """
    content = file.read(MOST_GIVEN_BYTES + 1)
    if len(content) > MOST_GIVEN_BYTES:
        raise OSError(errno.EFBIG, f"it is longer than {MOST_GIVEN_BYTES >> 20} MiB")
    return content


def read_given(path: str | Path) -> str:
    """Returns the text of a file that a user names, with line feeds as line ends.

    Raises:
        OSError: As `open` and `read_bounded`.
        UnicodeDecodeError: It is not UTF-8.
    """
    with Path(path).expanduser().open("rb") as file:
        return io.StringIO(read_bounded(file).decode("utf-8"), newline=None).read()


def parsed_json(text: str | bytes) -> Any:
    """Returns what a JSON text from any source holds.

    Raises:
        ValueError: It is not JSON, is nested too deeply, or holds a number that is too long: JSONDecodeError where only
            the first is true.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise json_error(error) from None


def json_error(error: ValueError | RecursionError) -> ValueError:
    """Turns what Python's JSON reader raised into an error that says what is wrong with the text."""
    if isinstance(error, RecursionError):
        return ValueError("the JSON is nested too deeply to be read")
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return error
    return ValueError("the JSON holds a number with too many digits to be read")  # Python limits those of an integer


def parsed_yaml(text: str) -> Any:
    """Returns what a YAML text from any source holds.

    Raises:
        yaml.YAMLError: It is not YAML, or is nested too deeply.
    """
    import yaml  # slow to import, and most files need no YAML

    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply to be read") from None


def is_partial(path: Path) -> bool:
    """Returns whether a killed `write_whole` left this file."""
    return _PARTIAL.fullmatch(path.name) is not None


def umask() -> int:
    """Returns the permissions that the files of this process do not get."""
    # It can only be read by setting it. With this value, other threads write nothing public meanwhile.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def follow_umask(files: Iterable[Path]) -> None:
    """Lets others read the files that the umask lets them read: safetensors writes its files for their owner alone."""
    wanted = 0o666 & ~umask()
    for path in files:
        mode = path.stat().st_mode
        if mode | wanted != mode:
            path.chmod(mode | wanted)


def content_hash(path: Path) -> str:
    """Returns a fast hash of a file, against broken disks and not against forgery."""
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            found.update(piece)
    return found.hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Writes a text file in one step: a reader finds the old file, the new one or none, never a part of one.

    Raises:
        OSError: As `open`. Then only the old file is there, unchanged.
    """
    partial = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
