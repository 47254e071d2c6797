"""Does the same work on many batches in several processes, with results in order and few batches in progress."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from decausal.errors import UserError

Batch = TypeVar("Batch")
Result = TypeVar("Result")

UNDER_WAY = 2  # batches for each process: the one that it works on, and the next
_work: Callable[[Any], Any]  # in a worker: what it does with each batch


def in_order(
    work: Callable[[Batch], Result], batches: Iterable[Batch], num_proc: int = 1
) -> Iterator[tuple[Batch, Result]]:
    """Yields each batch with what `work` returns for it, in their order.

    Args:
        work: Sent to each process once. In a process that may not have children (a data loader's worker), and with one
            process, it is called here.
        batches: Read as they are needed. At most `UNDER_WAY` of them are held for each process. If reading fails, the
            results of what was read before come first.
        num_proc: Number of processes.

    Raises:
        UserError: `work` raises it, or a process ended before its work was done.
    """
    if num_proc == 1 or multiprocessing.current_process().daemon:
        yield from ((batch, work(batch)) for batch in batches)
        return
    pool = ProcessPoolExecutor(num_proc, initializer=_begin, initargs=(work,))
    try:
        with _quiet_tokenizers():
            pool.submit(os.getpid).result()
        yield from _results(pool, iter(batches), num_proc * UNDER_WAY)
    except BrokenProcessPool:
        raise UserError(
            f"one of the {num_proc} processes that tokenise was ended from outside, perhaps for lack of memory; give a "
            "smaller --dataset_num_proc"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _results(pool: ProcessPoolExecutor, batches: Iterator[Batch], most: int) -> Iterator[tuple[Batch, Any]]:
    under_way: deque[tuple[Batch, Future[Any]]] = deque()
    failure: UserError | None = None
    is_read = False
    while under_way or not is_read:
        while not is_read and len(under_way) < most:
            try:
                batch = next(batches)
            except StopIteration:
                is_read = True
            except UserError as error:
                failure, is_read = error, True
            else:
                under_way.append((batch, pool.submit(_run, batch)))
        if under_way:
            batch, future = under_way.popleft()
            yield batch, future.result()
    if failure is not None:
        raise failure


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as the user wants
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asked for the work ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(batch: Any) -> Any:
    return _work(batch)


@contextmanager
def _quiet_tokenizers() -> Iterator[None]:
    """Keeps tokenizers from warning in each process that is forked from one that has used its threads."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
