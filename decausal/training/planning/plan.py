"""Shows what a run will need, as a table and as JSON: memory by component, operations, hours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from rich.table import Table

from decausal.data.reading import say
from decausal.devices import best_device
from decausal.gpus import GPUS, Gpu
from decausal.training.planning.footprint import Footprint, footprint
from decausal.training.planning.room import Remedy, gib, memory_of, needed, remedy
from decausal.training.planning.step import PlannedStep, planned_step
from decausal.training.planning.timing import StepTime, implied_time, measured_time
from decausal.training.settings import ConversionSettings
from decausal.wording import quantity


@dataclass(frozen=True)
class Plan:
    """A run before it begins.

    Attributes:
        step: The run's step on `meta`.
        found: Memory and operations.
        time: Seconds of an optimizer step; None if they were not asked for.
        need: Bytes on the device, including what is not in tensors.
        room: Bytes that the device has.
        cheaper: Settings with which it fits, if it does not.
    """

    step: PlannedStep
    found: Footprint
    time: StepTime | None
    need: float
    room: float
    cheaper: Remedy | None

    @property
    def step_seconds(self) -> float | None:
        """Seconds of an optimizer step."""
        if self.time is None:
            return None
        return self.step.args.gradient_accumulation_steps * self.time.micro_batch + self.time.update

    @property
    def hours(self) -> float | None:
        """Hours of the run without rollouts and evaluation; None if the number of steps is not known."""
        if self.step_seconds is None or self.step.num_steps is None:
            return None
        return self.step.num_steps * self.step_seconds / 3600

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        accumulated = self.step.args.gradient_accumulation_steps
        return {
            "device": self.step.device.type,
            "memory_bytes": dict(self.found.parts),
            "peak_bytes": self.found.total,
            "needed_bytes": round(self.need),
            "available_bytes": round(self.room),
            "fits": self.need <= self.room,
            "cheapest_settings_that_fit": None if self.cheaper is None else self.cheaper.flags,
            "activation_bytes_per_token": self.found.activations / self.found.num_tokens,
            "tokens_per_micro_batch": self.found.num_tokens,
            "operations_per_step": accumulated * self.found.tally.operations,
            "kernels_per_micro_batch": self.found.tally.kernels.total(),
            "steps": self.step.num_steps,
            "seconds_per_step": self.step_seconds,
            "time_is": None if self.time is None else self.time.origin,
            "hours": self.hours,
            "hours_leave_out": self.left_out,
        }

    @property
    def left_out(self) -> list[str]:
        """What the hours do not include."""
        return ["evaluation and checkpoints"] + ["rollouts"] * bool(self.step.rollout_slots)

    def as_table(self, title: str) -> Table:
        """Returns the plan for a terminal."""
        found, accumulated = self.found, self.step.args.gradient_accumulation_steps
        table = Table(title=title, caption=self._verdict(), caption_justify="left", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for name, size in found.parts.items():
            if size:
                table.add_row(name, gib(size))
        table.add_row("peak of tensors", gib(found.total))
        table.add_section()
        kind = f"{found.activations / found.num_tokens / 1e6:.3f} MB"
        table.add_row(f"activations per token, {quantity(found.num_tokens, 'token')} in a micro-batch", kind)
        table.add_row("operations per optimizer step", f"{accumulated * found.tally.operations / 1e12:,.2f} TFLOP")
        if self.time is not None:
            table.add_row(f"seconds per optimizer step, {self.time.origin}", f"{self.step_seconds:,.3f}")
        if self.hours is not None:
            name = f"hours of {quantity(self.step.num_steps, 'step')}, without {' and '.join(self.left_out)}"
            table.add_row(name, f"{self.hours:,.2f}")
        return table

    def _verdict(self) -> str:
        where = f"about {gib(self.need)} needed, {gib(self.room)} there"
        if self.need <= self.room:
            return f"fits: {where}"
        return f"does not fit: {where}; " + (f"give {self.cheaper}" if self.cheaper else "no setting here fits")


def plan(
    settings: ConversionSettings, training: dict[str, Any], *, gpu: str | None = None, measures: bool = True
) -> Plan:
    """Plans a run.

    Args:
        settings: As for `convert`; without data, rows are random tokens and the length is `max_steps`.
        training: Transformers' arguments; needs no `output_dir`.
        gpu: A data sheet's name in `decausal.gpus.GPUS`; None: this machine.
        measures: Whether the time of a step is measured on this machine.

    Raises:
        UserError: As `convert`.
    """
    sheet = None if gpu is None else GPUS[gpu]
    here = torch.device("cpu") if training.get("use_cpu") else best_device()
    device = here if sheet is None else torch.device("cuda")
    step = planned_step(settings, training, device)
    found = footprint(step)
    need, room = needed(found, device), memory_of(device, sheet)
    cheaper = remedy(settings, training, device, room) if need > room else None
    time = _time(settings, training, device, sheet, step, found, need <= room and measures)
    return Plan(step, found, time, need, room, cheaper)


def _time(
    settings: ConversionSettings,
    training: dict[str, Any],
    device: torch.device,
    sheet: Gpu | None,
    step: PlannedStep,
    found: Footprint,
    measures: bool,
) -> StepTime | None:
    if sheet is not None:
        return implied_time(found, sheet)
    if not measures:
        return None
    num_rows = step.args.per_device_train_batch_size

    @cache
    def operations(rows: int) -> float:
        if rows == num_rows:
            return found.tally.operations
        return footprint(planned_step(settings, training, device, num_rows=rows)).tally.operations

    say("measuring a few short steps on this machine")
    return measured_time(
        lambda rows: planned_step(settings, training, device, where=device, num_rows=rows), num_rows, operations
    )
