"""One run of a comparison: an ordinary conversion in its own directory, which can be continued."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from decausal.compare.arms import ArmRun
from decausal.compare.budget import Budget, steps_for_minutes
from decausal.compare.budget_callback import BudgetCallback, Event, OnEvent
from decausal.compare.measuring import Measure
from decausal.compare.records import FinalRecord, Measurement, RunRecord, Score
from decausal.compare.settings import Schedule
from decausal.errors import UserError
from decausal.files import parsed_yaml
from decausal.models.checkpoint import load_converted
from decausal.models.facts import FACTS_FILE
from decausal.privacy import without_secrets
from decausal.training.convert import convert
from decausal.training.meters import Clock, TokenMeter
from decausal.training.run_directory import RUN_FILE, checkpoints

_MAY_DIFFER = frozenset(
    "output_dir overwrite resume_from_checkpoint disable_tqdm logging_steps eval_rows eval_samples".split()  # noqa: SIM905
)
_TRIAL_STEPS = 30
_TRIAL_SHARE = 0.05  # share of the minutes of one run


@dataclass(frozen=True)
class Planned:
    """One run with its length and the scores of its student before any step.

    Attributes:
        run: All other settings.
        max_steps: The steps for which its schedules are laid out.
        budget: The budget, which may end the run earlier.
        start_scores: Scores of the student before training.
    """

    run: ArmRun
    max_steps: int
    budget: Budget
    start_scores: tuple[Score, ...] = ()

    @property
    def training(self) -> dict[str, Any]:
        """All training arguments."""
        return self.run.training | {"max_steps": self.max_steps, "eval_strategy": "no"}


@dataclass(frozen=True)
class RunResult:
    """A finished run: its measurements, the first before any step, and its final scores."""

    arm: str
    seed: int
    directory: str
    measurements: list[Measurement]
    final: list[Score]

    def final_score(self, threshold: Schedule) -> Score | None:
        """Returns the final score under a threshold, or None."""
        return next((score for score in self.final if score.threshold == threshold), None)


def is_finished(directory: Path) -> bool:
    """Returns whether a run has ended: the facts of a conversion are written last."""
    return (directory / FACTS_FILE).is_file()


def steps_before(directory: Path) -> int | None:
    """Returns `max_steps` of the run in the directory, or None."""
    recorded = _recorded(directory)
    return recorded.get("max_steps") if recorded else None


def refuse_other_run(planned: Planned, measured: dict[str, Any]) -> None:
    """Raises UserError if the directory holds a run with other settings or other measurements."""
    directory = planned.run.directory
    recorded = _recorded(directory)
    if recorded is None:
        return
    now = without_secrets(_plain(asdict(planned.run.conversion) | planned.training))  # as they were recorded
    before = RunRecord(directory, measured).measured_before() or measured
    pairs = [(name, recorded.get(name), now.get(name)) for name in sorted({*recorded, *now} - _MAY_DIFFER)]
    pairs += [(f"measured {name}", before.get(name), measured.get(name)) for name in sorted({*before, *measured})]
    for name, old, new in pairs:
        if old != new:
            raise UserError(
                f"{directory} holds a run with {name} {old}, not {new}: give the earlier settings to continue the "
                "comparison, choose another --output_dir, or train all runs again with --overwrite true"
            )


def train(planned: Planned, measure: Measure, on_event: OnEvent, *, overwrite: bool = False) -> RunResult:
    """Trains or continues one run, or only reads its results. Then measures what is missing.

    Raises:
        UserError: As `convert`.
    """
    run, directory = planned.run, planned.run.directory
    measured = described(planned, measure)
    record = RunRecord(directory, measured)
    on_event(Event(run.name, "began"))
    model = None
    if overwrite or not is_finished(directory):
        recorder = BudgetCallback(
            run.name,
            planned.budget,
            measure.settings.points,
            lambda student: measure.scores(student, run, measure.thresholds),
            planned.start_scores,
            record,
            on_event,
        )
        model = _convert(planned, recorder, recorder.measure, recorder.meter, is_resumed=not overwrite)
        for checkpoint in checkpoints(directory):
            shutil.rmtree(checkpoint)
        measurements = recorder.measurements
    else:
        measurements = record.read()
        for measurement in measurements:
            on_event(Event(run.name, "measured", measurement.step, measurement.progress, measurement=measurement))
    final = _final_scores(planned, measure, model)
    on_event(Event(run.name, "ended", measurements[-1].step, 1.0))
    return RunResult(run.arm.name, run.seed, str(directory), measurements, final)


def described(planned: Planned, measure: Measure) -> dict[str, Any]:
    """Returns what a run's measurements depend on apart from its own settings."""
    return measure.measured(is_final=False) | {
        "budget": asdict(planned.budget),
        "points": list(measure.settings.points),
        "thresholds": list(measure.thresholds),
    }


def tried_steps(run: ArmRun, budget: Budget) -> int:
    """Returns the number of steps in which a run would use up its minutes, from a short trial without traces."""
    with tempfile.TemporaryDirectory(prefix="decausal-trial-") as folder:
        trial = replace(run, training=run.training | {"output_dir": str(Path(folder, "run"))})
        watch = _Trial(budget.amount * 60 * _TRIAL_SHARE)
        _convert(Planned(trial, 10 * _TRIAL_STEPS, budget), watch, None, None, is_resumed=False)
    return steps_for_minutes(budget, watch.num_steps, watch.clock.seconds)


class _Trial(TrainerCallback):
    """Times steps after the first one, which includes preparations."""

    def __init__(self, most_seconds: float) -> None:
        self.most_seconds, self.clock, self.num_steps = most_seconds, Clock(), 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 1:
            self.clock.start()
            return
        self.num_steps = state.global_step - 1
        if self.num_steps >= _TRIAL_STEPS or self.clock.seconds >= self.most_seconds:
            self.clock.stop()
            control.should_training_stop = True


def _convert(
    planned: Planned,
    callback: TrainerCallback,
    measure: Callable[[PreTrainedModel], dict[str, float]] | None,
    meter: TokenMeter | None,
    *,
    is_resumed: bool,
) -> PreTrainedModel:
    directory = planned.run.directory
    is_begun = is_resumed and bool(checkpoints(directory))
    conversion = replace(planned.run.conversion, overwrite=not is_begun)
    training = planned.training | ({"resume_from_checkpoint": "true"} if is_begun else {})
    # the comparison's view shows what transformers would print
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return convert(conversion, training, callbacks=[callback], measure=measure, meter=meter).model


def _final_scores(planned: Planned, measure: Measure, model: PreTrainedModel | None) -> list[Score]:
    record = FinalRecord(planned.run.directory, measure.measured(is_final=True))
    scores = {} if model is not None else {score.threshold: score for score in record.read()}
    thresholds = measure.final_thresholds(planned.run)
    for threshold in thresholds:
        if threshold not in scores:
            if model is None:
                model = load_converted(planned.run.directory, device=measure.source.device).model
            scores |= {threshold: measure.scores(model, planned.run, (threshold,), is_final=True)[0]}
            record.write(list(scores.values()))
    return [scores[threshold] for threshold in thresholds]


def _recorded(directory: Path) -> dict[str, Any] | None:
    try:
        recorded = parsed_yaml((directory / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return recorded if isinstance(recorded, dict) else None


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
