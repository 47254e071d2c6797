"""Edits a text: what the model finds least likely, or a marked span, is masked and rewritten.

A token is judged by p(token) / p(the model's first choice there), with the token masked: see `scoring`. A rare word
that fits is unlikely, but nothing else is much likelier there. A slip is improbable where another token is clearly
expected. Everything else stays byte for byte: only characters of changed tokens are replaced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from decausal.errors import UserError
from decausal.models.checkpoint import Converted
from decausal.sampling.editing.changes import Change, apply
from decausal.sampling.editing.encoded import EncodedText, encode_texts
from decausal.sampling.engines import write
from decausal.sampling.filling.gaps import refuse_layout
from decausal.sampling.jobs import BATCH_SIZE, Ended, Job, OnStep
from decausal.sampling.rows import Row
from decausal.sampling.scoring import TokenScores, score_tokens
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.settings.of_model import settings_for

GROUPS = 8
FRACTION = 0.15
"""Share of the tokens that an edit rewrites by default."""


@dataclass(frozen=True)
class TokenConfidence:
    """How sure the model is of one token of a text, given the others.

    Attributes:
        text: The token's characters. If a character is several tokens, each of them has the whole character.
        start: Where its characters begin in the text.
        end: Where its characters end.
        probability: The probability of this token.
        best_probability: The probability of the model's own choice there, which may be the same token.
    """

    text: str
    start: int
    end: int
    probability: float
    best_probability: float


@dataclass(frozen=True)
class Edit:
    """A text before and after.

    Attributes:
        text: The text now.
        before: The text as it was given.
        changes: What was replaced, in order; see `changes.apply` and `changes.word_diff`.
        num_rewritten: Tokens that were masked and rewritten, over all rounds. Many may be unchanged.
        num_rounds: Number of rounds. The last one may have changed nothing.
        num_forwards: Passes of single rows through the model, scoring included.
    """

    text: str
    before: str
    changes: list[Change]
    num_rewritten: int
    num_rounds: int
    num_forwards: int

    def as_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold."""
        return asdict(self)


def confidences(
    converted: Converted, text: str | Sequence[str], *, groups: int = GROUPS, batch_size: int = BATCH_SIZE
) -> list[TokenConfidence] | list[list[TokenConfidence]]:
    """Returns how probable each token of a text is, given the others.

    Args:
        converted: Model, tokenizer and facts.
        text: One text or several.
        groups: Number of passes. In each pass every `groups`-th token is masked and scored, so more groups are more
            accurate. With as many groups as tokens, each token sees all others.
        batch_size: Rows in the model at once; it does not change the result.

    Returns:
        Confidences in the order of the text, without special tokens. A list of lists for several texts.

    Raises:
        UserError: As `edit`.
    """
    _check(converted, groups, batch_size)
    texts = [text] if isinstance(text, str) else list(text)
    encoded = encode_texts(converted, texts)
    positions = [each.editable() for each in encoded]
    scores = score_tokens(converted, [each.ids for each in encoded], positions, groups=groups, batch_size=batch_size)
    found = [_confidences(*each) for each in zip(encoded, positions, scores, strict=True)]
    return found[0] if isinstance(text, str) else found


def _confidences(encoded: EncodedText, positions: list[int], scores: TokenScores) -> list[TokenConfidence]:
    probabilities = zip(scores.log_prob.exp().tolist(), scores.best_log_prob.exp().tolist(), strict=True)
    spans = [encoded.offsets[position] for position in positions]
    return [
        TokenConfidence(encoded.text[start:end], start, end, own, best)
        for (start, end), (own, best) in zip(spans, probabilities, strict=True)
    ]


def edit(
    converted: Converted,
    text: str | Sequence[str],
    *,
    num_tokens: int | None = None,
    fraction: float | None = None,
    span: tuple[int, int] | None = None,
    find: str | None = None,
    rounds: int = 1,
    groups: int = GROUPS,
    batch_size: int = BATCH_SIZE,
    on_step: OnStep | None = None,
    **options: Any,
) -> Edit | list[Edit]:
    """Rewrites the tokens that fit least, or a marked span; the number of tokens stays the same.

    Tokens are chosen in the whole text, in `span`, or wherever `find` occurs. Their number is `num_tokens`, or
    `fraction` of the tokens there; the default is 0.15 of a whole text, and all of a marked span. Those that fit least
    are rewritten. Each further round chooses again in the current text, at most `num_tokens` or `fraction` (0.15 by
    default, also of a span). A round that changes nothing is the last.

    Args:
        converted: Model, tokenizer and facts.
        text: One text or several, rewritten together.
        num_tokens: Tokens to rewrite in a round; 0 rewrites nothing.
        fraction: Share of the tokens, 0 to 1, rounded up.
        span: First character and the one after the last. A token that is partly in it is rewritten as a whole.
        find: Text of which every occurrence is marked.
        rounds: The most rounds.
        groups: See `confidences`.
        batch_size: Rows in the model at once; it does not change the result.
        on_step: See `jobs.OnStep`.
        **options: `SamplerSettings` by name; text i draws from `seed` + i.

    Returns:
        One Edit for a string, a list for a list.

    Raises:
        UserError: A bad setting; a text that is empty, does not fit or holds the mask token; a span outside of it; text
            that is not found; or a layout other than bidirectional.
    """
    _check(converted, groups, batch_size)
    choice = _Choice(num_tokens, fraction, span, find)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise UserError(f"rounds={rounds!r} is not accepted: it must be an integer of at least 1")
    settings = settings_for(converted.facts, **options)
    texts = [text] if isinstance(text, str) else list(text)
    drafts = [
        _Draft(encoded, choice.where(encoded), settings.seed + index)
        for index, encoded in enumerate(encode_texts(converted, texts))
    ]
    running = drafts
    for round_number in range(rounds):
        _choose(converted, running, choice, round_number, groups, batch_size)
        running = [draft for draft in running if draft.opened]
        if not running:
            break
        _rewrite(converted, running, settings, batch_size, on_step)
        running = [draft for draft in running if draft.has_changed]
    edits = [draft.edit(converted) for draft in drafts]
    return edits[0] if isinstance(text, str) else edits


