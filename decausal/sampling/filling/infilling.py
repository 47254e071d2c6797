"""Fills gaps in texts: one or many in each, of given or unknown length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from decausal.errors import UserError, nearest
from decausal.models.architecture import context_length
from decausal.models.checkpoint import Converted
from decausal.sampling.engines import write
from decausal.sampling.filling.gaps import Piece, refuse_layout, split_gaps
from decausal.sampling.filling.lengths import SCORING_GROUPS, SEARCHES, GappedText, LengthSearch, Search, Trial
from decausal.sampling.generation import Generation
from decausal.sampling.jobs import BATCH_SIZE, Ended, Job, OnStep
from decausal.sampling.rows import Row
from decausal.sampling.scoring import score_tokens
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.settings.of_model import settings_for
from decausal.sampling.texts import named, text_after

MAX_GAP = 32
"""The most tokens of a gap of unknown length, by default."""


@dataclass(frozen=True)
class Filling:
    """What the model wrote into the gaps of one text.

    Attributes:
        texts: The new text of each gap, special tokens left out.
        full_text: The whole text, with given text as it was given.
        ids: The new tokens of each gap; the first and last may also hold given characters, see `borders`.
        step_of_token: For each of `ids` the step, from 0, in which it was kept.
        lengths: The tokens of each gap.
        num_forwards: Passes of single rows through the model: of this text, and of all candidates for its lengths with
            their scores.
        tokens_per_forward: New tokens over `num_forwards`.
        trials: The lengths that were tried and their scores in nats (higher is better); empty if all lengths were
            given.
    """

    texts: list[str]
    full_text: str
    ids: list[list[int]]
    step_of_token: list[list[int]]
    lengths: list[int]
    num_forwards: int
    tokens_per_forward: float
    trials: list[Trial]

    def as_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold."""
        return asdict(self)


def fill(
    converted: Converted,
    texts: Sequence[Piece] | Sequence[Sequence[Piece]],
    *,
    max_gap: int = MAX_GAP,
    length_search: str = "candidates",
    batch_size: int = BATCH_SIZE,
    on_step: OnStep | None = None,
    **options: Any,
) -> Filling | list[Filling]:
    """Writes what is missing in one text or in several. Every gap is written with all given text in view.

    Args:
        converted: Model, tokenizer and facts.
        texts: A text is a list. Strings are given text, integers are gaps of so many tokens, and None is a gap of
            unknown length, as in ``["def f(x):", None, "\\n    return", 4, "\\n"]``; see `gaps.parse_gaps`. If a text
            begins with a gap, its row starts from BOS or EOS.
        max_gap: The most tokens in a gap of unknown length; fewer if the model's context ends.
        length_search: How unknown lengths are found, "candidates" or "grow": see `lengths`.
        batch_size: Rows in the model at once; it does not change the results.
        on_step: See `jobs.OnStep`. Called while the text is filled, not while lengths are tried.
        **options: `SamplerSettings` by name, or by the names other samplers use. Text i draws from `seed` + i.

    Returns:
        One Filling for one text, a list for a list of texts.

    Raises:
        UserError: A bad setting or gap, a text that does not fit or holds the mask token, a gap of unknown length at
            the end of a text, or a layout under which gaps cannot see what follows them.
    """
    refuse_layout(converted.facts)
    is_one = not texts or any(isinstance(piece, str | int) or piece is None for piece in texts)
    listed = [texts] if is_one else list(texts)
    names = named("text", listed)
    split = [split_gaps(pieces, name) for pieces, name in zip(listed, names, strict=True)]
    settings = settings_for(converted.facts, **options)
    gapped = [
        _gapped(converted, given, lengths, name, settings.seed + index)
        for index, ((given, lengths), name) in enumerate(zip(split, names, strict=True))
    ]
    found = _search(converted, gapped, settings, max_gap, length_search, batch_size)
    rows = [text.row(search.lengths) for text, search in zip(gapped, found, strict=True)]
    jobs = [Job(row, settings, text.seed) for row, text in zip(rows, gapped, strict=True)]
    ended = write(converted, jobs, batch_size=batch_size, on_step=on_step)
    fillings = [_filling(converted, given, *each) for (given, _), *each in zip(split, rows, ended, found, strict=True)]
    return fillings[0] if is_one else fillings


