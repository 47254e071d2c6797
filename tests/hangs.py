"""Whatever hangs ends, and prints where each of its threads is.

pytest ends a test after `faulthandler_timeout`. Before that, what the test may be waiting for is ended here.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 300.0
"""After so many seconds a test takes something for hanging. It says nothing about speed: a machine may be busy."""
SECONDS = 900  # longer than any test, on a slow and busy machine too, and shorter than `faulthandler_timeout`


def end_copies() -> None:
    """Ends processes that will be forked from this one if they hang."""
    faulthandler.register(signal.SIGALRM, file=os.dup(2), chain=True)  # after it, the signal ends the process
    os.register_at_fork(after_in_child=lambda: signal.alarm(SECONDS))


@contextmanager
def ended(standard_error: int) -> Iterator[None]:
    """Ends this process if what is inside hangs."""
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=standard_error)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
