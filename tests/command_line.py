"""A process that runs command lines one after the other: it imports once, under an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests import hangs


class Ended(NamedTuple):
    """How a command line ended."""

    code: int
    out: str
    err: str


class CommandLine:
    """The process, waiting for command lines."""

    def __init__(self, directory: Path, **variables: str) -> None:
        from tests.runs import environment  # here, so that the process itself imports nothing before its first command

        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.command_line"],
            env=environment(**variables),
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: object) -> Ended:
        """Runs `decausal` with these arguments."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        self._process.stdin.flush()
        return Ended(*json.loads(self._process.stdout.readline()))

    def __enter__(self) -> CommandLine:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def _serve() -> None:
    standard_error = os.dup(2)
    with os.fdopen(os.dup(1), "w") as answers:
        for line in sys.stdin:
            with hangs.ended(standard_error):
                ended = _ended(json.loads(line))
            print(json.dumps(ended), file=answers, flush=True)


def _ended(arguments: list[str]) -> Ended:
    """Runs one, with all that is written to the process's own output, by libraries too, in files."""
    from decausal.cli import main

    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        code = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        out.seek(0)
        err.seek(0)
        return Ended(code, out.read(), err.read())


if __name__ == "__main__":
    _serve()