def infill(
    converted: Converted,
    prefix: str | Sequence[str],
    suffix: str | Sequence[str],
    length: int | None = None,
    *,
    max_gap: int = MAX_GAP,
    length_search: str = "candidates",
    batch_size: int = BATCH_SIZE,
    on_step: OnStep | None = None,
    **options: Any,
) -> Generation | list[Generation]:
    """Writes what is missing between a prefix and a suffix: `fill` with one gap.

    Args:
        converted: Model, tokenizer and facts.
        prefix: Text before the gap, or one per row. If it is empty, the row starts from BOS or EOS.
        suffix: Text after the gap, as many as prefixes.
        length: Tokens in the gap; None if unknown.
        max_gap: As in `fill`.
        length_search: As in `fill`.
        batch_size: As in `fill`.
        on_step: As in `fill`.
        **options: As in `fill`.

    Returns:
        One Generation for strings, a list for lists.

    Raises:
        UserError: As `fill`.
    """
    if isinstance(prefix, str) != isinstance(suffix, str):
        raise UserError("infill needs prefix and suffix both as one string, or both as lists of the same length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise UserError(
            f"length={length!r} is not accepted: the gap must be an integer of at least 1 token, or None for unknown"
        )
    prefixes = [prefix] if isinstance(prefix, str) else list(prefix)
    suffixes = [suffix] if isinstance(suffix, str) else list(suffix)
    if len(prefixes) != len(suffixes):
        raise UserError(f"infill got {len(prefixes)} prefixes and {len(suffixes)} suffixes: give as many of each")
    texts = [[before, length, after] for before, after in zip(prefixes, suffixes, strict=True)]
    fillings = fill(
        converted,
        texts,
        max_gap=max_gap,
        length_search=length_search,
        batch_size=batch_size,
        on_step=on_step,
        **options,
    )
    generations = [
        Generation(
            text=filling.texts[0],
            full_text=filling.full_text,
            ids=filling.ids[0],
            step_of_token=filling.step_of_token[0],
            num_forwards=filling.num_forwards,
            tokens_per_forward=filling.tokens_per_forward,
        )
        for filling in fillings
    ]
    return generations[0] if isinstance(prefix, str) else generations


def _gapped(converted: Converted, given: list[str], lengths: list[int | None], name: str, seed: int) -> GappedText:
    if lengths[-1] is None and not given[-1]:
        raise UserError(
            f"{name} ends with a gap of unknown length: nothing after it shows where it ends; give its length, or use "
            "generate"
        )
    return GappedText.of(converted, given, lengths, name, seed)


def choose_lengths(
    converted: Converted,
    texts: Sequence[GappedText],
    settings: SamplerSettings,
    *,
    max_gap: int,
    search: str = "candidates",
    batch_size: int,
) -> list[Search]:
    """Finds the unknown lengths of texts. The candidates of all texts share batches.

    Args:
        converted: Model, tokenizer and facts.
        texts: They do not influence each other.
        settings: How candidates are filled.
        max_gap: The most tokens of one gap; fewer if the context ends.
        search: "candidates" or "grow".
        batch_size: Rows in the model at once; it does not change what is found.
    """
    context = context_length(converted.model.config)
    for text in texts:
        if text.unknown:
            text.row(text.started(1)).check(converted)
    shift = converted.facts.shift
    searches = [LengthSearch(text, text.longest(max_gap, context), shift, search) for text in texts]
    while running := [each for each in searches if each.asked]:
        jobs = [Job(row, settings, each.text.seed) for each in running for row in each.asked]
        places = [each.scored_positions(index) for each in running for index in range(len(each.asked))]
        ended = write(converted, jobs, batch_size=batch_size)
        ids = [job.row.filled(each.ids) for job, each in zip(jobs, ended, strict=True)]
        scores = score_tokens(converted, ids, places, groups=SCORING_GROUPS, batch_size=batch_size)
        start = 0
        for each in running:
            part = slice(start, start + len(each.asked))
            start = part.stop
            each.take(ids[part], [row.num_forwards for row in ended[part]], scores[part])
    return [each.found for each in searches]


def _search(
    converted: Converted,
    texts: list[GappedText],
    settings: SamplerSettings,
    max_gap: int,
    length_search: str,
    batch_size: int,
) -> list[Search]:
    if isinstance(max_gap, bool) or not isinstance(max_gap, int) or max_gap < 1:
        raise UserError(f"max_gap={max_gap!r} is not accepted: it must be an integer of at least 1")
    if length_search not in SEARCHES:
        hint = nearest(length_search, SEARCHES) or ""
        raise UserError(f"length_search={length_search!r} is not known{hint}; accepted: {', '.join(SEARCHES)}")
    return choose_lengths(converted, texts, settings, max_gap=max_gap, search=length_search, batch_size=batch_size)


def _filling(converted: Converted, given: list[str], row: Row, ended: Ended, search: Search) -> Filling:
    whole, ids = row.filled(ended.ids), row.by_gap(ended.ids)
    texts = [
        border.inside(text_after(converted.tokenizer, whole[: span.start], new))
        for span, new, border in zip(row.spans(), ids, row.borders, strict=True)
    ]
    num_forwards = ended.num_forwards + search.num_forwards
    return Filling(
        texts=texts,
        full_text=given[0] + "".join(chain(*zip(texts, given[1:], strict=True))),
        ids=ids,
        step_of_token=row.by_gap(ended.step_of_token),
        lengths=list(row.gaps),
        num_forwards=num_forwards,
        tokens_per_forward=sum(row.gaps) / num_forwards,
        trials=search.trials,
    )
