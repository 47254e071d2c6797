"""`decausal chat` as a user runs it, on a terminal; and the recordings that are asked for on the command line."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from decausal.cli import main
from decausal.models.adapt import adapt
from decausal.models.checkpoint import Converted, save_converted
from decausal.sampling.generate import generate
from decausal.sampling.model import load
from tests.families import EOS_ID, FAMILIES, tiny_tokenizer
from tests.hangs import PATIENCE
from tests.runs import environment
from tests.sampling.stand_ins import conversion_facts

ON_A_TERMINAL = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell in the background has its children ignore
terminal = os.open(sys.argv[1], os.O_RDWR)  # the first that a new session opens is its own
for stream in range(3):
    os.dup2(terminal, stream)
from decausal.cli import main
sys.exit(main(sys.argv[2:]))
"""
INTERRUPT, END = "\x03", "\x04"
LONG = 1500


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        variables = environment() | {"TERM": "dumb"}
        command = [sys.executable, "-c", ON_A_TERMINAL, os.ttyname(theirs), *arguments]
        self.program = subprocess.Popen(command, env=variables, start_new_session=True)
        self._theirs, self._seen = theirs, ""

    def until(self, text: str, seconds: float = PATIENCE) -> str:
        """Returns what is shown up to and with `text`, from where the last call ended."""
        deadline = time.monotonic() + seconds
        while text not in self._seen:
            assert time.monotonic() < deadline, f"no {text!r} in {self._seen!r}"
            if select.select([self._ours], [], [], 0.1)[0]:
                self._seen += os.read(self._ours, 65536).decode(errors="replace").replace("\r\n", "\n")
        shown, _, self._seen = self._seen.partition(text)
        return shown + text

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def say(self, line: str) -> str:
        """Types a line at the prompt; returns what is shown before the next one."""
        self.type(f"{line}\n")
        self.until(f"{line}\n")
        return self.until("\n> ").removesuffix("\n> ")

    def interrupt(self) -> str:
        """Presses Ctrl-C at the prompt, again if need be: Python hears none while it is about to wait for a key."""
        for _ in range(30):
            self.type(INTERRUPT)
            with contextlib.suppress(AssertionError):
                return self.until("\n> ", seconds=2)
        raise AssertionError(f"Ctrl-C is not heard: {self._seen!r}")

    def close(self) -> None:
        self.program.kill()
        self.program.wait()
        os.close(self._ours)
        os.close(self._theirs)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network, tokenizer = FAMILIES["qwen3"](max_position_embeddings=2 * LONG), tiny_tokenizer(chat=True)
    facts = conversion_facts(adapt(network, tokenizer), shift=1)
    weight = network.get_output_embeddings().weight.data
    weight *= 4
    weight[EOS_ID] = 0  # answers are as long as they may be
    found = tmp_path_factory.mktemp("chat") / "model"
    save_converted(found, network, tokenizer, facts)
    return found


@pytest.fixture
def terminal(directory: Path) -> Iterator[Terminal]:
    found = Terminal("chat", str(directory), "--max_new_tokens", "8", "--temperature", "1")
    yield found
    found.close()


def test_a_conversation_on_a_terminal(terminal: Terminal, directory: Path) -> None:
    assert "/help lists the commands" in terminal.until("> ")
    model = load(directory, device="cpu").converted
    assert terminal.say("/seed 5") == "[seed 5]"
    assert terminal.say("/steps 3") == "[num_steps 3]"
    first = terminal.say("hi")
    assert first == shown(model, num_steps=3)
    assert terminal.say("/undo") == "[the last turn is taken back]"
    assert terminal.say("/threshold 0.7") == "[threshold 0.7]"
    assert terminal.say("hi") == shown(model, threshold=0.7)
    assert terminal.say("/undo") == "[the last turn is taken back]"

    for setting in (f"/steps {LONG}", f"/max_new_tokens {LONG}", "/order left_to_right"):
        terminal.say(setting)
    terminal.type("hi\n")
    terminal.until("hi\n")
    time.sleep(0.5)
    terminal.type(INTERRUPT)
    assert "[stopped; /undo takes the turn back]" in terminal.until("\n> ")
    assert terminal.say("/history").startswith("user: hi\nassistant:")
    assert "[/quit or Ctrl-D leaves]" in terminal.interrupt()
    terminal.type(END)
    assert terminal.program.wait(timeout=PATIENCE) == 0


def shown(model: Converted, **options: float) -> str:
    """The answer to "hi" as a terminal shows it."""
    text = generate(model, "hi", chat=True, max_new_tokens=8, temperature=1.0, seed=5, **options).text
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


@pytest.mark.parametrize(
    "arguments",
    [["generate", "{}", "hi", "--max_new_tokens", "5"], ["infill", "{}", "--text", "x = {gap:3}\n"]],
    ids=["generate", "infill"],
)
def test_a_recording_is_written_beside_the_text(
    arguments: list[str], directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(directory) if argument == "{}" else argument for argument in arguments] + ["--num_steps", "3"]
    assert main(arguments) == 0
    plain = capsys.readouterr().out
    for name in ("out.svg", "out.gif"):
        assert main([*arguments, "--record", str(tmp_path / name)]) == 0
        assert capsys.readouterr().out == plain
    assert ElementTree.parse(tmp_path / "out.svg").getroot().tag.endswith("svg")
    with Image.open(tmp_path / "out.gif") as animation:
        assert animation.n_frames >= 3
