"""The demo's directory. An earlier demo in it is replaced, other files never."""

from __future__ import annotations

from pathlib import Path

import yaml

from decausal.errors import UserError
from decausal.files import LOG_FILE, RUN_FILE, RUN_PAGE, parsed_yaml

ARM_NAMES = ("plain", "aligned")
REPORT_PAGE, REPORT_FIGURES, REPORT_PICTURE = "report.html", "report.json", "report.png"
MARK = {"verb": "demo"}
"""An entry in `run.yaml` by which a later demo recognises its own directory."""

_OUR_FILES = {REPORT_PAGE, REPORT_FIGURES, REPORT_PICTURE}
_RUN_FILES = (RUN_FILE, LOG_FILE, RUN_PAGE)
_CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", *_RUN_FILES, ".*")


def refuse_foreign_files(output_dir: Path) -> None:
    """Raises if a demo in `output_dir` would touch anything that is not of a demo.

    Raises:
        UserError: Names the file or directory in the way.
    """
    if not output_dir.is_dir():
        return  # a file in its place is refused when the directory is claimed
    ours = [path for name in (*ARM_NAMES, *_OUR_FILES, RUN_FILE) if (path := output_dir / name).exists()]
    if ours and not _is_of_a_demo(output_dir / RUN_FILE):
        raise _in_the_way(ours[0])
    for arm in ARM_NAMES:
        for path in sorted((output_dir / arm).glob("*")):
            if path.is_dir() or not any(path.match(pattern) for pattern in _CHECKPOINT_FILES):
                raise _in_the_way(path)


def remove_reports(output_dir: Path) -> None:
    """Removes an earlier demo's report, which must not stand beside newer models."""
    for name in _OUR_FILES:
        (output_dir / name).unlink(missing_ok=True)


def _in_the_way(path: Path) -> UserError:
    return UserError(f"{path} is in the way, and no demo made it; move it, or choose another --output_dir")


def _is_of_a_demo(run_file: Path) -> bool:
    try:
        settings = parsed_yaml(run_file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(settings, dict) and MARK.items() <= settings.items()
