"""A region of a held-out file, chosen by seed, and what a converted model writes there."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate, islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from decausal.data.documents import Record, read_documents
from decausal.sampling.jobs import OnStep
from decausal.sampling.model import DiffusionModel

MOST_DOCUMENTS = 500  # the first documents of a large data set are enough to choose from
LINES_BEFORE, LINES_BEHIND = 9, 5
MOST_GIVEN_TOKENS = 160


@dataclass(frozen=True)
class Gap:
    """Text with a hole.

    Attributes:
        origin: The held-out document.
        prefix: Text before the hole.
        text: The document's own text there.
        suffix: Text after the hole.
        num_tokens: Tokens of `text`.
    """

    origin: str
    prefix: str
    text: str
    suffix: str
    num_tokens: int


@dataclass(frozen=True)
class Filling:
    """What a model wrote into a gap.

    Attributes:
        pieces: The text of each token.
        step_of_piece: The step, from 0, in which it was kept.
        num_forwards: Forward passes.
        num_as_in_file: Tokens that equal the document's, position by position.
    """

    pieces: list[str]
    step_of_piece: list[int]
    num_forwards: int
    num_as_in_file: int

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def choose_gap(
    data: str, tokenizer: PreTrainedTokenizerBase, *, most_tokens: int, context_length: int | None, seed: int
) -> Gap | None:
    """Chooses whole lines of a document, if possible after a line that opens a block (`def f():`).

    Args:
        data: See `decausal.data.documents.read_documents`.
        tokenizer: Counts the tokens.
        most_tokens: The most tokens of the region, which has at least half as many.
        context_length: Tokens that the model can read, or None.
        seed: Chooses document and lines.

    Returns:
        The gap, or None if no document is plain text with short enough lines.
    """
    given = MOST_GIVEN_TOKENS if context_length is None else min(MOST_GIVEN_TOKENS, context_length - most_tokens - 1)
    documents = [record for record in islice(read_documents(data), MOST_DOCUMENTS) if "text" in record]
    documents.sort(key=lambda record: sha256(f"{seed} {record['origin']}".encode()).digest())
    draw, second_choice = random.Random(seed), None
    for record in documents:
        gaps = list(_gaps(record, tokenizer, most_tokens, given))
        of_blocks = [gap for gap in gaps if gap.prefix.rstrip().endswith(":")]
        if of_blocks:
            return draw.choice(of_blocks)
        if gaps and second_choice is None:
            second_choice = draw.choice(gaps)
    return second_choice


def fill(model: DiffusionModel, gap: Gap, on_step: OnStep | None = None) -> Filling:
    """Lets a converted model fill the gap, with the sampler's default settings."""
    written = model.infill(gap.prefix, gap.suffix, gap.num_tokens, on_step=on_step)
    true_ids = _ids(model.tokenizer, gap.text)
    num_equal = sum(ours == theirs for ours, theirs in zip(written.ids, true_ids, strict=False))
    return Filling(_pieces(model.tokenizer, written.ids), written.step_of_token, written.num_forwards, num_equal)


def _gaps(record: Record, tokenizer: Any, most_tokens: int, most_given: int) -> Iterator[Gap]:
    """Yields the gaps of a document: for each line, the longest that begins there and has lines around it."""
    # Each has the line break before it, because tokenizers join a break to the indentation after it. A text that is cut
    # between them has tokens at the cut that the model has rarely seen there.
    lines = re.split(r"(?=\n)", record["text"])
    counts = [len(ids) for ids in tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]]
    for start in range(1, len(lines)):
        end = start + _num_fitting(counts[start:-1], most_tokens)
        while end > start and not lines[end - 1].strip():
            end -= 1
        if end == start or not lines[start].strip() or not lines[start - 1].strip():
            continue
        first = start - _num_fitting(counts[max(start - LINES_BEFORE, 0) : start][::-1], most_given * 2 // 3)
        last = end + _num_fitting(counts[end : end + LINES_BEHIND], most_given - sum(counts[first:start]))
        prefix, text, suffix = (
            "".join(lines[part]) for part in (slice(first, start), slice(start, end), slice(end, last))
        )
        num_tokens, num_given = len(_ids(tokenizer, text)), len(_ids(tokenizer, prefix)) + len(_ids(tokenizer, suffix))
        if prefix and suffix and most_tokens / 2 <= num_tokens <= most_tokens and num_given <= most_given:
            yield Gap(record["origin"], prefix, text, suffix, num_tokens)


def _num_fitting(counts: list[int], most: int) -> int:
    """Returns how many of the first counts sum to at most `most`."""
    return sum(total <= most for total in accumulate(counts))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """Decodes token by token. A character of several tokens comes with the last one."""
    pieces, done = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        whole = text.rstrip("\ufffd") if end < len(ids) else text
        pieces.append(whole[len(done) :])
        done = whole
    return pieces
