"""Runs several runs at the same time: small models gain more from one core each than from sharing all cores."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch

from decausal.compare.arms import ArmRun
from decausal.compare.budget_callback import Event, OnEvent
from decausal.compare.measuring import Measure, prepare
from decausal.compare.settings import CompareSettings
from decausal.compare.training import Planned, RunResult, train
from decausal.provenance import usable_cores
from decausal.reporting import quiet_libraries

SMALL = 100_000_000  # parameters: several students of this size with teachers and optimiser states fit into any memory


def num_workers(settings: CompareSettings, measure: Measure, num_runs: int) -> int:
    """Returns how many runs to train at the same time: as set, or one per core for small models on a CPU."""
    if settings.num_workers is not None:
        return min(settings.num_workers, num_runs)
    if measure.source.device.type != "cpu" or measure.source.num_parameters() > SMALL:
        return 1
    return max(1, min(usable_cores(), num_runs))


def train_all(
    plan: Sequence[Planned], measure: Measure, on_event: OnEvent, *, workers: int, overwrite: bool
) -> Iterator[RunResult]:
    """Trains all runs and yields each when it is finished.

    Raises:
        UserError: As `train`. The other runs then stop at their next step, and can be continued later.
    """
    if workers == 1:
        for planned in plan:
            yield train(planned, measure, on_event, overwrite=overwrite)
        return
    context = _clean_processes()
    threads = max(1, usable_cores() // workers)
    events, stop = context.SimpleQueue(), context.Event()
    initial = (measure.settings, plan[0].run, events, stop, threads)
    with (
        ProcessPoolExecutor(workers, mp_context=context, initializer=_initialise, initargs=initial) as pool,
        _passed_on(events, on_event),
    ):
        waiting: set[Future[RunResult]] = {pool.submit(_train, planned, overwrite) for planned in plan}
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BaseException:
            stop.set()
            raise
        finally:
            for future in waiting:
                future.cancel()


def _clean_processes() -> Any:
    """Returns a way to start processes that are not copies of this one, whose torch threads would hang in a copy.

    On Linux they are copies of a process that has only done the slow imports, which they share.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class _Worker:
    """What a worker's process keeps between runs."""

    measure: Measure
    events: Any
    stop: Any


def _initialise(settings: CompareSettings, run: ArmRun, events: Any, stop: Any, threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _Worker.events, _Worker.stop = events, stop
    with quiet_libraries():
        _Worker.measure = prepare(settings, run)


def _end_with_parent() -> None:
    """Ends this process when the comparison is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train(planned: Planned, overwrite: bool) -> RunResult:
    with quiet_libraries():
        return train(planned, _Worker.measure, _tell, overwrite=overwrite)


def _tell(event: Event) -> None:
    if _Worker.stop.is_set():
        raise KeyboardInterrupt
    _Worker.events.put(event)


@contextmanager
def _passed_on(events: Any, on_event: OnEvent) -> Iterator[None]:
    """Passes the workers' events on from a thread of this process."""

    def pass_on() -> None:
        while (event := events.get()) is not None:
            on_event(event)

    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        events.put(None)
        thread.join()
