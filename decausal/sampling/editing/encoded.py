"""A text as tokens with known characters, so that the rest of the text stays as it was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from tokenizers import processors

from decausal.data.encode import SpecialTokens
from decausal.errors import UserError, refuse_broken_text
from decausal.models.checkpoint import Converted
from decausal.sampling.editing.changes import Change
from decausal.sampling.rows import Row
from decausal.sampling.texts import named, prompt_ids, text_after

CONTEXT_IDS = 64
"""Tokens before rewritten ones that are decoded with them, so that a tokenizer places its spaces correctly."""


@dataclass(frozen=True)
class EncodedText:
    """Ids of a text, after the tokens that begin a row.

    Attributes:
        text: The text as it was given.
        name: What error messages call it.
        ids: Ids of the whole row.
        offsets: First character of each id, and the one after the last; empty for special tokens.
        is_special: Whether an id is a special token, in the text or before it.
    """

    text: str
    name: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    is_special: list[bool]

    def editable(self, spans: Sequence[tuple[int, int]] | None = None) -> list[int]:
        """Returns the positions that can be rewritten: all, or those that touch one of the character spans."""
        return [
            position
            for position, (start, end) in enumerate(self.offsets)
            if start < end
            and not self.is_special[position]
            and (spans is None or any(first < end and start < last for first, last in spans))
        ]

    def checked_span(self, span: tuple[int, int]) -> tuple[int, int]:
        start, end = span
        if not 0 <= start < end <= len(self.text):
            raise UserError(
                f"span {start}:{end} is not in {self.name}, which has {len(self.text)} characters: give the first "
                "character and the one after the last, counted from 0"
            )
        return start, end

    def occurrences(self, wanted: str) -> list[tuple[int, int]]:
        """Returns the spans of a text in this one; they do not overlap."""
        spans, start = [], self.text.find(wanted)
        while start >= 0:
            spans.append((start, start + len(wanted)))
            start = self.text.find(wanted, start + len(wanted))
        if not spans:
            raise UserError(f"{wanted!r} is not in {self.name}: give text exactly as it is written there")
        return spans

    def whole_characters(self, positions: Sequence[int]) -> list[int]:
        """Adds the other tokens of characters that span several tokens."""
        chosen = set(positions)
        return [position for group in self.groups() if chosen.intersection(group) for position in group]

    def groups(self) -> list[list[int]]:
        """Returns the text's positions, grouped where they share a character."""
        groups: list[list[int]] = []
        end = 0
        for position in self.editable():
            if groups and self.offsets[position][0] < end:
                groups[-1].append(position)
            else:
                groups.append([position])
            end = max(end, self.offsets[position][1])
        return groups

    def changes(self, ids: Sequence[int], tokenizer: Any) -> list[Change]:
        """Returns how the text changes if the row has other ids at the same positions."""
        is_changed = [any(ids[position] != self.ids[position] for position in group) for group in self.groups()]
        changes = []
        numbered = zip(is_changed, self.groups(), strict=True)
        for changed, run in groupby(numbered, key=lambda pair: pair[0]):
            positions = [position for _, group in run for position in group]
            if changed:
                changes += [self._change(ids, adjacent, tokenizer) for adjacent in _runs(positions)]
        return changes

    def _change(self, ids: Sequence[int], positions: list[int], tokenizer: Any) -> Change:
        first, last = positions[0], positions[-1]
        start, end = self.offsets[first][0], max(self.offsets[position][1] for position in positions)
        before = list(ids[max(0, first - CONTEXT_IDS) : first])
        return Change(start, end, self.text[start:end], text_after(tokenizer, before, list(ids[first : last + 1])))


def encode_texts(converted: Converted, texts: Sequence[str]) -> list[EncodedText]:
    """Encodes texts with the characters of each token.

    Under shift 1, a row begins with BOS or EOS if the tokenizer puts nothing there, so that the first token can be
    scored and rewritten too.

    Raises:
        UserError: An empty text, a text with the mask token or too many tokens, or a tokenizer without offsets.
    """
    tokenizer = converted.tokenizer
    if not tokenizer.is_fast:
        raise UserError(
            "this model's tokenizer does not say which characters a token has (it is not a fast tokenizer), and edit "
            "needs that: convert the model with a fast tokenizer"
        )
    start = SpecialTokens(tokenizer).prefix or (prompt_ids(converted, "") if converted.facts.shift else [])
    special = set(SpecialTokens(tokenizer).ids.tolist())
    encode = _encoder(tokenizer)
    encoded = []
    for name, text in zip(named("text", texts), texts, strict=True):
        if not text:
            raise UserError(f"{name} is empty: give text to edit")
        refuse_broken_text(text, name)
        text_ids, offsets = encode(text)
        ids = [*start, *text_ids]
        Row((ids,), (), name).check(converted)
        is_special = [token in special for token in ids]
        encoded.append(EncodedText(text, name, ids, [(0, 0)] * len(start) + offsets, is_special))
    return encoded


def _encoder(tokenizer: Any) -> Callable[[str], tuple[list[int], list[tuple[int, int]]]]:
    """Returns a function that encodes a text to ids with their characters, including the space before a word."""

    def encode(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(encoding["input_ids"]), [tuple(offset) for offset in encoding["offset_mapping"]]

    processor = tokenizer.backend_tokenizer.post_processor
    if processor is None or b'"trim_offsets":true' not in processor.__getstate__():
        return encode
    # This byte-level tokenizer leaves spaces out of its offsets, although its tokens hold them.
    backend = deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)

    def encode_untrimmed(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    return encode_untrimmed


def _runs(positions: Sequence[int]) -> list[list[int]]:
    """Cuts ascending positions where they are not neighbours."""
    numbered = enumerate(positions)
    return [[position for _, position in run] for _, run in groupby(numbered, key=lambda pair: pair[1] - pair[0])]
