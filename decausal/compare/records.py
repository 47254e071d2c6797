"""The measurements of one run on disk, beside its checkpoints. Lines are written whole, so a killed run loses
nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from decausal.compare.settings import Schedule
from decausal.files import write_whole
from decausal.training.meters import TokenCounts

MEASUREMENTS = "measurements.jsonl"
FINAL = "final.json"


@dataclass(frozen=True)
class Score:
    """Quality of one model under one decoding schedule.

    Attributes:
        threshold: Confidence above which a token is kept; 1 is the static schedule; "speculative" for self-speculation;
            None if nothing was decoded (nll).
        quality: Accuracy, the mean over tasks; or NELBO in nats per token.
        standard_error: Standard error over prompts (or rows).
        by_task: Accuracy of each task.
        tokens_per_forward: Kept tokens divided by forward passes; None if nothing was decoded.
        right: For each prompt in order, "1" for a right answer, else "0"; "" for nll.
        details: Further figures.
    """

    threshold: Schedule
    quality: float
    standard_error: float | None = None
    by_task: dict[str, float] = field(default_factory=dict)
    tokens_per_forward: float | None = None
    right: str = ""
    details: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """A measurement of a run during its budget.

    Attributes:
        step: Training steps taken.
        progress: Share of the budget that is used up.
        seconds: Time spent in training, without measuring and saving.
        tokens: The tokens it has been trained on.
        scores: Scores by schedule, as settings name them.
        loss: Mean training loss since the previous measurement; None for the first.
    """

    step: int
    progress: float
    seconds: float
    tokens: TokenCounts
    scores: tuple[Score, ...]
    loss: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"tokens": self.tokens._asdict() | {"total": self.tokens.total}}

    def score(self, threshold: Schedule) -> Score | None:
        """Returns the score under a threshold, or None."""
        return next((score for score in self.scores if score.threshold == threshold), None)


def measurement_of(record: Mapping[str, Any]) -> Measurement:
    """Reads what `Measurement.as_dict` wrote."""
    counts = {name: value for name, value in record["tokens"].items() if name in TokenCounts._fields}
    scores = tuple(Score(**score) for score in record["scores"])
    return Measurement(**{**record, "tokens": TokenCounts(**counts), "scores": scores})


class RunRecord:
    """The measurements of one run in its directory: first a line that says what was measured, then one line each."""

    def __init__(self, directory: Path, measured: Mapping[str, Any]) -> None:
        self.path = directory / MEASUREMENTS
        self.measured = _plain(measured)

    def read(self) -> list[Measurement]:
        """Returns all measurements, without a last line that was cut off."""
        return [measurement_of(record) for record in self._records()[1:]]

    def measured_before(self) -> dict[str, Any] | None:
        """Returns what an earlier run in the directory was measured on, or None."""
        records = self._records()
        return records[0] if records else None

    def begin(self, measurements: list[Measurement]) -> None:
        """Replaces the measurements in one step."""
        lines = [self.measured, *(measurement.as_dict() for measurement in measurements)]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def add(self, measurement: Measurement) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(measurement.as_dict()) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _records(self) -> list[dict[str, Any]]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.split("\n")[:-1]]


class FinalRecord:
    """The scores of a finished run by threshold, in its directory."""

    def __init__(self, directory: Path, measured: Mapping[str, Any]) -> None:
        self.path = directory / FINAL
        self.measured = _plain(measured)

    def read(self) -> list[Score]:
        """Returns the scores; none if they were measured on something else."""
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        return [Score(**score) for score in record["scores"]] if record["measured"] == self.measured else []

    def write(self, scores: list[Score]) -> None:
        record = {"measured": self.measured, "scores": [asdict(score) for score in scores]}
        write_whole(self.path, json.dumps(record) + "\n")


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a value as it comes back from JSON."""
    return json.loads(json.dumps(values))
