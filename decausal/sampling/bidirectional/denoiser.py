"""One denoising step of whole rows: what is read, scored, kept and opened again.

Whole-batch tensor arithmetic on the model's device. Each row has its own settings, seed and step, and its result is the
same as alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decausal.models.backbone import denoising_head
from decausal.models.facts import ConversionFacts
from decausal.objectives.head import Head
from decausal.sampling.bidirectional.decode_windows import Window, current_window
from decausal.sampling.bidirectional.remasking import opened_at_random
from decausal.sampling.bidirectional.window_cache import Reading, WindowReader
from decausal.sampling.borders import Allowed
from decausal.sampling.drawing import uniform_numbers
from decausal.sampling.row_settings import RowSettings
from decausal.sampling.selection import best, num_to_keep, propose
from decausal.sampling.settings import ORDERS

ORDERING_STEPS = 2**41
"""Added to the step, so that a random order and tokens are drawn from different numbers."""


@dataclass
class OpenRows:
    """Rows that are being denoised. A step writes into `ids`, `is_masked` and `steps`.

    Attributes:
        ids: Tokens, masked positions holding the mask token.
        is_open: Positions that were not given.
        is_masked: Open positions that are not kept yet.
        document_ids: -1 for padding at the end of a row. Documents do not see each other.
        seeds: One per row.
        steps: Steps so far.
        places: A number for each row, which it keeps while it is denoised.
        settings: One per row.
        is_whole: Whether every row is one document without padding, so that no explicit mask is needed.
        allowed: Which tokens some positions may get. None: any token everywhere.
    """

    ids: Int[Tensor, "A T"]
    is_open: Bool[Tensor, "A T"]
    is_masked: Bool[Tensor, "A T"]
    document_ids: Int[Tensor, "A T"]
    seeds: Int[Tensor, " A"]
    steps: Int[Tensor, " A"]
    places: Int[Tensor, " A"]
    settings: RowSettings
    is_whole: bool
    allowed: Allowed | None = None


class Step(NamedTuple):
    """What a step did.

    Attributes:
        is_new: Positions that were masked and are kept now.
        is_reopened: Positions that were kept and are masked now; None if no row remasks.
        scores: Confidence, or minus the entropy if that is bounded; -inf where nothing was scored.
        index: Flat positions in [A * T] that were scored.
        states: The states that predict them.
        num_forwards: Passes that each row took part in: 2 with guidance, else 1.
        num_tokens_read: Tokens of each row that they read.
    """

    is_new: Bool[Tensor, "A T"]
    is_reopened: Bool[Tensor, "A T"] | None
    scores: Float[Tensor, "A T"]
    index: Int[Tensor, " n"]
    states: Float[Tensor, "n D"]
    num_forwards: Int[Tensor, " A"]
    num_tokens_read: Int[Tensor, " A"]


class Denoiser:
    """A converted model, and what it stores of rows between their steps.

    Args:
        model: The model, in eval mode.
        facts: Layout, shift, mask token.
        num_places: The most rows at once.
    """

    def __init__(self, model: Any, facts: ConversionFacts, num_places: int) -> None:
        self.mask_token_id = facts.mask_token_id
        self.head: Head = denoising_head(model, facts.mask_token_id)
        self._read, self._read_without = (
            WindowReader(model, facts.attention, facts.shift, num_places) for _ in range(2)
        )

    def forget(self, place: int) -> None:
        """Makes a place ready for another row."""
        self._read.forget(place)
        self._read_without.forget(place)

    def advance(self, rows: OpenRows) -> Step:
        """Takes every row one step further, with one pass of the model, or two if rows are guided."""
        settings = rows.settings
        window = current_window(rows.is_open, rows.is_masked, settings, rows.steps)
        is_masked = rows.is_masked & window.is_inside
        is_opened = None
        if any(kind in settings.remasks for kind in ("remdm", "remdm_loop")):
            is_opened = opened_at_random(window, is_masked, rows.seeds, rows.steps)
        is_scored = is_masked
        if "p2" in settings.remasks:
            is_scored = is_masked | (window.is_inside & settings.has_remask("p2")[:, None])
        index = is_scored.flatten().nonzero().squeeze(1)
        reading = self._reading(rows, window)
        states, num_read = self._read(reading, index)
        unguided, num_forwards = None, torch.ones_like(rows.steps)
        if settings.is_guided:
            unguided, more = self._without_given(rows, reading, index, states)
            num_forwards = num_forwards + (settings.guidance > 0)
            num_read = num_read + more
        tokens, scores = self._proposed(rows, index, states, unguided)
        still_masked = is_masked if is_opened is None else is_masked | is_opened
        by_order = _in_order(rows, scores, is_scored)
        count = num_to_keep(by_order, window.is_inside, still_masked, window.settings, window.step)
        is_kept = best(by_order, count)
        is_new = is_kept & is_masked
        is_left = is_scored & ~is_kept
        is_left = is_left if is_opened is None else is_left | is_opened
        is_reopened = is_left & ~is_masked if settings.remasks != (False,) else None
        rows.ids = torch.where(is_new, tokens, rows.ids).masked_fill(is_left, self.mask_token_id)
        rows.is_masked = (rows.is_masked & ~is_new) | is_left
        rows.steps = rows.steps + 1
        return Step(is_new, is_reopened, scores, index, states, num_forwards, num_read)

    def _reading(self, rows: OpenRows, window: Window) -> Reading:
        settings = rows.settings
        return Reading(
            ids=rows.ids,
            document_ids=None if rows.is_whole else rows.document_ids,
            lengths=(rows.document_ids >= 0).sum(1),
            places=rows.places,
            cache=settings.cache if settings.has_cache else None,
            cache_refresh=settings.cache_refresh if settings.has_cache else None,
            is_inside=window.is_inside,
        )

    def _without_given(
        self, rows: OpenRows, reading: Reading, index: Int[Tensor, " n"], states: Float[Tensor, "n D"]
    ) -> tuple[Float[Tensor, "n D"], Int[Tensor, " A"]]:
        """Returns the states of guided rows with everything given masked, and how many tokens that read; zeros for
        other rows."""
        is_guided = rows.settings.guidance > 0
        guided = is_guided.nonzero().squeeze(1)
        row, length = index // rows.ids.shape[1], rows.ids.shape[1]
        mine = is_guided[row].nonzero().squeeze(1)
        number = is_guided.cumsum(0) - 1
        is_given = ~rows.is_open & (rows.document_ids >= 0)
        without = reading._replace(ids=rows.ids.masked_fill(is_given, self.mask_token_id)).rows(guided)
        own, num_read = self._read_without(without, number[row[mine]] * length + index[mine] % length)
        return torch.zeros_like(states).index_copy(0, mine, own), torch.zeros_like(rows.steps).index_copy(
            0, guided, num_read
        )

    def _proposed(
        self,
        rows: OpenRows,
        index: Int[Tensor, " n"],
        states: Float[Tensor, "n D"],
        unguided: Float[Tensor, "n D"] | None,
    ) -> tuple[Int[Tensor, "A T"], Float[Tensor, "A T"]]:
        """Returns a token and its score where `index` points, else the current token and -inf. Kept tokens stay."""
        settings, length = rows.settings, rows.ids.shape[1]
        row = index // length
        numbers = None
        if not settings.is_greedy:
            numbers = uniform_numbers(rows.seeds[row], rows.steps[row], index % length)
        kept = None
        if "p2" in settings.remasks:
            kept = (rows.ids.flatten()[index], ~rows.is_masked.flatten()[index])
        only = None
        if rows.allowed is not None:
            only = (rows.allowed.index.flatten()[index], rows.allowed.tokens)
        tokens, scores = propose(states, self.head, settings.at(row), numbers, kept, unguided=unguided, only=only)
        all_tokens = rows.ids.flatten().index_copy(0, index, tokens)
        all_scores = scores.new_full((rows.ids.numel(),), -torch.inf).index_copy(0, index, scores)
        return all_tokens.view_as(rows.ids), all_scores.view_as(rows.ids)


def _in_order(rows: OpenRows, scores: Float[Tensor, "A T"], is_scored: Bool[Tensor, "A T"]) -> Float[Tensor, "A T"]:
    """Returns the numbers by which positions are kept first: their scores, unless a row has another order."""
    settings = rows.settings
    if settings.orders == ("confidence",):
        return scores
    num_rows, length = scores.shape
    position = torch.arange(length, device=scores.device).repeat(num_rows)
    for name in settings.orders:
        if name == "confidence":
            continue
        if name == "random":
            row = torch.arange(num_rows, device=scores.device).repeat_interleave(length)
            own = uniform_numbers(rows.seeds[row], rows.steps[row] + ORDERING_STEPS, position)
        else:
            own = -position.float()
        is_own = is_scored & (settings.order == ORDERS.index(name))[:, None]
        scores = torch.where(is_own, own.view_as(scores), scores)
    return scores
