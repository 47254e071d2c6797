"""Keeps a run's log in a file, and draws its page with curves during the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from decausal.files import LOG_FILE
from decausal.report.write import write_run_page
from decausal.training.meters import TokenMeter
from decausal.training.progress import Pace
from decausal.training.run_directory import disk_errors
from decausal.training.step_records import keep_records

_NOT_FIGURES = ("total_flos", "train_runtime", "train_samples_per_second", "train_steps_per_second")


class RunLog(TrainerCallback):
    """Adds each log to `log.jsonl`, and writes `report.html` at each evaluation and at the end.

    A line holds the step, the training tokens and the seconds of training so far (with rows and rollouts, without
    measurements and checkpoints), and what was logged.

    Args:
        output_dir: The run's directory.
        meter: Returns what counts the run's tokens.
    """

    def __init__(self, output_dir: Path, meter: Callable[[], TokenMeter]) -> None:
        self._path, self._meter = output_dir / LOG_FILE, meter
        self._is_drawn = True

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._pace = Pace(self._meter())
        self._pace.begin(state.global_step)
        self._before = 0.0
        if not state.is_world_process_zero:
            return
        with disk_errors(self._path.parent):
            if self._path.exists() and (kept := keep_records(self._path, [], state.global_step + 1)):
                self._before = kept[-1].get("seconds", 0.0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._pace.take_step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._pace.skip()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = {name: value for name, value in (kwargs.get("logs") or {}).items() if name not in _NOT_FIGURES}
        if not state.is_world_process_zero or not logs.keys() - {"epoch", "train_loss"}:
            return
        place = {"step": state.global_step, "tokens": self._meter().counts.total}
        line = json.dumps(place | {"seconds": round(self._before + self._pace.seconds, 3)} | logs)
        with disk_errors(self._path.parent), self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self._is_drawn = False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._draw(state)
        self._pace.skip()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._draw(state)

    def _draw(self, state: TrainerState) -> None:
        if state.is_world_process_zero and not self._is_drawn:
            with disk_errors(self._path.parent):
                write_run_page(self._path.parent)
            self._is_drawn = True
