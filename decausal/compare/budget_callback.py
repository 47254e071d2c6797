"""Follows one run as it trains: counts its tokens, measures it at shares of its budget, and ends it with the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from decausal.compare.budget import Budget
from decausal.compare.records import Measurement, RunRecord, Score
from decausal.training.meters import Clock, TokenCounts, TokenMeter


@dataclass(frozen=True)
class Event:
    """What a run reports while it trains.

    Attributes:
        run: The run's name.
        kind: "began", "stepped", "measured" or "ended".
        step: Training steps taken.
        progress: Share of the budget used.
        loss: Loss of the last step, for "stepped".
        measurement: The measurement, for "measured".
    """

    run: str
    kind: str
    step: int = 0
    progress: float = 0.0
    loss: float | None = None
    measurement: Measurement | None = None


OnEvent = Callable[[Event], None]


class BudgetCallback(TrainerCallback):
    """Measures a run at shares of its budget and records it, with a checkpoint each time.

    Its clock runs only during training, including rollouts, not while the model is prepared, measured or saved.

    Args:
        name: The run's name.
        budget: The budget, which ends the run when it is used up.
        points: Shares of the budget, ascending, after which to measure.
        score: Measures the student.
        start_scores: The scores of the student before any step.
        record: Takes the measurements.
        on_event: Called with each event.

    Attributes:
        meter: Counts the trainer's tokens.
    """

    def __init__(
        self,
        name: str,
        budget: Budget,
        points: tuple[float, ...],
        score: Callable[[PreTrainedModel], tuple[Score, ...]],
        start_scores: tuple[Score, ...],
        record: RunRecord,
        on_event: OnEvent,
    ) -> None:
        self.name, self.budget, self.points = name, budget, points
        self.score, self.start_scores = score, start_scores
        self.record, self.on_event = record, on_event
        self.clock, self.meter = Clock(), TokenMeter()
        self.measurements: list[Measurement] = []
        self._step = 0
        self._losses: list[float] = []

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """Returns the function that `convert` calls with the student, and that returns what the trainer logs."""
        self.clock.stop()
        measurement = Measurement(
            step=self._step,
            progress=self._progress(),
            seconds=self.clock.seconds,
            tokens=self.meter.counts,
            scores=self.score(model),
            loss=fmean(self._losses) if self._losses else None,
        )
        self._losses.clear()
        self.measurements.append(measurement)
        self.record.add(measurement)
        self.on_event(Event(self.name, "measured", self._step, measurement.progress, measurement=measurement))
        return {f"eval_quality{_suffix(score)}": score.quality for score in measurement.scores}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step = state.global_step
        kept = [found for found in self.record.read() if found.step <= self._step] if self._step else []
        self.measurements = kept or [Measurement(0, 0.0, 0.0, TokenCounts(), self.start_scores)]
        self.meter.start_from(self.measurements[-1].tokens)
        self.clock.passed = self.measurements[-1].seconds
        self.record.begin(self.measurements)
        for measurement in self.measurements:
            self.on_event(Event(self.name, "measured", measurement.step, measurement.progress, measurement=measurement))
        self.clock.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._step = state.global_step
        progress = self._progress()
        is_last = progress >= 1 or self._step >= state.max_steps
        passed = sum(point <= progress for point in self.points)
        passed_before = sum(point <= self.measurements[-1].progress for point in self.points)
        if is_last or passed > passed_before:
            control.should_evaluate = control.should_save = True
        if is_last:
            control.should_training_stop = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = kwargs["logs"].get("loss")
        if loss is not None:
            self._losses.append(loss)
            self.on_event(Event(self.name, "stepped", state.global_step, self._progress(), loss=loss))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.clock.start()  # nothing has happened since the last measurement

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.clock.stop()

    def _progress(self) -> float:
        return self.budget.progress(self._step, self.meter.counts, self.clock.seconds)


def _suffix(score: Score) -> str:
    return "" if score.threshold is None else f"_at_{score.threshold:g}"
