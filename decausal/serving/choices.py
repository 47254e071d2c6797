"""One choice of an answer, built from the engine's steps: its text so far, its log-probabilities, its draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from decausal.sampling.borders import Border
from decausal.sampling.jobs import Ended, Job, Progress, TokenLogProbs
from decausal.sampling.rows import Row
from decausal.sampling.stopping import is_stop_token
from decausal.sampling.token_texts import BROKEN, TokenTexts
from decausal.serving.text import TextStream


@dataclass(frozen=True)
class TokenLogProb:
    """A written token with its log-probability, and the likeliest alternatives.

    Attributes:
        text: The token decoded by itself, or its bytes if they are not text.
        bytes: Its bytes in UTF-8.
        offset: Characters of the answer before it.
        log_prob: Its log-probability when it was kept, before temperature; None for a given token.
        top: Texts, bytes and log-probabilities of the alternatives.
    """

    text: str
    bytes: bytes
    offset: int
    log_prob: float | None
    top: list[tuple[str, bytes, float]]


@dataclass(frozen=True)
class Delta:
    """What a step adds to a choice.

    Attributes:
        text: Further final text.
        log_probs: Log-probabilities of the tokens that became final with it.
        finish_reason: OpenAI's word, in the last step.
        event: The step as the extension field reports it; None if not asked for.
    """

    text: str = ""
    log_probs: list[TokenLogProb] = field(default_factory=list)
    finish_reason: str | None = None
    event: dict[str, Any] | None = None


class Choice:
    """Follows one row.

    Args:
        index: Its index among the choices.
        job: The row's job.
        tokenizer: Decodes ids.
        has_events: Whether deltas carry the draft.
        offset: Characters before the text in the answer.

    Attributes:
        row: The row. Gaps of unknown length have their maximum until their length is found.
        ended: How it ended, once it has.
    """

    def __init__(self, index: int, job: Job, tokenizer: Any, has_events: bool = False, offset: int = 0) -> None:
        self.index, self.job, self._offset = index, job, offset
        self._tokenizer, self._has_events = tokenizer, has_events
        self._texts = TokenTexts(tokenizer, shows_special=True)
        borders = job.row.borders or (Border(),)
        self._border = Border(borders[0].start, borders[-1].end)
        self._stream = TextStream(tokenizer, job.row.given[0], job.settings, self._border)
        self._num_final = 0
        self.ended: Ended | None = None
        self._begin(job.row)

    def _begin(self, row: Row) -> None:
        spans = row.spans()
        self._start, stop = spans[0].start, spans[-1].stop
        is_given = set(range(self._start, stop)).difference(*spans)
        whole = row.ids(-1)
        self.row = row
        self._ids: list[int | None] = [whole[p] if p in is_given else None for p in range(self._start, stop)]
        self._confidence: list[float | None] = [None] * len(self._ids)
        self._log_probs: dict[int, TokenLogProbs] = {}
        self._is_given = [p in is_given for p in range(self._start, stop)]

    @property
    def text(self) -> str:
        """All final text so far."""
        return self._stream.sent

    def take(self, progress: Progress) -> Delta:
        """Takes in a step."""
        if progress.row is not None:
            self._begin(progress.row)
        for position in progress.reopened:
            self._ids[position - self._start] = None
        for i, position in enumerate(progress.positions):
            place = position - self._start
            self._ids[place] = progress.ids[i]
            self._confidence[place] = progress.confidence[i] if progress.confidence else None
            if progress.log_probs:
                self._log_probs[place] = progress.log_probs[i]
        event = self._event(progress) if self._has_events else None
        if progress.ended is not None:
            return self._end(progress.ended, event)
        if self.job.settings.remask:  # kept tokens may be opened again
            return Delta(event=event)
        first, self._num_final = self._num_final, self._final_length()
        text = self._stream.push([token for token in self._ids[first : self._num_final] if token is not None])
        return Delta(text, self._told_log_probs(first, self._num_final), event=event)

    def _end(self, ended: Ended, event: dict[str, Any] | None) -> Delta:
        self.ended = ended
        if has_one_gap := len(self.row.gaps) == 1:
            self._ids[: len(ended.ids)] = ended.ids
        ids = ended.ids if has_one_gap else [token for token in self._ids if token is not None]
        first, self._num_final = self._num_final, len(ids)
        text = self._stream.finish(ids)
        if ended.reason == "end" or (ids and is_stop_token(self._tokenizer, ids[-1], self.job.settings)):
            self._num_final -= 1  # the end token has no text
        is_whole = ended.reason != "length" or self.row.given[-1] or not has_one_gap
        reason = "stop" if is_whole else "length"
        return Delta(text, self._told_log_probs(first, self._num_final), reason, event)

    def _final_length(self) -> int:
        length = self._num_final
        while length < len(self._ids) and self._ids[length] is not None:
            length += 1
        return length

    def _told_log_probs(self, first: int, stop: int) -> list[TokenLogProb]:
        if self.job.num_top_log_probs is None:
            return []
        # Tokens that are not final count as open. If a character's tokens arrive one by one, they begin where it
        # begins.
        is_over = self.ended is not None
        pieces = self._pieces([*self._ids[:stop], *([] if is_over else [None])])
        ends = list(accumulate((len(piece or "") for piece in pieces), initial=self._offset))
        listed = []
        for place in range(first, stop):
            log_prob, top = self._log_probs.get(place, (None, []))
            name, content = self._named(self._ids[place])
            offset = ends[place]
            if BROKEN not in self._texts.alone(self._ids[place]):
                name = self._inside(place, name)
                content, offset = name.encode(), ends[place + 1] - len(name)
            found = [(*self._named(token), value) for token, value in top]
            listed.append(TokenLogProb(name, content, offset, log_prob, found))
        return listed

    def _named(self, token: int) -> tuple[str, bytes]:
        return self._texts.name_of(token), self._texts.bytes_of(token)

    def _pieces(self, ids: list[int | None]) -> list[str | None]:
        """Returns what the token at each position adds to the text; None for open positions."""
        pieces = self._texts.of(ids)
        return [piece and self._inside(place, piece) for place, piece in enumerate(pieces)]

    def _inside(self, place: int, text: str) -> str:
        """Returns the text of a position's token without given characters in it."""
        text = text.removeprefix(self._border.start) if place == 0 else text
        return text.removesuffix(self._border.end) if place == len(self._ids) - 1 else text

    def _event(self, progress: Progress) -> dict[str, Any]:
        return {
            "index": self.index,
            "step": progress.step,
            "positions": [position - self._start for position in progress.positions],
            "is_revision": bool(progress.reopened),
            "draft": self._pieces(self._ids),
            "is_given": self._is_given,
            "confidence": [
                None if token is None or confidence is None else round(confidence, 4)
                for token, confidence in zip(self._ids, self._confidence, strict=True)
            ],
        }


def echoed(
    tokenizer: Any, ids: Sequence[int], num_before: int, found: Sequence[TokenLogProbs | None]
) -> list[TokenLogProb]:
    """Returns a prompt's tokens in the form of a choice's own tokens.

    Args:
        tokenizer: Decodes ids.
        ids: The prompt.
        num_before: How many of them were put before the prompt's text. They are not reported.
        found: Log-probabilities of each of `ids`; None for the first.
    """
    texts = TokenTexts(tokenizer)
    ends = list(accumulate((len(piece or "") for piece in texts.of(ids[num_before:])), initial=0))
    named = TokenTexts(tokenizer, shows_special=True)
    listed = []
    for place, token in enumerate(ids[num_before:]):
        log_prob, top = found[num_before + place] or (None, [])
        is_whole = BROKEN not in texts.alone(token)
        offset = ends[place + 1] - len(texts.alone(token)) if is_whole else ends[place]
        alternatives = [(named.name_of(other), named.bytes_of(other), value) for other, value in top]
        listed.append(TokenLogProb(named.name_of(token), named.bytes_of(token), max(0, offset), log_prob, alternatives))
    return listed
