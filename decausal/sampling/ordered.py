"""Runs any number of jobs through one engine, and yields the results in the order of the jobs, in bounded memory."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TypeVar

from decausal.errors import UserError
from decausal.sampling.jobs import Ended, Engine, Job

BEGUN_PER_PLACE = 64
"""Rows in progress or not yet yielded, for each place in a pass. This is how far others may run ahead of a slow one."""

Tag = TypeVar("Tag")


def in_order(
    engine: Engine, wanted: Iterable[tuple[Tag, Job | UserError]], max_rows: int
) -> Generator[tuple[Tag, Ended | UserError], None, None]:
    """Writes rows as places become free. Yields how each one ended, with the object that came with its job.

    If the iterator is closed early, rows in progress are cancelled.

    Args:
        engine: The engine, which writes nothing else in the meantime.
        wanted: Jobs, or errors to pass on in their places. They are taken as places become free.
        max_rows: Rows in one pass of the engine.

    Yields:
        The object that came with a job, and how the job ended, or why the engine refused it.
    """
    source, is_exhausted = iter(wanted), False
    running: dict[int, tuple[int, Tag]] = {}
    finished: dict[int, tuple[Tag, Ended | UserError]] = {}
    num_taken = num_yielded = 0
    try:
        while running or not is_exhausted:
            # Just enough rows wait for no place to stay empty during a pass.
            most = num_yielded + BEGUN_PER_PLACE * max_rows
            while not is_exhausted and engine.num_waiting < max_rows and num_taken < most:
                try:
                    tag, job = next(source)
                except StopIteration:
                    is_exhausted = True
                    break
                try:
                    if isinstance(job, UserError):
                        raise job
                    running[engine.submit(job)] = num_taken, tag
                except UserError as error:
                    finished[num_taken] = tag, error
                num_taken += 1
            for progress in engine.step() if running else ():
                if progress.ended is not None:
                    index, tag = running.pop(progress.ticket)
                    finished[index] = tag, progress.ended
            while num_yielded in finished:
                ended = finished.pop(num_yielded)
                num_yielded += 1
                yield ended
    finally:
        for ticket in running:
            engine.cancel(ticket)
