"""The two runs: one recipe with and without its alignment, each on a clock that stops for measurements."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from decausal.config import read_recipe, resolve
from decausal.demo.history import Measurement
from decausal.demo.settings import DemoSettings
from decausal.demo.terminal import TrainingView
from decausal.evaluation.results import Likelihood
from decausal.models.backbone import stock_model
from decausal.training.convert import Conversion, convert
from decausal.training.meters import Clock
from decausal.training.settings import ConversionSettings

RECIPE = "repr-align"
_FROM_DEMO = (
    "model_name_or_path",
    "data",
    "data_fraction",
    "max_steps",
    "per_device_train_batch_size",
    "max_length",
    "learning_rate",
    "align_weight",
    "align_schedule",
    "align_stop_step",
    "freeze_embeddings",
    "seed",
)


@dataclass(frozen=True)
class Arm:
    """The record of one run.

    Attributes:
        name: "plain" or "aligned", also the name of its directory.
        conversion: The student and its directory.
        measurements: Held-out figures, the first before any step.
        likelihoods: The same measurements in full.
        token_losses: The training loss on tokens of each step, in nats per masked token.
        step_seconds: Training time of each step.
    """

    name: str
    conversion: Conversion
    measurements: list[Measurement]
    likelihoods: list[Likelihood]
    token_losses: list[float]
    step_seconds: list[float]


def arm_settings(settings: DemoSettings, arm: str, *, is_bf16: bool) -> tuple[ConversionSettings, dict[str, Any]]:
    """Returns a run's settings: the same for both except `output_dir` and `align_weight`, which is 0 in the plain
    run."""
    recipe = read_recipe(RECIPE) | {name: getattr(settings, name) for name in _FROM_DEMO}
    if arm == "plain":
        recipe["align_weight"] = 0.0
    conversion, training = resolve(ConversionSettings, recipe | {"overwrite": True}, [], where=f"recipe {RECIPE}")
    return conversion, training | {
        "output_dir": str(Path(settings.output_dir, arm)),
        "bf16": is_bf16,
        "eval_strategy": "steps",
        "eval_steps": settings.eval_every,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }


def train_arm(
    settings: DemoSettings,
    arm: str,
    likelihood: Callable[[PreTrainedModel], Likelihood],
    view: TrainingView,
    *,
    is_bf16: bool,
) -> Arm:
    """Converts the model once, showing and recording held-out figures.

    Raises:
        UserError: As `convert`.
    """
    conversion_settings, training = arm_settings(settings, arm, is_bf16=is_bf16)
    recorder = MeasuringCallback(arm, likelihood, view)
    view.begin(arm)
    # the view shows what transformers would print
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        conversion = convert(conversion_settings, training, callbacks=[recorder], measure=recorder.measure)
    return Arm(
        arm, conversion, recorder.measurements, recorder.likelihoods, recorder.token_losses, recorder.step_seconds
    )


class MeasuringCallback(TrainerCallback):
    """Measures a run before its first step, at the trainer's evaluations, and after its last step.

    Its clock runs only during training, not while the model is prepared, measured or saved.
    """

    def __init__(self, arm: str, likelihood: Callable[[PreTrainedModel], Likelihood], view: TrainingView) -> None:
        self.arm, self.view = arm, view
        self.likelihood = likelihood
        self.clock = Clock()
        self.measurements: list[Measurement] = []
        self.likelihoods: list[Likelihood] = []
        self.token_losses: list[float] = []
        self.step_seconds: list[float] = []
        self._step = 0
        self._seconds_before = 0.0

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """Returns the function that `convert` calls with the student, and that returns what the trainer logs."""
        self.clock.stop()
        found = self.likelihood(model)
        measurement = Measurement(
            self._step, self.clock.seconds, found.masked_cross_entropy, found.nelbo_per_token, found.bits_per_byte
        )
        self.likelihoods.append(found)
        self.measurements.append(measurement)
        self.view.measured(self.arm, measurement)
        self.clock.start()
        return {
            "eval_masked_cross_entropy": measurement.masked_cross_entropy,
            "eval_nelbo_per_token": measurement.nelbo_per_token,
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.measure(stock_model(kwargs["model"]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._step = state.global_step
        self.step_seconds.append(self.clock.seconds - self._seconds_before)
        self._seconds_before = self.clock.seconds
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "token_loss" in logs:
            self.token_losses.append(logs["token_loss"])
            self.view.step(self.arm, state.global_step, logs["token_loss"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.clock.stop()
