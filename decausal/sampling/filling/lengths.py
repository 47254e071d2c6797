"""How long a gap is when nobody says: candidates of several lengths are filled, and ranked by likelihood.

A masked model given n open positions says nothing of n itself. What speaks of it are the tokens around the gap: when
the length is wrong, they read badly. So a candidate's score is the log-likelihood of the given tokens next to the gap,
the same ones for every length, plus that of the gap's own tokens divided by the square root of their number: their sum
would favour short gaps, their mean long ones that repeat themselves. docs/log.md holds what else was tried.

Two ways to propose lengths, measured against each other by benchmarks/infill_length.py:

- "candidates": a geometric grid, filled in one batch, then the lengths between the best one's neighbours.
- "grow": one filling, in which the weakest place is made longer or shorter by a few tokens, which are filled anew with
  their neighbours, as long as that scores better.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field

from decausal.models.architecture import context_length
from decausal.models.checkpoint import Converted
from decausal.sampling.rows import Row, fill_rows
from decausal.sampling.scoring import score_tokens
from decausal.sampling.settings import SamplerSettings

CONTEXT_TOKENS = 8
"""Given tokens on each side of a gap that a filling is judged by."""
SCORING_GROUPS = 4
MOST_RESIZINGS = 12
RESIZINGS = (1, 2, 4)
START = 4
"""Length at which an unknown gap stands while another one is searched, and from which one grows."""

SEARCHES = ("candidates", "grow")


@dataclass(frozen=True)
class GappedText:
    """A text with gaps, as ids.

    Attributes:
        given: Ids before, between and behind the gaps.
        lengths: Of each gap; None where it is unknown.
        name: What error messages call it.
        seed: What it draws from.
    """

    given: tuple[list[int], ...]
    lengths: tuple[int | None, ...]
    name: str
    seed: int

    def row(self, lengths: Sequence[int]) -> Row:
        return Row(self.given, tuple(lengths), self.name)

    def started(self, length: int) -> tuple[int, ...]:
        """The lengths, with `length` where they are unknown."""
        return tuple(length if known is None else known for known in self.lengths)

    @property
    def unknown(self) -> list[int]:
        return [gap for gap, length in enumerate(self.lengths) if length is None]

    def longest(self, max_gap: int, context: int | None) -> int:
        """The most tokens that each unknown gap may have; at least 1, whether or not that fits."""
        if context is None:
            return max_gap
        left = context - self.row(self.started(0)).length
        return max(1, min(max_gap, left // len(self.unknown)))


@dataclass(frozen=True)
class Trial:
    """A filling that was scored: the lengths of all gaps, and the score, in nats."""

    lengths: tuple[int, ...]
    score: float


@dataclass
class Search:
    """What a search found.

    Attributes:
        lengths: The lengths of all gaps.
        trials: What was tried, in this order.
        num_forwards: Passes of single rows through the model, fillings and scores together.
    """

    lengths: tuple[int, ...]
    trials: list[Trial] = field(default_factory=list)
    num_forwards: int = 0


@dataclass(frozen=True)
class _Proposal:
    """A row to fill, whose gaps have these lengths; where it grows, part of a gap is given already."""

    lengths: tuple[int, ...]
    row: Row


@dataclass(frozen=True)
class _Scored:
    lengths: tuple[int, ...]
    ids: list[int]
    score: float
    log_prob: dict[int, float]  # by position in the row, of the tokens in gaps and beside them


_Proposals = Generator[list[_Proposal], list[_Scored], tuple[int, ...]]


def choose_lengths(
    converted: Converted,
    texts: Sequence[GappedText],
    settings: SamplerSettings,
    *,
    max_gap: int,
    search: str = "candidates",
    batch_size: int,
) -> list[Search]:
    """Finds the unknown lengths of texts, the candidates of all texts batched together.

    Args:
        converted: Model, tokenizer and facts.
        texts: They do not influence each other.
        settings: How candidates are filled.
        max_gap: The most tokens of one gap; fewer where the context ends.
        search: "candidates" or "grow".
        batch_size: Rows in the model at once; it does not change what is found.
    """
    context = context_length(converted.model.config)
    propose = {"candidates": _by_candidates, "grow": _by_growing}[search]
    found = [Search(text.started(0)) for text in texts]
    running: dict[int, tuple[_Proposals, list[_Proposal]]] = {}
    for index, text in enumerate(texts):
        if text.unknown:
            text.row(text.started(1)).check(converted)
            proposals = propose(text, text.longest(max_gap, context))
            running[index] = (proposals, next(proposals))
    while running:
        asked = [(index, proposal) for index, (_, proposals) in running.items() for proposal in proposals]
        scored = _try(converted, [texts[index] for index, _ in asked], [p for _, p in asked], settings, batch_size)
        for index, (proposals, rows) in list(running.items()):
            results, scored = scored[: len(rows)], scored[len(rows) :]
            found[index].trials += [Trial(result.lengths, result.score) for result, _ in results]
            found[index].num_forwards += sum(num_forwards for _, num_forwards in results)
            try:
                running[index] = (proposals, proposals.send([result for result, _ in results]))
            except StopIteration as stop:
                found[index].lengths = stop.value
                del running[index]
    return found


def _try(
    converted: Converted,
    texts: Sequence[GappedText],
    proposals: Sequence[_Proposal],
    settings: SamplerSettings,
    batch_size: int,
) -> list[tuple[_Scored, int]]:
    """Fills and scores; returns the row passes that each took, too."""
    filled = fill_rows(
        converted, [p.row for p in proposals], settings, seeds=[text.seed for text in texts], batch_size=batch_size
    )
    rows = [text.row(proposal.lengths) for text, proposal in zip(texts, proposals, strict=True)]
    positions = [scored_positions(row, converted.facts.shift) for row in rows]
    scores = score_tokens(
        converted, [done.ids for done in filled], positions, groups=SCORING_GROUPS, batch_size=batch_size
    )
    results = []
    for row, places, done, token_scores in zip(rows, positions, filled, scores, strict=True):
        log_prob = dict(zip(places, token_scores.log_prob.tolist(), strict=True))
        scored = _Scored(row.gaps, done.ids, score(row, log_prob), log_prob)
        results.append((scored, done.num_forwards + min(SCORING_GROUPS, len(places))))
    return results


def scored_positions(row: Row, shift: int) -> list[int]:
    """The positions in gaps and up to `CONTEXT_TOKENS` beside them, without one that no state predicts."""
    near: set[int] = set()
    for span in row.spans():
        near.update(range(max(span.start - CONTEXT_TOKENS, shift), min(span.stop + CONTEXT_TOKENS, row.length)))
    return sorted(near)


def score(row: Row, log_prob: Mapping[int, float]) -> float:
    """The log-likelihood of the given tokens beside the gaps, plus each gap's own over the root of its length."""
    gaps = row.spans()
    in_gaps = {position for span in gaps for position in span}
    beside = sum(value for position, value in log_prob.items() if position not in in_gaps)
    return beside + sum(sum(log_prob[position] for position in span) / len(span) ** 0.5 for span in gaps)


