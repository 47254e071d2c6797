"""Sampler settings of many rows as tensors, so that rows with different ones share a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decausal.sampling.confidence import confidence, entropies
from decausal.sampling.drawing import choose
from decausal.sampling.settings import (
    CACHES,
    CONFIDENCES,
    DEFAULT_REMASK_RATE,
    ORDERS,
    REMASKINGS,
    SCHEDULES,
    SamplerSettings,
)

BY_ENTROPY = len(CONFIDENCES)
"""Stands for the entropy in place of a kind of confidence: rows with `entropy_bound` order their positions by it."""
REMASKS = (False, *REMASKINGS)
WHOLE_ROW = 2**31
"""The window of rows without one."""


@dataclass(frozen=True)
class TokenSettings:
    """The settings that decide a position's token and score, one entry per row or, with `at`, per position.

    Attributes:
        temperature: 0 takes the most probable token.
        top_k: 0 keeps all tokens.
        top_p: 1 keeps all tokens.
        min_p: 0 keeps all tokens.
        measure: Index into `CONFIDENCES`, or `BY_ENTROPY`.
        guidance: 0 without guidance.
        is_greedy: Whether every temperature is 0.
        most_top_k: The largest of `top_k`, rounded up to a power of two so that few values occur; 0 if none is set.
        is_nucleus: Whether some `top_p` is below 1.
        has_min_p: Whether some `min_p` is above 0.
        is_guided: Whether some `guidance` is above 0.
        measures: The values of `measure` that occur.
    """

    temperature: Float[Tensor, " n"]
    top_k: Int[Tensor, " n"]
    top_p: Float[Tensor, " n"]
    min_p: Float[Tensor, " n"]
    measure: Int[Tensor, " n"]
    guidance: Float[Tensor, " n"]
    is_greedy: bool
    most_top_k: int
    is_nucleus: bool
    has_min_p: bool
    is_guided: bool
    measures: tuple[int, ...]

    def at(self, row: Int[Tensor, " m"]) -> TokenSettings:
        """Returns the settings of positions, given the row of each. If all rows are alike, returns itself."""
        if self.is_greedy and len(self.measures) == 1 and not self.is_guided:
            return self
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(TokenSettings)}
        return TokenSettings(**{n: value[row] if isinstance(value, Tensor) else value for n, value in values.items()})

    def chosen(self, logits: Float[Tensor, "n V"], numbers: Float[Tensor, " n"] | None) -> Int[Tensor, " n"]:
        """Draws a token per position. `numbers` are needed unless all are greedy."""
        if self.is_greedy or numbers is None:
            return logits.argmax(-1)
        return choose(
            logits,
            numbers,
            temperature=self.temperature,
            top_k=self.top_k if self.most_top_k else None,
            top_p=self.top_p if self.is_nucleus else None,
            min_p=self.min_p if self.has_min_p else None,
            most=self.most_top_k,
        )

    def scored(self, logits: Float[Tensor, "n V"], token: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Returns the numbers by which positions are ordered: confidence, or minus the entropy in nats if that is
        bounded."""
        scores = None
        for measure in self.measures:
            own = -entropies(logits) if measure == BY_ENTROPY else confidence(logits, token, CONFIDENCES[measure])
            scores = own if scores is None else torch.where(self.measure == measure, own, scores)
        return scores


