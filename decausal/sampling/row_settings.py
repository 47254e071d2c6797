"""Sampler settings of many rows as tensors, so that rows with different ones share a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decausal.sampling.candidates import choose
from decausal.sampling.confidence import confidence, entropies
from decausal.sampling.settings import CONFIDENCES, SCHEDULES, SamplerSettings

BY_ENTROPY = len(CONFIDENCES)
"""In place of a kind of confidence: rows that follow `entropy_bound` order their positions by entropy."""


@dataclass(frozen=True)
class RowSettings:
    """What decides tokens, one entry per row (or per position, see `at`), and what the host knows of all of them.

    Attributes:
        temperature: 0 where the most probable token is taken.
        top_k: 0 where all tokens are kept.
        top_p: 1 where all tokens are kept.
        order: Index into `CONFIDENCES`, or `BY_ENTROPY`.
        schedule: Index into `SCHEDULES`.
        num_steps: Where the schedule is static, else 1.
        threshold: Where the schedule is dynamic, else infinite.
        entropy_bound: Where the schedule is bounded, else 0.
        remask: Of all rows.
        is_greedy: Every temperature is 0.
        most_top_k: The largest of `top_k`.
        is_nucleus: Some `top_p` is below 1.
        orders, schedules: The ones that occur.
    """

    temperature: Float[Tensor, "n"]
    top_k: Int[Tensor, "n"]
    top_p: Float[Tensor, "n"]
    order: Int[Tensor, "n"]
    schedule: Int[Tensor, "n"]
    num_steps: Int[Tensor, "n"]
    threshold: Float[Tensor, "n"]
    entropy_bound: Float[Tensor, "n"]
    remask: bool
    is_greedy: bool
    most_top_k: int
    is_nucleus: bool
    orders: tuple[int, ...]
    schedules: tuple[str, ...]

    @classmethod
    def of(cls, rows: Sequence[SamplerSettings], device: torch.device) -> RowSettings:
        """Gathers the settings of rows; `remask` is the same in all."""

        def real(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        def whole(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        order = [_order(row) for row in rows]
        top_k = [row.top_k or 0 for row in rows]
        top_p = [1.0 if row.top_p is None else row.top_p for row in rows]
        schedules = [row.schedule for row in rows]
        return cls(
            temperature=real([row.temperature for row in rows]),
            top_k=whole(top_k),
            top_p=real(top_p),
            order=whole(order),
            schedule=whole([SCHEDULES.index(schedule) for schedule in schedules]),
            num_steps=whole([row.num_steps or 1 for row in rows]),
            threshold=real([float("inf") if row.threshold is None else row.threshold for row in rows]),
            entropy_bound=real([row.entropy_bound or 0.0 for row in rows]),
            remask=any(row.remask for row in rows),
            is_greedy=all(row.temperature == 0 for row in rows),
            most_top_k=max(top_k, default=0),
            is_nucleus=any(p < 1 for p in top_p),
            orders=tuple(sorted(set(order))),
            schedules=tuple(sorted(set(schedules))),
        )

    def rows(self, index: Int[Tensor, "m"]) -> RowSettings:
        """The settings of some of the rows."""
        return dataclasses.replace(self, **{name: getattr(self, name)[index] for name in _TENSORS})

    def at(self, row: Int[Tensor, "m"]) -> RowSettings:
        """The settings of positions, from the row of each; only to choose and to score tokens."""
        return self if self.is_greedy and len(self.orders) == 1 else self.rows(row)

    def chosen(self, logits: Float[Tensor, "n V"], numbers: Float[Tensor, "n"] | None) -> Int[Tensor, "n"]:
        """One candidate per position; `numbers` are needed where one is not greedy."""
        if self.is_greedy or numbers is None:
            return logits.argmax(-1)
        return choose(
            logits,
            numbers,
            temperature=self.temperature,
            top_k=self.top_k if self.most_top_k else None,
            top_p=self.top_p if self.is_nucleus else None,
            most=self.most_top_k,
        )

    def scored(self, logits: Float[Tensor, "n V"], token: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
        """By what positions are ordered: confidence, or minus the entropy in nats where that is bounded."""
        scores = None
        for order in self.orders:
            own = -entropies(logits) if order == BY_ENTROPY else confidence(logits, token, CONFIDENCES[order])
            scores = own if scores is None else torch.where(self.order == order, own, scores)
        return scores


_TENSORS = ("temperature", "top_k", "top_p", "order", "schedule", "num_steps", "threshold", "entropy_bound")


def _order(settings: SamplerSettings) -> int:
    return BY_ENTROPY if settings.entropy_bound is not None else CONFIDENCES.index(settings.confidence)
