"""Chooses the engine for a model and for a job's settings, and writes rows from start to end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from decausal.devices import choices
from decausal.errors import UserError
from decausal.models.architecture import context_length
from decausal.models.checkpoint import Converted
from decausal.models.merged import merge_projections
from decausal.sampling.bidirectional.row_engine import RowEngine
from decausal.sampling.blocks.engine import BlockEngine
from decausal.sampling.blocks.recording import PATIENCE, CannotRecordError, CudaGraphs
from decausal.sampling.blocks.speculative import SpeculativeEngine
from decausal.sampling.jobs import Ended, Engine, Job, OnStep, Progress, refuse_batch_size, run
from decausal.sampling.settings.of_model import settings_for
from decausal.sampling.stopping import end_token_ids, refuse_stop_token_ids

logger = logging.getLogger(__name__)


def engine_for(
    converted: Converted,
    *,
    max_rows: int,
    max_length: int,
    is_autoregressive: bool = False,
    cuda_graphs: bool | None = None,
    is_brief: bool = False,
    compile_layers: bool = False,
    prefix_cache_tokens: int = 0,
) -> Engine:
    """Returns an engine for the model's layout. Jobs have the same answers as in `generate` and `infill`.

    Speculated rows and denoised rows do not share passes. If there are both, a step is one pass of each, over
    `max_rows` of each. Memory for a kind is allocated when its first row comes.

    Args:
        converted: Model, tokenizer and facts.
        max_rows: Rows in one forward pass.
        max_length: Longest row, given and written tokens together.
        is_autoregressive: Whether a causal model writes from left to right with a cache, one token per pass.
        cuda_graphs: Whether to record passes of block models and of verified decoding, and replay them. None: on a GPU,
            if the model can be recorded.
        is_brief: Whether the engine serves a few rows only: its passes are recorded when they have come a few times.
            Else those of block models for the model's own settings are recorded now, so that no row has to wait.
        compile_layers: Whether to compile the decoder layers of block models' recorded passes, which takes minutes and
            leaves a quarter of their kernels.
        prefix_cache_tokens: Under self-speculation, tokens of shared beginnings to hold, so that they are read once. 0:
            none.

    Raises:
        UserError: A negative `prefix_cache_tokens`. CUDA graphs were asked for without a GPU, or for a model that reads
            whole rows or cannot be recorded. Compiled layers without recorded passes.
    """
    if prefix_cache_tokens < 0:
        raise UserError(f"prefix_cache_tokens={prefix_cache_tokens} is not accepted: it must be at least 0")
    in_blocks = converted.facts.layout == "block" or is_autoregressive
    if compile_layers and not (in_blocks and _records(converted, cuda_graphs)):
        raise UserError("compile_layers is for block models whose passes are recorded, on a GPU: leave it out")
    denoising: Engine
    if in_blocks:
        denoising = _block_engine(converted, max_rows, max_length, cuda_graphs, is_brief, compile_layers)
    elif cuda_graphs:
        raise UserError(f"cuda_graphs are for models of layout 'block'; this one's is '{converted.facts.layout}'")
    else:
        denoising = RowEngine(converted, max_rows=max_rows, max_length=max_length)

    def make_speculative() -> SpeculativeEngine:
        return SpeculativeEngine(
            converted,
            max_rows=max_rows,
            max_length=max_length,
            prefix_cache_tokens=prefix_cache_tokens,
            record=CudaGraphs(PATIENCE) if _records(converted, cuda_graphs) else None,
        )

    return _BySettings(converted, denoising, make_speculative)


def write(converted: Converted, jobs: Sequence[Job], *, batch_size: int, on_step: OnStep | None = None) -> list[Ended]:
    """Writes rows with a new engine, `batch_size` at a time. When a row ends, the next one takes its place.

    Args:
        converted: Model, tokenizer and facts.
        jobs: The rows. A row's result depends neither on the others nor on `batch_size`.
        batch_size: Rows in one forward pass.
        on_step: See `jobs.OnStep`.

    Returns:
        How each row ended, in the order of `jobs`.

    Raises:
        UserError: A row that the model cannot read or the engine cannot write, or a batch size below 1.
    """
    refuse_batch_size(batch_size)
    if not jobs:
        return []
    for job in jobs:
        job.row.check(converted)
    context, block_size = context_length(converted.model.config), converted.facts.block_size or 1
    longest = -(-max(job.row.length for job in jobs) // block_size) * block_size
    max_length = longest if context is None else min(longest, context)
    engine = engine_for(converted, max_rows=min(batch_size, len(jobs)), max_length=max_length, is_brief=True)
    ended = dict(run(engine, jobs, on_step))
    return [ended[index] for index in range(len(jobs))]


def _records(converted: Converted, cuda_graphs: bool | None) -> bool:
    return choices(converted.model.device).records if cuda_graphs is None else cuda_graphs


def _block_engine(
    converted: Converted,
    max_rows: int,
    max_length: int,
    cuda_graphs: bool | None,
    is_brief: bool,
    is_compiled: bool,
) -> BlockEngine:
    def make(**options: Any) -> BlockEngine:
        model, tokenizer, facts = converted
        return BlockEngine(model, facts, max_rows=max_rows, max_length=max_length, tokenizer=tokenizer, **options)

    if not _records(converted, cuda_graphs):
        return make()
    if is_compiled:
        merge_projections(converted.model)
    if is_brief:
        return make(record=CudaGraphs(PATIENCE), is_compiled=is_compiled)
    engine = make(record=CudaGraphs(), is_compiled=is_compiled)
    try:
        engine.record_ahead(settings_for(converted.facts), len(end_token_ids(converted)))
        return engine
    except CannotRecordError as error:
        if cuda_graphs:
            raise UserError(f"{error}; leave cuda_graphs out") from error
        logger.warning("%s; passes run as they are", error)
        return make()


class _BySettings:
    """Two engines as one. Jobs with `speculative` settings go to the second, which is made for the first of them.

    A ticket is twice the ticket of the row's engine, plus one for the second engine.
    """

    def __init__(self, converted: Converted, denoising: Engine, make_speculative: Callable[[], Engine]) -> None:
        self._converted, self._denoising, self._make_speculative = converted, denoising, make_speculative

    @cached_property
    def _speculative(self) -> Engine:
        return self._make_speculative()

    def _engines(self) -> list[Engine]:
        return [self._denoising, *([self._speculative] if "_speculative" in vars(self) else [])]

    @property
    def num_running(self) -> int:
        """Rows that have a place."""
        return sum(engine.num_running for engine in self._engines())

    @property
    def num_waiting(self) -> int:
        """Rows that wait for one."""
        return sum(engine.num_waiting for engine in self._engines())

    def submit(self, job: Job) -> int:
        """Takes a row on and returns its ticket. Raises UserError for a row that cannot be written."""
        refuse_stop_token_ids(job.settings, self._converted)
        which = int(job.settings.speculative)
        engine = self._speculative if which else self._denoising
        return 2 * engine.submit(job) + which

    def cancel(self, ticket: int) -> None:
        """Drops a row, running or waiting."""
        own, which = divmod(ticket, 2)
        for engine in self._engines()[which : which + 1]:
            engine.cancel(own)

    def step(self) -> list[Progress]:
        """Fills free places, runs one pass of each engine that has rows, and reports on every row that took part."""
        return [
            replace(progress, ticket=2 * progress.ticket + which)
            for which, engine in enumerate(self._engines())
            for progress in engine.step()
        ]
