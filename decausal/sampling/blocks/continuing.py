"""Prompts continued by a block model, and its steps shown as those of a bidirectional one are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from decausal.models.checkpoint import Converted
from decausal.sampling.bidirectional.sampler import OnStep
from decausal.sampling.blocks.engine import BlockEngine, Finished, Request, StepEvent
from decausal.sampling.blocks.speculative import SpeculativeEngine
from decausal.sampling.jobs import Ended, Job, run
from decausal.sampling.rows import Row, refuse_batch_size
from decausal.sampling.settings import SamplerSettings


def continue_in_blocks(
    converted: Converted,
    prompts: Sequence[list[int]],
    names: Sequence[str],
    settings: SamplerSettings,
    *,
    end_token_ids: Sequence[int],
    batch_size: int,
    on_step: OnStep | None = None,
) -> list[Finished]:
    """Continues prompts; row i draws from `settings.seed` + i, and `batch_size` rows are in use at a time.

    Args:
        converted: Model, tokenizer and facts.
        prompts: Their ids.
        names: What error messages call them.
        settings: Of all rows.
        end_token_ids: A row ends with one of these.
        batch_size: Rows decoded together; as one ends the next one enters.
        on_step: Called after every pass with all rows, those that wait included, up to their last new position.

    Raises:
        UserError: As `BlockEngine` and its `submit`; a batch size below 1.
    """
    refuse_batch_size(batch_size)
    if not prompts:
        return []
    requests = [
        Request(prompt, settings, settings.seed + row, name)
        for row, (prompt, name) in enumerate(zip(prompts, names, strict=True))
    ]
    engine = BlockEngine(
        converted.model,
        converted.facts,
        max_rows=min(batch_size, len(requests)),
        end_token_ids=end_token_ids,
        tokenizer=converted.tokenizer,
    )
    for request in requests:  # whatever is refused is refused before the first pass
        engine.submit(request)
    if on_step is None:
        finished = list(engine.run())
    else:
        finished, frames, step = [], _Frames(requests, converted.facts.mask_token_id, end_token_ids), 0
        while engine.num_unfinished:
            events = engine.step()
            on_step(step, *frames.after(events))
            finished += [event.finished for event in events if event.finished]
            step += 1
    return sorted(finished, key=lambda row: row.ticket)


def continue_speculatively(
    converted: Converted,
    prompts: Sequence[list[int]],
    names: Sequence[str],
    settings: SamplerSettings,
    *,
    end_token_ids: Sequence[int],
    batch_size: int,
) -> list[Ended]:
    """Continues prompts as `continue_in_blocks` does, but what the weights write under causal attention.

    Raises:
        UserError: As `SpeculativeEngine` and its `submit`; a prompt that the model cannot read; a batch size below 1.
    """
    refuse_batch_size(batch_size)
    if not prompts:
        return []
    rows = [Row((prompt, []), (settings.max_new_tokens,), name) for prompt, name in zip(prompts, names, strict=True)]
    for row in rows:
        row.check(converted)
    longest = max(row.length for row in rows)
    engine = SpeculativeEngine(converted, max_rows=min(batch_size, len(rows)), max_length=longest)
    jobs = [Job(row, settings, settings.seed + index, tuple(end_token_ids)) for index, row in enumerate(rows)]
    ended = dict(run(engine, jobs))
    return [ended[index] for index in range(len(rows))]


class _Frames:
    """All rows as `sampler.OnStep` shows them. Tickets count the rows."""

    def __init__(self, requests: Sequence[Request], mask_token_id: int, end_token_ids: Sequence[int]) -> None:
        self.limits = [len(request.prompt_ids) + request.settings.max_new_tokens for request in requests]
        self.starts = [len(request.prompt_ids) for request in requests]
        self.filler = end_token_ids[0] if end_token_ids else mask_token_id
        self.ids = torch.full((len(requests), max(self.limits)), mask_token_id)
        self.is_open = torch.zeros_like(self.ids, dtype=torch.bool)
        for row, request in enumerate(requests):
            self.ids[row, : self.starts[row]] = torch.tensor(request.prompt_ids, dtype=torch.long)
            self.is_open[row, self.starts[row] : self.limits[row]] = True

    def after(self, events: Sequence[StepEvent]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns ids, is_open and newly_kept after a pass."""
        newly_kept = torch.zeros_like(self.is_open)
        for event in events:
            row, limit = event.ticket, self.limits[event.ticket]
            kept = [(place, token) for place, token in zip(event.positions, event.ids, strict=True) if place < limit]
            for place, token in kept:
                self.ids[row, place] = token
                self.is_open[row, place] = False
                newly_kept[row, place] = True
            if event.finished:
                end = self.starts[row] + len(event.finished.ids)
                self.ids[row, end:limit] = self.filler
                self.is_open[row, end:] = newly_kept[row, end:] = False
        return self.ids.clone(), self.is_open.clone(), newly_kept
