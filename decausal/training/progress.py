"""Shows a run's progress: a bar in a terminal, else one line per log, both with tokens per second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from decausal.data.reading import say
from decausal.training.meters import TokenMeter
from decausal.wording import quantity


class Pace:
    """The speed of a run.

    Tokens per second are counted over training steps with their rows and rollouts, without measurements and
    checkpoints. The remaining time includes everything.

    Args:
        meter: Counts the run's tokens.
        clock: Returns seconds.

    Attributes:
        first_step: The step at which it began.
    """

    def __init__(self, meter: TokenMeter, clock: Callable[[], float] = time.perf_counter) -> None:
        self._meter, self._clock = meter, clock
        self.begin(0)

    def begin(self, step: int) -> None:
        """Starts at a step: 0, or the step of the resumed checkpoint."""
        self._start = self._mark = self._clock()
        self.first_step = step
        self._seconds = 0.0
        self._last = (self._meter.counts.total, 0.0)

    def take_step(self) -> None:
        """Counts the time since the last call as training."""
        now = self._clock()
        self._seconds += now - self._mark
        self._mark = now

    def skip(self) -> None:
        """Counts the time since the last call as something else."""
        self._mark = self._clock()

    def tokens_per_second(self) -> float:
        """Returns the rate since the last call. Tokens are those of clean rows and of rollouts."""
        before, seconds_before = self._last
        self._last = (self._meter.counts.total, self._seconds)
        return (self._last[0] - before) / max(self._seconds - seconds_before, 1e-9)

    @property
    def seconds(self) -> float:
        """Seconds of training since it began."""
        return self._seconds

    def seconds_left(self, step: int, num_steps: int) -> float:
        """Returns the time for the rest of the run, at the mean pace so far."""
        return (self._clock() - self._start) / max(step - self.first_step, 1) * (num_steps - step)


class SayFirst(TrainerCallback):
    """Says some lines once a run begins, so that an error before it stays one line.

    Args:
        lines: What to say.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = tuple(lines)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Says them."""
        for line in self._lines:
            say(line)


class _Shown(TrainerCallback):
    """Measures a run's pace and makes a line of each log. Subclasses show it."""

    def __init__(self, meter: TokenMeter) -> None:
        super().__init__()
        self.pace = Pace(meter)
        self.speed = ""

    def show(self, line: str) -> None:
        raise NotImplementedError

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        super().on_train_begin(args, state, control)
        self.pace.begin(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        super().on_step_end(args, state, control)
        self.pace.take_step()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        super().on_evaluate(args, state, control)
        self.pace.skip()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.pace.skip()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = {name: value for name, value in (kwargs.get("logs") or {}).items() if name != "total_flos"}
        if not state.is_world_process_zero or not logs.keys() - {"epoch"}:
            return
        if "train_runtime" in logs:
            steps = quantity(state.global_step - self.pace.first_step, "step")
            self.show(f"trained {steps} in {duration(logs['train_runtime'])}")
            return
        if "loss" in logs:
            left = duration(self.pace.seconds_left(state.global_step, state.max_steps))
            self.speed = f"{self.pace.tokens_per_second():,.0f} tokens/s, {left} left"
        self.show(log_line(state.global_step, state.max_steps, logs, self.speed if "loss" in logs else ""))


class Lines(_Shown, PrinterCallback):
    """Prints one line per log on stdout."""

    def show(self, line: str) -> None:
        print(line, flush=True)


class Bar(_Shown, ProgressCallback):
    """Shows a bar on stderr with the pace beside it and the logs above it."""

    def show(self, line: str) -> None:
        if self.training_bar is not None:
            self.training_bar.set_postfix_str(self.speed.split(", ")[0])  # the bar shows the remaining time itself
            self.training_bar.write(line)


def show_progress(trainer: Trainer, meter: TokenMeter) -> None:
    """Replaces transformers' progress callback with ours."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Lines(meter) if trainer.args.disable_tqdm else Bar(meter))


def log_line(step: int, num_steps: int, logs: dict[str, Any], speed: str = "") -> str:
    """Returns one log as a line: the step, each name with its value, and the pace."""
    values = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in logs.items()]
    return "  ".join([f"step {step}/{num_steps}", *values, *([speed] if speed else [])])


def duration(seconds: float) -> str:
    """Returns hours, minutes and seconds as 1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
