"""Checks whether a run fits into a device's memory, and finds the cheapest settings with which it does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from decausal.data.reading import say
from decausal.devices import choices
from decausal.errors import UserError
from decausal.gpus import Gpu
from decausal.training.planning.footprint import Footprint, footprint
from decausal.training.planning.step import planned_step
from decausal.training.settings import ConversionSettings
from decausal.training.start import Start

CONTEXT = 0.7e9
"""Bytes that CUDA and its libraries hold besides tensors: usual for PyTorch, not measured here."""
UNUSABLE = 0.06
"""Share of tensors that the allocator loses to gaps: also usual, not measured here."""
ADAPTER_RANK = 64


@dataclass(frozen=True)
class Remedy:
    """Other settings with which a run fits.

    Attributes:
        flags: The flags to give.
        found: What the run then needs, see `Footprint`.
    """

    flags: dict[str, Any]
    found: Footprint

    def __str__(self) -> str:
        return " ".join(f"--{name} {str(value).lower()}" for name, value in self.flags.items())


def needed(found: Footprint, device: torch.device) -> float:
    """Returns the bytes that a run needs on a device, including what is not in tensors."""
    return found.total * (1 + UNUSABLE) + CONTEXT if device.type == "cuda" else float(found.total)


def memory_of(device: torch.device, gpu: Gpu | None = None) -> float:
    """Returns the bytes that a device has for a run, by its data sheet, or else what is free here."""
    if gpu is not None:
        return gpu.memory
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + CONTEXT  # this process has its context by now
    return float(psutil.virtual_memory().available)


def refuse_what_does_not_fit(
    settings: ConversionSettings,
    training: dict[str, Any],
    device: torch.device,
    *,
    start: Start | None = None,
    is_sharded: bool = False,
    room: float | None = None,
) -> None:
    """Raises UserError if a run on a GPU would run out of memory, with the cheapest settings that fit.

    Args:
        settings: The run's settings.
        training: Its training arguments as given.
        device: Where it will be.
        start: See `planned_step`.
        is_sharded: Whether weights are spread over processes, which is not counted.
        room: Bytes of the device; None: what is free.
    """
    if not choices(device).checks_memory:
        return
    if is_sharded:
        say("the memory of sharded weights is not known beforehand")
        return
    # The data are not needed to know the memory: rows are as long as max_length.
    settings, training = replace(settings, data=None), dict(training)
    found = footprint(planned_step(settings, training, device, start=start))
    room = memory_of(device) if room is None else room
    need = needed(found, device)
    if need <= room:
        say(f"needs about {gib(need)} of GPU memory, of {gib(room)}")
        return
    cheapest = remedy(settings, training, device, room, start)
    advice = (
        "none of the settings that save memory is enough: take a smaller model, or shard it over several GPUs with FSDP"
    )
    if cheapest is not None:
        advice = f"give {cheapest}, which needs {gib(needed(cheapest.found, device))}"
    parts = ", ".join(f"{name} {gib(size)}" for name, size in found.parts.items() if size)
    raise UserError(f"this run needs about {gib(need)} of GPU memory ({parts}), and {gib(room)} are there: {advice}")


def remedy(
    settings: ConversionSettings,
    training: dict[str, Any],
    device: torch.device,
    room: float,
    start: Start | None = None,
) -> Remedy | None:
    """Returns the cheapest settings with which a run fits: smaller micro-batches cost least, then gradient
    checkpointing, then adapters in place of all weights."""
    for flags in _cheapest_first(settings, training):
        own = {name: value for name, value in flags.items() if name in ConversionSettings.__dataclass_fields__}
        others = {name: value for name, value in flags.items() if name not in own}
        found = footprint(planned_step(replace(settings, **own), training | others, device, start=start))
        if needed(found, device) <= room:
            return Remedy(flags, found)
    return None


def _cheapest_first(settings: ConversionSettings, training: dict[str, Any]) -> Iterator[dict[str, Any]]:
    rows = training.get("per_device_train_batch_size", 8)
    accumulated = training.get("gradient_accumulation_steps", 1)
    halves = [rows >> shift for shift in range(rows.bit_length()) if rows % (1 << shift) == 0]
    batches = [
        {"per_device_train_batch_size": half, "gradient_accumulation_steps": accumulated * (rows // half)}
        for half in halves
    ]
    yield from batches[1:]
    more: dict[str, Any] = {}
    if settings.noise != "all" and not training.get("gradient_checkpointing"):
        more = {"gradient_checkpointing": True}
        yield from ((batch if number else {}) | more for number, batch in enumerate(batches))
    if not settings.lora_r:
        yield (batches[-1] if len(batches) > 1 else {}) | more | {"lora_r": ADAPTER_RANK}


def gib(num_bytes: int | float) -> str:
    """Returns a number of bytes for people."""
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:.0f} MiB"
    return f"{num_bytes / 2**30:.{2 if num_bytes < 10 * 2**30 else 0}f} GiB"
