"""What kills and full disks leave of a directory: one run, stopped at every write, rename and removal under it.

The run goes in a copy of this process. Before each such call the directory as it is then is kept: what SIGKILL leaves.
A copy of the copy goes on with a disk that has just become full, until it ends in whatever way; what it leaves is kept,
too, and the directory is put back. So all that can go wrong in a run costs little more than the run.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import re
import resource
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from decausal.errors import UserError

State = dict[str, bytes | None]
"""Files by their paths in the directory; None for directories."""
_MAKES = ("open", "os.mkdir", "os.rename")
_REMOVES = ("os.remove", "os.rmdir")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Fault:
    """A call under the directory, and what it left.

    Attributes:
        call: as `sys.audit` names it.
        path: what was written, renamed or removed, in the directory.
        killed: what was there before the call.
        full: what a run leaves whose disk is full from this call on; None where the call needs no room.
        message: what that run said.
    """

    call: str
    path: str
    killed: State
    full: State | None = None
    message: str = ""


def faults_of(function: Callable[[], Any], directory: Path, report: Path) -> list[Fault]:
    """Runs `function` in a copy of this process and returns all that could have gone wrong under `directory`.

    Raises:
        AssertionError: the function itself failed.
    """
    pid = os.fork()
    if not pid:
        _watch(function, directory, report)
    _, status = os.waitpid(pid, 0)
    found, failure = pickle.loads(report.read_bytes())
    assert (os.waitstatus_to_exitcode(status), failure) == (0, "")
    return found


def state_of(directory: Path) -> State:
    """Reads a directory; empty where there is none."""
    return {
        path.relative_to(directory).as_posix(): None if path.is_dir() else path.read_bytes()
        for path in sorted(directory.rglob("*"))
    }


def put_back(state: State, directory: Path) -> None:
    """Makes a directory what it was; files that are as they were are not touched, for somebody may hold them open."""
    now = state_of(directory)
    for name in sorted(now.keys() - state.keys(), reverse=True):
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in sorted(state.items()):
        if content is None:
            (directory / name).mkdir(exist_ok=True)
        elif now.get(name) != content:
            (directory / name).write_bytes(content)


def digest(state: State) -> str:
    """The same for states that differ in the numbers of processes alone."""
    parts = [(re.sub(r"tmp\d+", "tmp", name), content) for name, content in sorted(state.items())]
    return hashlib.sha256(pickle.dumps(parts)).hexdigest()


def _watch(function: Callable[[], Any], directory: Path, report: Path) -> None:
    """Never returns."""
    torch.set_num_threads(1)  # those of the first process are not in the copy
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    watcher, failure = _Watcher(directory), ""
    sys.addaudithook(watcher)
    _announce_foreign_writers()
    try:
        function()
    except UserError as error:
        failure = str(error)
    except BaseException:
        failure = traceback.format_exc()
    watcher.is_busy = True
    if watcher.reported is not None:
        os.write(watcher.reported, failure.encode())
    else:
        report.write_bytes(pickle.dumps((watcher.faults, failure)))
    os._exit(0)


class _Watcher:
    """The hook. In the process whose disk is full `reported` is the pipe to say how it ended."""

    def __init__(self, directory: Path) -> None:
        self.directory = os.fspath(directory.absolute())
        self.faults: list[Fault] = []
        self.is_busy = False
        self.reported: int | None = None

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.is_busy or event not in (*_MAKES, *_REMOVES):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & _WRITES):
            return
        if event == "os.mkdir" and os.path.isdir(args[0]):  # no more than a question
            return
        self.is_busy = True
        try:
            path = _absolute(args[0], args[-1] if event in ("os.mkdir", *_REMOVES) else -1)
            if not path.startswith(self.directory):
                return
            if self.reported is None:
                self._note(event, os.path.relpath(path, self.directory))
            elif event in ("open", "os.mkdir"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        finally:
            self.is_busy = False

    def _note(self, event: str, path: str) -> None:
        before = state_of(Path(self.directory))
        if event in _REMOVES:
            self.faults.append(Fault(event, path, before))
            return
        source, reported = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(source)
            self.reported = reported
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # for what libraries write that are not Python
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        os.close(reported)
        with os.fdopen(source, "rb") as pipe:
            message = pipe.read().decode()
        os.waitpid(pid, 0)
        self.faults.append(Fault(event, path, before, state_of(Path(self.directory)), message))
        put_back(before, Path(self.directory))


def _absolute(path: Any, directory: int) -> str:
    if isinstance(path, int):  # an open file
        return ""
    path = os.fsdecode(path)
    if isinstance(directory, int) and directory >= 0:
        return os.path.join(os.readlink(f"/proc/self/fd/{directory}"), path)
    return os.path.abspath(path)


def _announce_foreign_writers() -> None:
    """Writers in Rust and C++ open files that Python does not hear of; they are announced as `open` is."""
    import safetensors.torch

    def announced(write: Callable[..., Any], place: int) -> Callable[..., Any]:
        def announce(*args: Any, **kwargs: Any) -> Any:
            target = args[place] if len(args) > place else kwargs.get("filename", kwargs.get("f"))
            if isinstance(target, str | os.PathLike):
                sys.audit("open", os.fspath(target), "wb", os.O_WRONLY | os.O_CREAT)
            return write(*args, **kwargs)

        return announce

    safetensors.torch.serialize_file = announced(safetensors.torch.serialize_file, 1)
    torch.save = announced(torch.save, 1)
