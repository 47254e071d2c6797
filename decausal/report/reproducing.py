"""Runs evaluations of a report again, and says what differs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decausal.errors import UserError
from decausal.files import parsed_json
from decausal.report.records import Evaluation, evaluation_of, read_record
from decausal.report.sources import REPORT

TIMES = ("seconds", "tokens_per_second", "speedup")
"""Figures that differ between any two runs."""
_OF_MACHINE = ("commit", "hardware", "versions", "data_hash", "seeds", "sampler")


@dataclass(frozen=True)
class Reproduced:
    """The outcome of one repeated evaluation.

    Attributes:
        evaluation: As it was recorded.
        error: Why it could not be run again; None if it was.
        differences: Figures that differ: where they are, the old value and the new one.
        circumstances: What differs in the manifest and in the model's files.
    """

    evaluation: Evaluation
    error: str | None = None
    differences: list[tuple[str, Any, Any]] = field(default_factory=list)
    circumstances: list[tuple[str, Any, Any]] = field(default_factory=list)

    @property
    def is_identical(self) -> bool:
        """Whether all figures but times are the same."""
        return self.error is None and not self.differences

    def lines(self) -> Iterator[str]:
        """Yields lines for the user."""
        command = f"decausal {' '.join(self.evaluation.arguments)}"
        if self.error is not None:
            yield f"not run: {command}: {self.error}"
            return
        yield f"{'identical' if self.is_identical else 'differs'}: {command}"
        for place, before, now in self.differences:
            yield f"  {place}: {before} before, {now} now{_change(before, now)}"
        for place, before, now in self.circumstances:
            yield f"  made with another {place}: {before} before, {now} now"


def recorded(path: Path) -> list[Evaluation]:
    """Returns the evaluations of a report or of one record. For a page, the JSON file beside it is read.

    Raises:
        UserError: There is no such file, or it is neither.
    """
    path = path.with_suffix(".json") if path.suffix == ".html" else path
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the .json file of a report, or one that --output wrote")
    record = read_record(path)
    if record is not None:
        return [record]
    try:
        values = parsed_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict) or REPORT not in values:
        raise UserError(f"{path} is neither a report nor the record of an evaluation; `decausal report` writes one")
    found = [evaluation_of(each, path) for each in values.get("evaluations", [])]
    return [evaluation for evaluation in found if evaluation is not None]


def reproduce(evaluation: Evaluation) -> Reproduced:
    """Runs an evaluation again in a separate process, in this directory."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "again.json")
        command = [sys.executable, "-m", "decausal", *evaluation.arguments, "--output", str(output)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        again = read_record(output) if output.exists() and not ended.returncode else None
    if again is None:
        lines = ended.stderr.strip().splitlines()
        return Reproduced(
            evaluation, error=lines[-1].removeprefix("decausal: error: ") if lines else "it wrote nothing"
        )
    return compared(evaluation, again)


def compared(before: Evaluation, now: Evaluation) -> Reproduced:
    """Returns what differs between two records of one evaluation."""
    plain = [json.loads(json.dumps(each.figures)) for each in (before, now)]
    circumstances = [
        (f"{name} {place}".strip(), old, new)
        for name in _OF_MACHINE
        for place, old, new in _differences(before.manifest.get(name), now.manifest.get(name))
    ]
    circumstances += [
        (f"file {place}".strip(), old, new)
        for place, old, new in _differences(before.model.get("fingerprint"), now.model.get("fingerprint"))
    ]
    return Reproduced(before, None, list(_differences(*plain)), circumstances)


def _differences(before: Any, now: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            if name not in (*TIMES, "provenance"):
                yield from _differences(before.get(name), now.get(name), f"{place}.{name}".lstrip("."))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from _differences(old, new, f"{place}[{index}]")
    elif before != now and not (before != before and now != now):  # nan is not equal to itself
        yield place, before, now


def _change(before: Any, now: Any) -> str:
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in (before, now)):
        return ""
    return f" ({now - before:+.3g})"
