"""Finds how long a step takes, measured on this machine by a few short steps, or implied by a GPU's data sheet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import Trainer

from decausal.devices import LAUNCH, clock
from decausal.diffusion.layout import future_order
from decausal.gpus import Gpu
from decausal.models.backbone import stock_model
from decausal.training.losses import weighted_loss
from decausal.training.memory import keep_freed_memory
from decausal.training.planning.footprint import ADAM_PASSES, Footprint
from decausal.training.planning.step import PlannedStep
from decausal.training.questions import Vocabulary, ask
from decausal.training.terms import Term

LONGEST = 20.0
"""Seconds that a measured micro-batch may take. If one takes longer, only some of its rows are measured."""
REPEATS = 2


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, and how they were found.

    Attributes:
        micro_batch: Seconds of one micro-batch: teacher, forward and backward pass.
        update: Seconds of clipping and the optimizer.
        origin: How they were found, in a few words.
    """

    micro_batch: float
    update: float
    origin: str


def implied_time(found: Footprint, gpu: Gpu) -> StepTime:
    """Returns what counted operations, bytes and kernels imply on a GPU."""
    update = ADAM_PASSES * found.gradients / gpu.bandwidth
    return StepTime(found.tally.seconds(LAUNCH, gpu)["total"], update, f"implied by the data sheet of {gpu.label}")


def measured_time(
    prepare: Callable[[int], PlannedStep],
    num_rows: int,
    operations: Callable[[int], float],
    longest: float = LONGEST,
) -> StepTime:
    """Measures on this machine, with random weights.

    If not all rows are measured, half as many are measured too, and the time of the others is extrapolated. Two
    measurements are needed, since a part of a step does not depend on the rows. From a single row, time is in
    proportion to the operations.

    Args:
        prepare: Returns the step with this many clean rows, on the device.
        num_rows: Clean rows of the run's micro-batch.
        operations: Returns the operations of a micro-batch of this many rows.
        longest: Seconds that a measured micro-batch may take.
    """
    step = Measured(prepare(1))
    step.micro_batch()  # reaches memory for the first time, and starts threads
    rows = max(1, min(num_rows, int(longest / step.micro_batch())))
    half, of_half = rows // 2, 0.0
    if half and rows < num_rows:
        of_half = _best(Measured(prepare(half)))
    step = Measured(prepare(rows)) if rows > 1 else step
    seconds = _best(step)
    if rows < num_rows:
        per_row = (seconds - of_half) / (rows - half)
        scale = operations(num_rows) / operations(rows)
        seconds = seconds + (num_rows - rows) * per_row if half else seconds * scale
    return StepTime(seconds, step.update(), f"measured here on {rows} of {num_rows} rows with random weights")


def _best(step: Measured) -> float:
    step.micro_batch()
    return min(step.micro_batch() for _ in range(REPEATS))


class Measured:
    """A step on a real device."""

    def __init__(self, step: PlannedStep) -> None:
        self.step, self.device = step, step.device
        if self.device.type == "cpu":
            keep_freed_memory()
        self._model = stock_model(step.student.to(self.device))
        if step.teacher is not None:
            step.teacher.model.to(self.device)
        self._batch = send_to_device(step.batch, self.device)
        if step.supervision.anneal_steps:
            order = future_order(self._batch["clean_ids"].shape[1], 0, self.device)
            self._batch |= {"future_order": order, "future_fraction": 0.5}
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(step.args)
        self._trained = [weight for weight in step.student.parameters() if weight.requires_grad]
        self.optimizer = kind(self._trained, **kwargs)

    def micro_batch(self) -> float:
        """Returns the seconds of teacher, forward and backward pass: the mean over the losses of the run's stages."""
        self.forget_gradients()
        return sum(share * self._seconds(lambda terms=terms: self.run(terms)) for terms, share in self.step.stages())

    def forget_gradients(self) -> None:
        """Frees all gradients, as an optimizer step does."""
        self.optimizer.zero_grad()

    def update(self) -> float:
        """Returns the seconds of an update after a backward pass."""
        self._seconds(self.change_weights)  # makes the optimizer's state
        return self._seconds(self.change_weights)

    def change_weights(self) -> None:
        """Clips gradients and runs the optimizer."""
        torch.nn.utils.clip_grad_norm_(self._trained, self.step.args.max_grad_norm or torch.inf)
        self.optimizer.step()

    def run(self, weights: dict[Term, float]) -> None:
        """Runs teacher, forward and backward pass of a micro-batch with some losses."""
        step, batch = self.step, self._batch
        vocabulary = Vocabulary(len(self._model.get_output_embeddings().weight), step.supervision.mask_token_id)
        questions = [] if step.supervision.is_gated else [question for term in weights for question in term.questions]
        counts = {name: count.float() for name, count in batch["counts"].items()}
        with torch.autocast(self.device.type, step.mixed_dtype, enabled=step.mixed_dtype is not None):
            answers = ask(step.teacher, questions, batch, vocabulary)
            loss, _ = weighted_loss(self._model, batch, step.supervision, weights, counts, answers)
        loss.backward()

    def _seconds(self, function: Callable[[], Any]) -> float:
        start = clock(self.device)
        function()
        return clock(self.device) - start
