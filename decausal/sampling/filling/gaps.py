"""Texts with gaps, as users write them: a list of strings and lengths, or one string with `{gap}` in it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from decausal.errors import UserError
from decausal.models.facts import ConversionFacts

Piece = str | int | None
"""A string is given text; an integer a gap of so many tokens; None a gap of unknown length."""

_MARK = re.compile(r"(\\*)\{gap(?::([^{}\n]*))?\}")


def parse_gaps(template: str) -> list[Piece]:
    r"""Reads `{gap}` as a gap of unknown length and `{gap:4}` as one of 4 tokens.

    Everything else is text, including other braces. A literal `{gap}` is written `\{gap}`. Two backslashes directly
    before a gap stand for one.

    Example:
        >>> parse_gaps("def f(x):{gap} return{gap:4}")
        ['def f(x):', None, ' return', 4]

    Raises:
        UserError: There is no gap, or a length is not an integer of at least 1.
    """
    pieces: list[Piece] = [""]
    end = 0
    for match in _MARK.finditer(template):
        backslashes, length = match.groups()
        text = template[end : match.start()] + "\\" * (len(backslashes) // 2)
        end = match.end()
        if len(backslashes) % 2:
            pieces[-1] += text + match.group().lstrip("\\")
        else:
            pieces[-1] += text
            pieces += [_length(match.group(), length), ""]
    pieces[-1] += template[end:]
    if len(pieces) == 1:
        raise UserError("the text has no gap: write {gap}, or {gap:4} for a gap of 4 tokens, where text is missing")
    return [piece for piece in pieces if piece != ""]


def _length(mark: str, length: str | None) -> int | None:
    if length is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", length) or int(length) < 1:
        raise UserError(
            f"the gap {mark} is not accepted: write {{gap}}, or {{gap:4}} for a gap of 4 tokens, and \\{{gap}} for "
            "these characters themselves"
        )
    return int(length)


def split_gaps(pieces: Sequence[Piece], name: str) -> tuple[list[str], list[int | None]]:
    """Returns the given texts (one more than gaps, some may be empty) and the lengths of the gaps.

    Raises:
        UserError: There is no gap, two gaps without text between them, a length below 1, or a piece of another type.
    """
    texts: list[list[str]] = [[]]
    lengths: list[int | None] = []
    for piece in pieces:
        if isinstance(piece, str):
            texts[-1] += [piece] if piece else []
            continue
        if piece is not None and (isinstance(piece, bool) or not isinstance(piece, int) or piece < 1):
            raise UserError(
                f"{name} holds the gap {piece!r}, which is not accepted: a gap is an integer of at least 1, or None "
                "for an unknown length; all else is text"
            )
        if lengths and not texts[-1]:
            raise UserError(f"{name} has two gaps without text between them: make them one")
        lengths.append(piece)
        texts.append([])
    if not lengths:
        raise UserError(f"{name} has no gap: put an integer, or None for an unknown length, where text is missing")
    return ["".join(text) for text in texts], lengths


def refuse_layout(facts: ConversionFacts) -> None:
    """Refuses models whose gaps do not see what follows them.

    Raises:
        UserError: The layout is not bidirectional.
    """
    if facts.layout == "causal":
        raise UserError(
            "this model has layout 'causal': a gap cannot see the suffix after it; infill and edit need layout "
            "'bidirectional'"
        )
    if facts.only_drafts:
        raise UserError(
            "this model's masks draft what it then verifies from left to right: a gap cannot see the text after it; "
            "infill and edit need a model of layout 'bidirectional', such as the recipes repr-align, mdm and "
            "diffullama make"
        )
    if facts.layout == "block":
        raise UserError(
            f"this model has layout 'block' with block_size {facts.block_size}: a gap sees text after it only to the "
            f"end of its own block, {facts.block_size - 1} tokens at most; infill and edit need a model of layout "
            "'bidirectional', such as the recipes repr-align, mdm and diffullama make"
        )
