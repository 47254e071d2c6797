"""Runs a model's Python program in a child process that can do little harm, and says whether it succeeded.

On Linux it limits processor and wall-clock time, memory, size and number of files, and the content of its folder. A
seccomp filter forbids new processes, sockets and signals to others. Landlock, if the kernel has it, forbids writing
outside its folder. The environment is empty. None of this needs privileges. It protects against what models write by
accident, but it is not a prison: the program can still read its user's files, and faults of the kernel are not
contained. `enforced` tests which limits hold on this machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from decausal.errors import UserError

FENCE = Path(__file__).with_name("fence.py")
TICK = 0.02


@dataclass(frozen=True)
class Limits:
    """The limits of a program.

    Attributes:
        seconds: Wall-clock and processor time.
        memory: Bytes of address space.
        disk: Bytes of all files together, and of one file.
        files: Open files.
    """

    seconds: float = 10.0
    memory: int = 1 << 30
    disk: int = 16 << 20
    files: int = 64


@dataclass(frozen=True)
class Ending:
    """How a program ended.

    Attributes:
        passed: Whether it ran to its end.
        reason: "passed", "failed", "out of time" or "out of disk".
        error: The end of its standard error.
    """

    passed: bool
    reason: str
    error: str = ""


def run_contained(program: str, limits: Limits | None = None) -> Ending:
    """Runs a program until it ends or reaches a limit.

    Args:
        program: Python source code.
        limits: The limits. None: the defaults.

    Raises:
        UserError: The operating system is not Linux.
    """
    limits = limits or Limits()
    if not sys.platform.startswith("linux"):
        raise UserError("programs of models are run on Linux only: elsewhere their processes cannot be fenced in")
    with tempfile.TemporaryDirectory(prefix="decausal-run-") as folder, _child(program, Path(folder), limits) as child:
        reason = _watched(child, Path(folder), limits)
        error = (Path(folder) / "error").read_bytes()[-2000:].decode(errors="replace")
        if reason is not None:
            return Ending(False, reason, error)
        has_passed = child.returncode == 0 and (Path(folder) / "passed").read_bytes() == b"passed"
        return Ending(has_passed, "passed" if has_passed else "failed", error)


def run_all(programs: list[str], limits: Limits | None = None, workers: int | None = None) -> list[Ending]:
    """Runs programs in parallel, by default one per core. Returns how they ended, in order."""
    workers = workers or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda program: run_contained(program, limits), programs))


@contextmanager
def _child(program: str, folder: Path, limits: Limits) -> Iterator[subprocess.Popen[bytes]]:
    (folder / "program.py").write_text(program, encoding="utf-8", errors="surrogateescape")
    (folder / "files").mkdir()
    numbers = [str(int(limits.seconds) + 1), str(limits.memory), str(limits.disk), str(limits.files)]
    # -I -S: without the user's site, paths and environment. The path is absolute since the child's folder is elsewhere.
    command = [sys.executable, "-I", "-S", "-B", str(FENCE), *numbers]
    with open(folder / "error", "wb") as error:
        child = subprocess.Popen(
            command,
            cwd=folder / "files",
            env={},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=error,
            start_new_session=True,
            close_fds=True,
        )
    try:
        yield child
    finally:
        _kill(child)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Ends the child and its session."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _watched(child: subprocess.Popen[bytes], folder: Path, limits: Limits) -> str | None:
    """Waits for the child. Returns why it was ended, or None if it ended by itself."""
    deadline = time.monotonic() + limits.seconds
    while True:
        try:
            child.wait(TICK)
            return None
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                return "out of time"
            if _size(folder) > limits.disk:
                return "out of disk"


def _size(folder: Path) -> int:
    """Returns the bytes of a folder's files. Files that have disappeared count as nothing."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
            except OSError:  # it has disappeared
                continue
    return total


_TRIALS = {
    "processor and wall-clock time": "while True: pass",
    "memory": "held = bytearray(2 << 30)",
    "size of files": "open('file', 'wb').write(bytes(64 << 20))",
    "no new processes": "import os; os.fork()",
    "no network": "import socket; socket.socket()",
    "no signals to other processes": "import os; os.kill(os.getppid(), 0)",
    "no writing outside its folder": "open({outside!r}, 'w')",
    "empty environment": "import os; assert os.environ.keys() - {{'LC_CTYPE'}}",
}


@cache
def enforced() -> dict[str, bool]:
    """Returns which limits hold on this machine, by trying to break them."""
    with tempfile.TemporaryDirectory() as folder:
        outside = str(Path(folder) / "outside")
        programs = [program.format(outside=outside) for program in _TRIALS.values()]
        endings = run_all(programs, Limits(seconds=2.0))
    return {name: not ending.passed for name, ending in zip(_TRIALS, endings, strict=True)}
