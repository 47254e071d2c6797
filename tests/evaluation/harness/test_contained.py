"""Programs of models end, whatever they do, and leave nothing after."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from decausal.evaluation.harness.contained import Limits, enforced, run_all, run_contained

LIMITS = Limits(seconds=60.0)  # of which a busy machine may take some
HANGS = {
    "hangs": "while True: pass",
    "sleeps": "import time; time.sleep(600)",
    "ignores_signals": """
import signal
for number in range(1, 60):
    try:
        signal.signal(number, lambda *_: None)
    except (OSError, ValueError):
        pass
while True:
    pass
""",
    "holds_on_with_a_thread": """
import threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
time.sleep(600)
""",
}
FAILS = {
    "forks": "import os\nos.fork()",
    "forks_without_end": "import os\nwhile True:\n  try: os.fork()\n  except PermissionError: raise",
    "starts_a_command": "import subprocess\nsubprocess.run(['true'], check=True)",
    "replaces_itself": "import os\nos.execv('/bin/true', ['true'])",
    "fills_memory": "held = []\nwhile True: held.append(bytearray(1 << 24))",
    "fills_a_file": "file = open('a', 'wb')\nwhile True: file.write(bytes(1 << 20))",
    "fills_many_files": "i = 0\nwhile True:\n  i += 1\n  open(str(i), 'wb').write(bytes(1 << 20))",
    "opens_many_files": "held = [open('/dev/null') for _ in range(500)]",
    "opens_a_socket": "import socket\nsocket.socket(socket.AF_INET)",
    "opens_a_local_socket": "import socket\nsocket.socketpair()",
    "kills_its_parent": "import os\nos.kill(os.getppid(), 9)",
    "ends_early": "import sys\nsys.exit(0)",
    "ends_early_and_hard": "import os\nos._exit(0)",
    "is_wrong": "assert 1 + 1 == 3",
    "is_no_python": "def f(:",
    "reads_input": "input()",
    "reads_the_environment": "import os\nassert os.environ.get('HOME') or os.environ.get('PATH')",
    "imports_what_is_installed": "import torch",
    "holds_a_zero_byte": "x = '\0'",
}
PASSES = {
    "says_nothing": "",
    "computes": "import math, re, json, random, collections, hashlib\nassert math.gcd(12, 18) == 6",
    "is_main": "assert __name__ == '__main__'",
    "uses_threads": "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
    "writes_in_its_folder": "import os\nopen('f', 'w').write('x')\nos.rename('f', 'g')\nos.mkdir('d')\nos.remove('g')",
    "holds_any_text": "# é 🙂\nassert 'é' == '\\u00e9'",
}


def test_programs_that_do_not_end_are_ended() -> None:
    start = time.monotonic()
    endings = run_all(list(HANGS.values()), Limits(seconds=1.0), workers=len(HANGS))
    assert [ending.reason for ending in endings] == ["out of time"] * len(HANGS)
    assert time.monotonic() - start < 120


def test_programs_that_do_what_they_may_not_fail() -> None:
    endings = dict(zip(FAILS, run_all(list(FAILS.values()), LIMITS), strict=True))
    assert {name: ending.passed for name, ending in endings.items()} == dict.fromkeys(FAILS, False)
    for name in ("forks", "starts_a_command", "replaces_itself", "opens_a_socket", "kills_its_parent"):
        assert "PermissionError" in endings[name].error, name
    assert "MemoryError" in endings["fills_memory"].error
    assert endings["fills_many_files"].reason == "out of disk"


def test_programs_that_do_nothing_wrong_pass() -> None:
    endings = dict(zip(PASSES, run_all(list(PASSES.values()), LIMITS), strict=True))
    assert {name: (ending.passed, ending.error) for name, ending in endings.items()} == dict.fromkeys(
        PASSES, (True, "")
    )


@pytest.mark.parametrize(
    "deed",
    [
        "open({file!r}, 'w')",
        "open({file!r}, 'a').write('x')",
        "import os\nos.remove({file!r})",
        "import os\nos.rename({file!r}, 'mine')",
        "import os\nos.chmod({file!r}, 0)",
        "import os\nos.truncate({file!r}, 0)",
        "import os\nos.link({file!r}, 'mine')\nopen('mine', 'w')",
        "import os\nos.symlink({file!r}, 'mine')\nopen('mine', 'w')",
        "open('../passed', 'w').write('passed')\nassert False",
    ],
    ids=lambda deed: deed.splitlines()[-1].partition("(")[0],
)
def test_what_is_outside_stays_as_it_is(deed: str, tmp_path: Path) -> None:
    assert enforced()["no writing outside its folder"], "this kernel has no Landlock"
    file = tmp_path / "file"
    file.write_text("kept")
    before = file.stat()
    assert not run_contained(deed.format(file=str(file)), LIMITS).passed
    after = file.stat()
    assert file.read_text() == "kept"
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


def test_no_folder_and_no_process_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = psutil.Process().children(recursive=True)  # other tests of this process may have some
    run_contained("open('f', 'w').write('x')", LIMITS)
    run_contained("import time; time.sleep(600)", Limits(seconds=0.5))
    assert list(tmp_path.iterdir()) == []
    assert not set(psutil.Process().children(recursive=True)) - set(before)


def test_what_is_enforced_is_found_by_trying() -> None:
    found = enforced()
    always = {"processor and wall-clock time", "memory", "size of files", "empty environment"}
    assert always <= {name for name, holds in found.items() if holds}
    assert found["no network"] == found["no new processes"]  # one filter forbids both