@dataclass(frozen=True)
class RowSettings(TokenSettings):
    """All settings of rows, one entry per row, with a summary for the host.

    Attributes:
        order: Index into `ORDERS`.
        schedule: Index into `SCHEDULES`.
        num_steps: Steps of a static schedule, else 1.
        threshold: Threshold of a dynamic schedule, else infinite.
        entropy_bound: Bound of an entropy schedule, else 0.
        window: Size of the window, or `WHOLE_ROW`.
        cache: Index into `CACHES`.
        cache_refresh: 0 if only a window's first pass reads the whole row.
        remask: Index into `REMASKS`.
        remask_rate: Rate at which tokens are opened at random, else 0.
        has_windows, has_cache: Whether some row has one.
        orders, schedules, remasks: The values that occur.
    """

    order: Int[Tensor, " n"]
    schedule: Int[Tensor, " n"]
    num_steps: Int[Tensor, " n"]
    threshold: Float[Tensor, " n"]
    entropy_bound: Float[Tensor, " n"]
    window: Int[Tensor, " n"]
    cache: Int[Tensor, " n"]
    cache_refresh: Int[Tensor, " n"]
    remask: Int[Tensor, " n"]
    remask_rate: Float[Tensor, " n"]
    has_windows: bool
    has_cache: bool
    orders: tuple[str, ...]
    schedules: tuple[str, ...]
    remasks: tuple[bool | str, ...]

    @classmethod
    def of(cls, rows: Sequence[SamplerSettings], device: torch.device) -> RowSettings:
        """Gathers the settings of rows. They reach the device in one copy."""
        measures = [_measure(row) for row in rows]
        top_k = [row.top_k or 0 for row in rows]
        top_p = [1.0 if row.top_p is None else row.top_p for row in rows]
        schedules = [row.schedule for row in rows]
        real: dict[str, list[float]] = {
            "temperature": [row.temperature for row in rows],
            "top_p": top_p,
            "min_p": [row.min_p or 0.0 for row in rows],
            "threshold": [float("inf") if row.threshold is None else row.threshold for row in rows],
            "entropy_bound": [row.entropy_bound or 0.0 for row in rows],
            "guidance": [row.guidance for row in rows],
            "remask_rate": [(row.remask_rate or DEFAULT_REMASK_RATE) * row.is_remdm for row in rows],
        }
        whole: dict[str, list[int]] = {
            "top_k": top_k,
            "measure": measures,
            "order": [ORDERS.index(row.order) for row in rows],
            "schedule": [SCHEDULES.index(schedule) for schedule in schedules],
            "num_steps": [row.num_steps or 1 for row in rows],
            "window": [row.window or WHOLE_ROW for row in rows],
            "cache": [CACHES.index(row.cache) for row in rows],
            "cache_refresh": [row.cache_refresh or 0 for row in rows],
            "remask": [REMASKS.index(row.remask) for row in rows],
        }
        return cls(
            **_on_device(real, whole, device),
            is_greedy=all(row.temperature == 0 for row in rows),
            most_top_k=_rounded_up(max(top_k, default=0)),
            is_nucleus=any(p < 1 for p in top_p),
            has_min_p=any(row.min_p for row in rows),
            has_windows=any(row.window is not None for row in rows),
            has_cache=any(row.cache != "none" for row in rows),
            is_guided=any(row.guidance > 0 for row in rows),
            measures=tuple(sorted(set(measures))),
            orders=tuple(sorted({row.order for row in rows})),
            schedules=tuple(sorted(set(schedules))),
            remasks=tuple(sorted({row.remask for row in rows}, key=REMASKS.index)),
        )

    def rows(self, index: Int[Tensor, " m"]) -> RowSettings:
        """Returns the settings of some of the rows."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        taken = {name: value[index] for name, value in values.items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **taken)

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The host's summary. Rows of the same kinds are computed by the same operations."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(value for value in values if not isinstance(value, Tensor))

    def take(self, other: RowSettings) -> None:
        """Writes settings of the same kinds over these, in place."""
        for field in dataclasses.fields(self):
            held = getattr(self, field.name)
            if isinstance(held, Tensor):
                held.copy_(getattr(other, field.name))

    def has_remask(self, *kinds: bool | str) -> Bool[Tensor, " n"]:
        """Returns which rows remask in one of these ways."""
        found = torch.zeros_like(self.remask, dtype=torch.bool)
        for kind in kinds:
            found = found | (self.remask == REMASKS.index(kind))
        return found


def _on_device(real: dict[str, list[float]], whole: dict[str, list[int]], device: torch.device) -> dict[str, Tensor]:
    """Returns both as tensors by name, after one copy: numbers of 64 bits hold either kind exactly."""
    numbers = torch.tensor([*real.values(), *whole.values()], dtype=torch.float64)
    if device.type == "cuda":
        numbers = numbers.pin_memory()  # the copy does not wait for earlier work of the device
    numbers = numbers.to(device, non_blocking=True)
    reals, wholes = numbers[: len(real)].float(), numbers[len(real) :].long()
    return dict(zip([*real, *whole], [*reals.unbind(0), *wholes.unbind(0)], strict=True))


def _rounded_up(number: int) -> int:
    """Returns the next power of two; 0 stays 0."""
    return 1 << (number - 1).bit_length() if number else 0


def _measure(settings: SamplerSettings) -> int:
    return BY_ENTROPY if settings.entropy_bound is not None else CONFIDENCES.index(settings.confidence)