def coarse_lengths(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... up to and with `most`."""
    lengths = [1]
    while lengths[-1] < most:
        doubled = 2 * lengths[-2] if len(lengths) > 2 else lengths[-1] + 1
        lengths.append(min(doubled, most))
    return lengths


def _by_candidates(text: GappedText, most: int) -> _Proposals:
    """Gap after gap: the grid, then halving steps around the best."""
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
    """Tries other lengths of one gap; what was tried before is not filled again. Of equal ones the shortest is best."""
    tried = [(*lengths[:gap], candidate, *lengths[gap + 1 :]) for candidate in candidates]
    new = [each for each in tried if each not in scores]
    if new:
        scored = yield [_Proposal(each, text.row(each)) for each in new]
        scores.update({each.lengths: each.score for each in scored})
    return max(tried, key=scores.__getitem__)


def _by_growing(text: GappedText, most: int) -> _Proposals:
    """Makes the weakest place of a gap longer or shorter, as long as that scores better."""
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
    """Inserts open positions beside the weakest token of a gap, or takes tokens out around it, and opens the rest."""
    span = text.row(filling.lengths).spans()[gap]
    weakest = min(span, key=lambda position: filling.log_prob[position])
    size = max(-change, 1)  # the tokens taken out, or the weakest alone
    first = min(max(weakest - size // 2, span.start), span.stop - size)
    opened = range(max(first - 1, span.start), min(first + size + 1, span.stop))
    lengths = (*filling.lengths[:gap], filling.lengths[gap] + change, *filling.lengths[gap + 1 :])
    given = (filling.ids[: opened.start], filling.ids[opened.stop :])
    return _Proposal(lengths, Row(given, (len(opened) + change,), text.name))
