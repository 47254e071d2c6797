"""Rows given as tensors, denoised by the engine: the tests' own view of it, one tensor per fact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decausal.models.checkpoint import Converted
from decausal.models.facts import ConversionFacts
from decausal.sampling.bidirectional.row_engine import RowEngine
from decausal.sampling.jobs import Ended, Engine, Job, Progress, run
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
from tests.families import tiny_tokenizer

OnFrame = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called after every step with (step, ids [B T], is_open [B T] after the step, newly_kept [B T])."""


def in_order(engine: Engine, jobs: Sequence[Job]) -> list[Ended]:
    """How each job ended."""
    ended = dict(run(engine, jobs))
    return [ended[index] for index in range(len(jobs))]


def drained(engine: Engine) -> dict[int, Ended]:
    """How what an engine holds ends, by ticket."""
    ended = {}
    while engine.num_running or engine.num_waiting:
        ended |= {progress.ticket: progress.ended for progress in engine.step() if progress.ended}
    return ended


def steps(ids: list[int], order: list[int], end: int | None = None) -> list[Progress]:
    """What is reported of a row whose positions 2 to 5 are open and kept in this order, one in each step.

    Args:
        ids: The whole row.
        order: Offsets from position 2.
        end: The row ends with the new token of this number, what was kept after it is dropped.
    """
    row = Row((ids[:2], ids[6:]), (4,), "the row")
    count = 4 if end is None else end
    ended = Ended(
        ids[2 : 2 + count], [order.index(offset) for offset in range(count)], len(order), "end" if end else "length"
    )
    return [
        Progress(
            ticket=0,
            step=step,
            positions=[2 + offset],
            ids=[ids[2 + offset]],
            row=row if step == 0 else None,
            ended=ended if step == len(order) - 1 else None,
        )
        for step, offset in enumerate(order)
    ]


@dataclass(frozen=True)
class Denoised:
    """Rows that are written.

    Attributes:
        ids: Tokens. After the end token of a row that ended, its other open positions hold the end token too.
        step_of_token: The step, from 0, in which a token was kept for good; -1 for given ones and after the end.
        num_forwards, num_tokens_read: As `Ended` has them; 0 for a row without open positions.
    """

    ids: Tensor
    step_of_token: Tensor
    num_forwards: Tensor
    num_tokens_read: Tensor

    @property
    def tokens_per_forward(self) -> Tensor:
        return (self.step_of_token >= 0).sum(1) / self.num_forwards.clamp(min=1)


def denoise(
    model: Any,
    facts: ConversionFacts,
    ids: Tensor,
    is_open: Tensor,
    settings: SamplerSettings,
    *,
    lengths: Sequence[int] | None = None,
    row_seeds: Tensor | None = None,
    end_token_ids: tuple[int, ...] = (),
    on_step: OnFrame | None = None,
) -> Denoised:
    """Writes the open positions of rows `ids` [B T], all of them together; row i draws from `settings.seed` + i."""
    seeds = [settings.seed + i for i in range(len(ids))] if row_seeds is None else row_seeds.tolist()
    frames = _Frames(ids, is_open, facts.mask_token_id, end_token_ids)
    rows, jobs = [], []
    for row, (tokens, opened) in enumerate(zip(ids.tolist(), is_open, strict=True)):
        length = len(tokens) if lengths is None else lengths[row]
        if opened.any():
            written = Row.opened(tokens[:length], opened.nonzero().flatten().tolist(), f"row {row}")
            rows.append(row)
            jobs.append(Job(written, settings, seeds[row], end_token_ids))
    engine = RowEngine(Converted(model, tiny_tokenizer(), facts), max_rows=max(1, len(jobs)), max_length=ids.shape[1])
    row_of = {engine.submit(job): row for job, row in zip(jobs, rows, strict=True)}
    step = 0
    while engine.num_running:
        frames.take(step, [(row_of[progress.ticket], progress) for progress in engine.step()])
        if on_step is not None:
            on_step(step, frames.ids.clone(), frames.is_masked.clone(), frames.step_of_token == step)
        step += 1
    return Denoised(frames.ids, frames.step_of_token, frames.num_forwards, frames.num_tokens_read)


class _Frames:
    def __init__(self, ids: Tensor, is_open: Tensor, mask_token_id: int, ends: tuple[int, ...]) -> None:
        self.ids = ids.masked_fill(is_open, mask_token_id)
        self.is_open, self.is_masked = is_open, is_open.clone()
        self.step_of_token = torch.full_like(ids, -1)
        self.num_forwards, self.num_tokens_read = torch.zeros(2, len(ids), dtype=torch.long)
        self._mask_token_id, self._ends = mask_token_id, ends

    def take(self, step: int, reported: list[tuple[int, Progress]]) -> None:
        for row, progress in reported:
            for position in progress.reopened:
                self._put(row, position, self._mask_token_id, -1)
            for position, token in zip(progress.positions, progress.ids, strict=True):
                self._put(row, position, token, step)
            if progress.ended is not None:
                self._end(row, progress.ended)

    def _put(self, row: int, position: int, token: int, step: int) -> None:
        self.ids[row, position], self.step_of_token[row, position] = token, step
        self.is_masked[row, position] = step < 0

    def _end(self, row: int, ended: Ended) -> None:
        positions = self.is_open[row].nonzero().flatten().tolist()
        assert self.ids[row, positions[: len(ended.ids)]].tolist() == ended.ids
        assert self.step_of_token[row, positions[: len(ended.ids)]].tolist() == ended.step_of_token
        for position in positions[len(ended.ids) :]:
            self.ids[row, position], self.step_of_token[row, position] = self._ends[0], -1
            self.is_masked[row, position] = False
        self.num_forwards[row], self.num_tokens_read[row] = ended.num_forwards, ended.num_tokens_read
