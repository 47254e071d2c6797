"""The exception that users see as a single line instead of a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """Bad input: the message says what was wrong, where, and what to do.

    The command line prints it on one line and exits with code 2. Library callers catch it like any exception.
    """


LONGEST_WORD = 200
LONGEST_LINE = 400  # of what a library says: some list every weight of a model


def nearest(word: str, accepted: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the accepted word most like `word`, or ``""`` when none is close."""
    if len(word) > LONGEST_WORD:  # comparing takes time and memory by its length
        return ""
    close = difflib.get_close_matches(word, list(accepted), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def one_of(word: str, accepted: Sequence[str], called: str) -> str:
    """Returns the end of a message about an unknown word: "; did you mean 'x'? Arms: x, y", or "; arms: x, y"."""
    hint, listed = nearest(word, accepted), ", ".join(accepted)
    return f"{hint} {called.capitalize()}: {listed}" if hint else f"; {called}: {listed}"


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, cut if it is long, or the name of its type if there is no
    message. A line that only announces the error's cause gives way to that."""
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    if line.endswith(":") and isinstance(error.__cause__, Exception):
        return first_line(error.__cause__)
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} ..."


def refuse_broken_text(text: str, where: str) -> None:
    """Raises UserError for a text with half of a surrogate pair, which no UTF-8 text and no tokenizer can hold.

    JSON writes such halves as "\\ud83d"; Python puts one in place of each byte of a command line that is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        found = f"byte 0x{half - 0xDC00:02x} that is not UTF-8" if 0xDC80 <= half <= 0xDCFF else "half a surrogate pair"
        raise UserError(f"{where}: {found} (character {error.start + 1}); mend or remove this text") from None
