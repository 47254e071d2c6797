"""Tasks that move characters: sorting, reversing, look-up, closing brackets. Their completions have no steps."""

from __future__ import annotations

from random import Random
from string import ascii_lowercase, ascii_uppercase

CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}
VALUE_LENGTH = 4


def sorting(random: Random, size: int) -> tuple[str, str]:
    """`sort qbzme:` gives `bemqz`; `size` letters, which may repeat."""
    letters = _letters(random, size)
    return f"sort {letters}:", "".join(sorted(letters))


def reversing(random: Random, size: int) -> tuple[str, str]:
    """`reverse hqzrt:` gives `trzqh`; `size` letters."""
    letters = _letters(random, size)
    return f"reverse {letters}:", letters[::-1]


def lookup(random: Random, size: int) -> tuple[str, str]:
    """`look up Kxqzy Bbcde; K` gives `xqzy`; `size` pairs of a key, which is a capital letter, and its value."""
    keys = random.sample(ascii_uppercase, size)
    values = [_letters(random, VALUE_LENGTH) for _ in keys]
    wanted = random.randrange(size)
    pairs = " ".join(key + value for key, value in zip(keys, values, strict=True))
    return f"look up {pairs}; {keys[wanted]}", values[wanted]


def brackets(random: Random, size: int) -> tuple[str, str]:
    """`close ([]{:` gives `})`; `size` brackets stay open, and up to as many have been closed already."""
    num_to_close = random.randint(0, size)
    num_to_open = size + num_to_close
    text, is_open = "", ""
    while num_to_open or num_to_close:
        may_close = is_open and num_to_close
        if may_close and (not num_to_open or random.random() < 0.5):
            text += CLOSING[is_open[-1]]
            is_open = is_open[:-1]
            num_to_close -= 1
        else:
            is_open += random.choice("([{<")
            text += is_open[-1]
            num_to_open -= 1
    return f"close {text}:", "".join(CLOSING[bracket] for bracket in reversed(is_open))


def _letters(random: Random, count: int) -> str:
    return "".join(random.choice(ascii_lowercase) for _ in range(count))
