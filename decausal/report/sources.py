"""Finds runs and evaluations in directories, and reads their files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from decausal.errors import UserError
from decausal.files import FACTS_FILE, LOG_FILE, RUN_FILE, SAMPLES_FILE, parsed_json, parsed_yaml
from decausal.privacy import without_secrets
from decausal.report.records import Evaluation, evaluation_of, read_record

STATE_FILE = "trainer_state.json"
REPORT = "decausal_report"


@dataclass(frozen=True)
class Run:
    """A training run, or a converted model by itself.

    Attributes:
        name: Its directory's name.
        path: The directory.
        settings: All settings, ours and transformers'.
        facts: What `decausal.json` holds; empty until the first checkpoint is written.
        log: What was logged, in order: "step", figures by name, and where known "seconds", "tokens" and "flops".
        samples: What the model wrote at evaluations.
    """

    name: str
    path: Path
    settings: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def curve(self, measure: str, by: str = "step") -> list[tuple[float, float]]:
        """Returns the points of a figure against "step", "seconds", "tokens" or "flops"."""
        return [(float(entry[by]), float(entry[measure])) for entry in self.log if measure in entry and by in entry]

    def as_dict(self) -> dict[str, Any]:
        """Returns the run as plain values."""
        return {
            "name": self.name,
            "settings": self.settings,
            "facts": self.facts,
            "log": self.log,
            "samples": self.samples,
        }


@dataclass(frozen=True)
class Found:
    """What a report is made of.

    Attributes:
        runs: Runs and converted models.
        evaluations: Records of evaluations.
        notes: What was left out, a line each.
    """

    runs: list[Run] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find(paths: Sequence[str | Path]) -> Found:
    """Reads directories with everything in them, and files of records.

    Raises:
        UserError: A path does not exist, holds nothing to report, or a file in it is damaged.
    """
    found = Found()
    for name in paths:
        path = Path(name).expanduser()
        if not path.exists():
            raise UserError(f"{name} does not exist; give directories of runs, or files that --output wrote")
        before = len(found.runs) + len(found.evaluations)
        for each in [path] if path.is_file() else _files_below(path):
            _take(each, found)
        if len(found.runs) + len(found.evaluations) == before:
            raise UserError(
                f"{name} holds neither a run nor an evaluation: give what `decausal convert` wrote, or what "
                "`decausal eval ... --output FILE` did"
            )
    return found


def read_run(directory: Path) -> Run:
    """Reads a run's directory.

    Raises:
        UserError: `run.yaml` or `decausal.json` is damaged.
    """
    settings = _yaml(directory / RUN_FILE) if (directory / RUN_FILE).exists() else {}
    facts = _json(directory / FACTS_FILE) if (directory / FACTS_FILE).exists() else {}
    log = read_lines(directory / LOG_FILE) or _log_of_checkpoint(directory)
    settings, facts = without_secrets(settings or facts.get("recipe", {})), without_secrets(facts)
    return Run(directory.name, directory, settings, facts, log, _samples(directory))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the JSON objects of a file of lines; none without a file. A last line that is cut off is left out."""
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError:
        return []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(parsed_json(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number}, is damaged; remove the line") from error
    return found


def _take(path: Path, found: Found) -> None:
    """Adds what a file stands for, once."""
    if path.name in (RUN_FILE, FACTS_FILE):
        if all(run.path.resolve() != path.parent.resolve() for run in found.runs):
            found.runs.append(read_run(path.parent))
        return
    if path.suffix == ".json" and _is_report(path):
        values = _json(path)
        for record in values["evaluations"]:
            evaluation = evaluation_of(record, path)
            if evaluation is not None:
                _add(evaluation, found)
        found.notes.append(f"{path.name}: its evaluations were taken, its runs were not")
        return
    record = read_record(path) if path.suffix == ".json" else None
    if record is not None:
        _add(record, found)


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return f'"{REPORT}"'.encode() in file.read(200)


def _add(record: Evaluation, found: Found) -> None:
    if all(record.as_dict() != other.as_dict() for other in found.evaluations):
        found.evaluations.append(record)


def _files_below(directory: Path) -> Iterator[Path]:
    """Yields the files that may belong in a report, without those inside checkpoints and hidden directories."""
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            if not path.name.startswith((".", "checkpoint-")):
                yield from _files_below(path)
        elif path.suffix in (".json", ".yaml"):
            yield path


def _log_of_checkpoint(directory: Path) -> list[dict[str, Any]]:
    """Returns the log that transformers keeps, for runs that have no log of ours."""
    states = sorted(directory.glob(f"checkpoint-*/{STATE_FILE}"), key=lambda path: path.stat().st_mtime)
    return _json(states[-1]).get("log_history", []) if states else []


def _samples(directory: Path) -> list[dict[str, Any]]:
    return read_lines(directory / SAMPLES_FILE)


def _json(path: Path) -> Any:
    try:
        return parsed_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _yaml(path: Path) -> dict[str, Any]:
    try:
        values = parsed_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    return values if isinstance(values, dict) else {}
