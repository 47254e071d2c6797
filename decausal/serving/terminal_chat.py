"""The loop of `decausal chat`: each line is a question or a command, and answers are printed as they come."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from decausal.errors import UserError, nearest
from decausal.sampling.settings import ALIASES, SamplerSettings
from decausal.serving.conversation import Conversation

HELP = """\
/seed N  /steps N  /threshold X  /temperature X   how the next answer is written; so for every sampler setting
/settings   all of them              /history   what was said
/undo       take the last turn back  /clear     forget all turns
/quit       leave, as Ctrl-D does    Ctrl-C     stop the answer; // begins a message with a slash
"""
COMMANDS = ("help", "settings", "history", "undo", "clear", "quit")
_INVISIBLE = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Characters that a terminal would obey instead of showing."""


class TerminalChat:
    """Reads lines until the input ends.

    Args:
        conversation: The conversation.
        read: Returns the next line without its end; raises EOFError at the end of the input.
        write: Shows text immediately.
    """

    def __init__(self, conversation: Conversation, read: Callable[[], str], write: Callable[[str], Any]) -> None:
        self._conversation, self._read, self._write = conversation, read, write

    def run(self) -> None:
        """Talks until /quit or the end of the input."""
        while True:
            try:
                line = self._read().strip()
                if line == "/quit":
                    return
                self._take(line)
            except EOFError:
                self._write("\n")
                return
            except KeyboardInterrupt:
                self._write("\n[/quit or Ctrl-D leaves]\n")
            except UserError as error:
                self._note(str(error))

    def _take(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            name, _, value = line[1:].partition(" ")
            self._obey(name, value.strip())
        elif line:
            self._answer(line.removeprefix("/") if line.startswith("//") else line)

    def _answer(self, question: str) -> None:
        conversation = self._conversation
        answer = conversation.ask(question)
        is_interrupted = False

        def interrupt() -> None:
            nonlocal is_interrupted
            is_interrupted = True
            conversation.stop()

        try:
            with _interrupts(interrupt):
                for piece in answer:
                    self._write(piece.translate(_INVISIBLE))
        except KeyboardInterrupt:  # signals cannot be caught here
            is_interrupted = True
        finally:
            answer.close()
        self._write("\n")
        if conversation.drafts is not None:
            self._note(str(conversation.drafts))
        if is_interrupted:
            self._note("stopped; /undo takes the turn back")
        if conversation.num_left_out:
            self._note(f"the context is full: the oldest {conversation.num_left_out // 2} turns were left out")

    def _obey(self, name: str, value: str) -> None:
        conversation = self._conversation
        settings = {*SamplerSettings.__dataclass_fields__, *ALIASES}
        if name in settings:
            self._set(ALIASES.get(name, name), value)
        elif name == "help":
            self._write(HELP)
        elif name == "settings":
            self._write("".join(f"{name} {value}\n" for name, value in vars(conversation.settings).items()))
        elif name == "history":
            for message in conversation.messages:
                self._write(f"{message['role']}: {message['content']}\n".translate(_INVISIBLE))
        elif name == "undo":
            self._note("the last turn is taken back" if conversation.undo() else "there is no turn to take back")
        elif name == "clear":
            conversation.clear()
            self._note("all turns are forgotten")
        else:
            known = {*COMMANDS, *settings}
            raise UserError(f"unknown command '/{name}'{nearest(name, known)} /help lists them")

    def _set(self, name: str, value: str) -> None:
        if value:
            self._conversation.set(**{name: _parsed(value)})
        self._note(f"{name} {getattr(self._conversation.settings, name)}")

    def _note(self, text: str) -> None:
        self._write(f"[{text}]\n")


def _parsed(value: str) -> Any:
    """Returns a number, true, false or none if the word is one, else the word."""
    try:
        return json.loads({"none": "null", "None": "null", "True": "true", "False": "false"}.get(value, value))
    except ValueError:
        return value


@contextmanager
def _interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Makes Ctrl-C call `stop`. Pressed again, it interrupts. Signals only reach the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