def _check(converted: Converted, groups: int, batch_size: int) -> None:
    refuse_layout(converted.facts)
    for name, value in (("groups", groups), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{name}={value!r} is not accepted: it must be an integer of at least 1")


@dataclass(frozen=True)
class _Choice:
    """Where to rewrite, and how many tokens."""

    num_tokens: int | None
    fraction: float | None
    span: tuple[int, int] | None
    find: str | None

    def __post_init__(self) -> None:
        if self.num_tokens is not None and self.fraction is not None:
            raise UserError("num_tokens and fraction exclude each other: give one of them")
        if self.span is not None and self.find is not None:
            raise UserError("span and find exclude each other: give one of them")
        if self.num_tokens is not None and (
            isinstance(self.num_tokens, bool) or not isinstance(self.num_tokens, int) or self.num_tokens < 0
        ):
            raise UserError(f"num_tokens={self.num_tokens!r} is not accepted: it must be an integer of at least 0")
        if self.fraction is not None and not 0 <= self.fraction <= 1:
            raise UserError(f"fraction={self.fraction!r} is not accepted: it must be a number from 0 to 1")
        if self.find == "":
            raise UserError("find='' is not accepted: give text that stands in the text")

    @property
    def is_marked(self) -> bool:
        return self.span is not None or self.find is not None

    def where(self, encoded: EncodedText) -> list[int]:
        """Returns the positions that may be rewritten."""
        if self.span is not None:
            return encoded.editable([encoded.checked_span(self.span)])
        if self.find is not None:
            return encoded.editable(encoded.occurrences(self.find))
        return encoded.editable()

    def how_many(self, num_there: int, round_number: int) -> int:
        if self.num_tokens is not None:
            return min(self.num_tokens, num_there)
        if self.fraction is None and self.is_marked and round_number == 0:
            return num_there
        return math.ceil((FRACTION if self.fraction is None else self.fraction) * num_there)


class _Draft:
    """A text that is being edited: its ids now, and what is open in this round."""

    def __init__(self, encoded: EncodedText, allowed: list[int], seed: int) -> None:
        self.encoded, self.allowed, self.seed = encoded, allowed, seed
        self.ids = list(encoded.ids)
        self.opened: list[int] = []
        self.has_changed = False
        self.num_rewritten = self.num_rounds = self.num_forwards = 0

    def row(self) -> Row:
        return Row.opened(self.ids, self.opened, self.encoded.name)

    def take(self, ended: Ended) -> None:
        ids = self.row().filled(ended.ids)
        self.has_changed = ids != self.ids
        self.ids = ids
        self.num_rewritten += len(self.opened)
        self.num_rounds += 1
        self.num_forwards += ended.num_forwards

    def edit(self, converted: Converted) -> Edit:
        changes = self.encoded.changes(self.ids, converted.tokenizer)
        text = apply(self.encoded.text, changes)
        return Edit(text, self.encoded.text, changes, self.num_rewritten, self.num_rounds, self.num_forwards)


def _choose(
    converted: Converted, drafts: list[_Draft], choice: _Choice, round_number: int, groups: int, batch_size: int
) -> None:
    """Opens what fits least. Scores only if there is a choice."""
    undecided = []
    for draft in drafts:
        count = choice.how_many(len(draft.allowed), round_number)
        draft.opened = list(draft.allowed) if count == len(draft.allowed) else []
        if 0 < count < len(draft.allowed):
            undecided.append((draft, count))
    # Tokens outside a marked span are not scored, but the whole text is divided into groups. What is masked together
    # with a token must not depend on the marks.
    positions = [draft.encoded.editable() for draft, _ in undecided]
    scores = score_tokens(
        converted, [draft.ids for draft, _ in undecided], positions, groups=groups, batch_size=batch_size
    )
    for (draft, count), places, found in zip(undecided, positions, scores, strict=True):
        draft.num_forwards += min(groups, len(places))
        ratio = dict(zip(places, (found.log_prob - found.best_log_prob).tolist(), strict=True))
        draft.opened = sorted(sorted(draft.allowed, key=ratio.__getitem__)[:count])
    for draft in drafts:
        draft.opened = draft.encoded.whole_characters(draft.opened)


def _rewrite(
    converted: Converted, drafts: list[_Draft], settings: SamplerSettings, batch_size: int, on_step: OnStep | None
) -> None:
    jobs = [Job(draft.row(), settings, draft.seed) for draft in drafts]
    for draft, ended in zip(drafts, write(converted, jobs, batch_size=batch_size, on_step=on_step), strict=True):
        draft.take(ended)
