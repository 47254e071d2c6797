"""Finds the length of a gap: candidates of several lengths are filled and ranked by likelihood.

A masked model cannot tell how long a gap should be. But if the length is wrong, the tokens around the gap become
unlikely. So a candidate's score has two parts. One is the log-likelihood of the given tokens next to the gap, the same
ones for every length. The other is that of the gap's own tokens, divided by the square root of their number. Their sum
would favour short gaps, and their mean long gaps that repeat themselves. docs/log.md holds what else was tried.

There are two ways to propose lengths, which benchmarks/infill_length.py compares:

- "candidates": a geometric grid, filled in one batch, then the lengths between the best one's neighbours.
- "grow": one filling whose weakest place is made longer or shorter by a few tokens. These are filled again with their
  neighbours, as long as the score improves.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field

from decausal.models.checkpoint import Converted
from decausal.sampling.borders import Border, split_at_borders
from decausal.sampling.rows import Row
from decausal.sampling.scoring import TokenScores
from decausal.sampling.texts import ids_after, prompt_ids

CONTEXT_TOKENS = 8
"""Given tokens on each side of a gap by which a filling is judged."""
SCORING_GROUPS = 4
MOST_RESIZINGS = 12
RESIZINGS = (1, 2, 4)
START = 4
"""Length of an unknown gap while another one is searched, and the length from which a gap grows."""

SEARCHES = ("candidates", "grow")


@dataclass(frozen=True)
class GappedText:
    """A text with gaps, as ids.

    Attributes:
        given: Ids before, between and after the gaps.
        lengths: The length of each gap; None if unknown.
        name: What error messages call it.
        seed: The seed that it draws from.
        borders: The border of each gap; empty if no token crosses one.
    """

    given: tuple[list[int], ...]
    lengths: tuple[int | None, ...]
    name: str
    seed: int
    borders: tuple[Border, ...] = ()

    @classmethod
    def of(
        cls, converted: Converted, given: Sequence[str], lengths: Sequence[int | None], name: str, seed: int
    ) -> GappedText:
        """Encodes texts, so that their tokens and those of the gaps are the same as in a whole text.

        Raises:
            UserError: There is no token to start a row from, see `prompt_ids`.
        """
        texts, borders = split_at_borders(converted.tokenizer, given, lengths)
        before, after = prompt_ids(converted, texts[0]), [ids_after(converted.tokenizer, text) for text in texts[1:]]
        return cls((before, *after), tuple(lengths), name, seed, borders)

    def row(self, lengths: Sequence[int]) -> Row:
        return Row(self.given, tuple(lengths), self.name, self.borders)

    def started(self, length: int) -> tuple[int, ...]:
        """Returns the lengths, with `length` for unknown ones."""
        return tuple(length if known is None else known for known in self.lengths)

    @property
    def unknown(self) -> list[int]:
        return [gap for gap, length in enumerate(self.lengths) if length is None]

    def longest(self, max_gap: int, context: int | None) -> int:
        """Returns the most tokens that each unknown gap may have; at least 1, even if that does not fit."""
        if context is None or not self.unknown:
            return max_gap
        left = context - self.row(self.started(0)).length
        return max(1, min(max_gap, left // len(self.unknown)))


@dataclass(frozen=True)
class Trial:
    """A scored filling: the lengths of all gaps, and the score in nats."""

    lengths: tuple[int, ...]
    score: float


@dataclass
class Search:
    """What a search found.

    Attributes:
        lengths: The lengths of all gaps.
        trials: The fillings that were tried, in this order.
        num_forwards: Passes of single rows through the model, for fillings and scores.
    """

    lengths: tuple[int, ...]
    trials: list[Trial] = field(default_factory=list)
    num_forwards: int = 0


@dataclass(frozen=True)
class _Proposal:
    """A row to fill whose gaps have these lengths. When a gap grows, part of it is given."""

    lengths: tuple[int, ...]
    row: Row


@dataclass(frozen=True)
class _Scored:
    lengths: tuple[int, ...]
    ids: list[int]
    score: float
    log_prob: dict[int, float]  # by position in the row: tokens in gaps and beside them


_Proposals = Generator[list[_Proposal], list[_Scored], tuple[int, ...]]


class LengthSearch:
    """The search for one text's unknown lengths. It asks for rows to be filled and scored until the lengths are known.

    Args:
        text: What to fill.
        longest: The most tokens of one gap.
        shift: The model's shift. Under 1, no state predicts a row's first token.
        search: "candidates" or "grow".

    Attributes:
        asked: Rows to fill, all with the text's seed; empty once the lengths are known.
        found: What has been tried, and finally the lengths.
    """

    def __init__(self, text: GappedText, longest: int, shift: int, search: str = "candidates") -> None:
        self.text, self._shift = text, shift
        self.found = Search(text.started(0))
        self._propose = {"candidates": _by_candidates, "grow": _by_growing}[search](text, longest)
        self._proposals: list[_Proposal] = next(self._propose) if text.unknown else []

    @property
    def asked(self) -> list[Row]:
        return [proposal.row for proposal in self._proposals]

    def scored_positions(self, index: int) -> list[int]:
        """Returns the positions by which one of `asked` is judged, for `score_tokens` with `SCORING_GROUPS`."""
        return scored_positions(self.text.row(self._proposals[index].lengths), self._shift)

    def take(self, ids: Sequence[list[int]], num_forwards: Sequence[int], scores: Sequence[TokenScores]) -> None:
        """Takes in the results for `asked`, and asks for more rows or ends.

        Args:
            ids: The rows, filled.
            num_forwards: Passes for filling each row.
            scores: Scores of `scored_positions`.
        """
        results = []
        filled = zip(self._proposals, ids, num_forwards, scores, strict=True)
        for index, (proposal, tokens, passes, token_scores) in enumerate(filled):
            places = self.scored_positions(index)
            log_prob = dict(zip(places, token_scores.log_prob.tolist(), strict=True))
            value = score(self.text.row(proposal.lengths), log_prob)
            results.append(_Scored(proposal.lengths, tokens, value, log_prob))
            self.found.trials.append(Trial(proposal.lengths, value))
            self.found.num_forwards += passes + min(SCORING_GROUPS, len(places))
        try:
            self._proposals = self._propose.send(results)
        except StopIteration as stop:
            self.found.lengths, self._proposals = stop.value, []


def scored_positions(row: Row, shift: int) -> list[int]:
    """Returns the positions in gaps and up to `CONTEXT_TOKENS` beside them that a state predicts."""
    near: set[int] = set()
    for span in row.spans():
        near.update(range(max(span.start - CONTEXT_TOKENS, shift), min(span.stop + CONTEXT_TOKENS, row.length)))
    return sorted(near)


def score(row: Row, log_prob: Mapping[int, float]) -> float:
    """Returns the log-likelihood of the given tokens beside the gaps, plus each gap's own over the root of its
    length."""
    gaps = row.spans()
    in_gaps = {position for span in gaps for position in span}
    beside = sum(value for position, value in log_prob.items() if position not in in_gaps)
    return beside + sum(sum(log_prob[position] for position in span) / len(span) ** 0.5 for span in gaps)


def coarse_lengths(most: int) -> list[int]:
    """Returns 1, 2, 3, 4, 6, 8, 12, 16, ... up to and including `most`."""
    lengths = [1]
    while lengths[-1] < most:
        doubled = 2 * lengths[-2] if len(lengths) > 2 else lengths[-1] + 1
        lengths.append(min(doubled, most))
    return lengths


def _by_candidates(text: GappedText, most: int) -> _Proposals:
    """Searches gap after gap: first the grid, then halving steps around the best."""
    lengths = text.started(min(START, most))
    scores: dict[tuple[int, ...], float] = {}
    for gap in text.unknown:
        grid = coarse_lengths(most)
        lengths = yield from _best_of(text, lengths, gap, grid, scores)
        place = grid.index(lengths[gap])
        below, above = grid[max(place - 1, 0)], grid[min(place + 1, len(grid) - 1)]
        step = max(lengths[gap] - below, above - lengths[gap]) // 2
        while step:
            near = [lengths[gap] - step, lengths[gap], lengths[gap] + step]
            lengths = yield from _best_of(text, lengths, gap, [n for n in near if 1 <= n <= most], scores)
            step //= 2
    return lengths


def _best_of(
    text: GappedText, lengths: tuple[int, ...], gap: int, candidates: list[int], scores: dict[tuple[int, ...], float]
) -> Generator[list[_Proposal], list[_Scored], tuple[int, ...]]:
    """Tries other lengths of one gap that have not been tried before. Among equal scores the shortest wins."""
    tried = [(*lengths[:gap], candidate, *lengths[gap + 1 :]) for candidate in candidates]
    new = [each for each in tried if each not in scores]
    if new:
        scored = yield [_Proposal(each, text.row(each)) for each in new]
        scores.update({each.lengths: each.score for each in scored})
    return max(tried, key=scores.__getitem__)


def _by_growing(text: GappedText, most: int) -> _Proposals:
    """Makes the weakest place of a gap longer or shorter as long as the score improves."""
    lengths = text.started(min(START, most))
    (best,) = yield [_Proposal(lengths, text.row(lengths))]
    for _ in range(MOST_RESIZINGS):
        proposals = [
            resized
            for gap in text.unknown
            for change in (*RESIZINGS, *(-size for size in RESIZINGS))
            if 1 <= best.lengths[gap] + change <= most
            for resized in [_resized(text, best, gap, change)]
        ]
        if not proposals:
            break
        leader = max((yield proposals), key=lambda scored: scored.score)
        if leader.score <= best.score:
            break
        best = leader
    return best.lengths


def _resized(text: GappedText, filling: _Scored, gap: int, change: int) -> _Proposal:
    """Inserts open positions beside the weakest token of a gap, or removes tokens around it, and opens its
    neighbours."""
    span = text.row(filling.lengths).spans()[gap]
    weakest = min(span, key=lambda position: filling.log_prob[position])
    size = max(-change, 1)  # the removed tokens, or only the weakest
    first = min(max(weakest - size // 2, span.start), span.stop - size)
    opened = range(max(first - 1, span.start), min(first + size + 1, span.stop))
    lengths = (*filling.lengths[:gap], filling.lengths[gap] + change, *filling.lengths[gap + 1 :])
    given = (filling.ids[: opened.start], filling.ids[opened.stop :])
    border = text.borders[gap] if text.borders else Border()
    start = border.start if opened.start == span.start else ""
    end = border.end if opened.stop == span.stop else ""
    return _Proposal(lengths, Row(given, (len(opened) + change,), text.name, (Border(start, end),)))
