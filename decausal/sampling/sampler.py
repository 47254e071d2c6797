"""Unmasking: open positions of many rows become tokens, a few more with every forward pass.

Every step is whole-batch tensor arithmetic on the model's device. A row is a function of its own ids, its own seed and
the settings: it does not depend on its batch mates, on padding, or on rows that finish before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decausal.diffusion.layout import Layout
from decausal.diffusion.shift import predictable, predicting_index
from decausal.errors import UserError
from decausal.models.backbone import body_forward, head_of
from decausal.models.checkpoint import ConversionFacts
from decausal.objectives.tokens import Head
from decausal.sampling.candidates import uniform_numbers
from decausal.sampling.row_settings import RowSettings
from decausal.sampling.selection import best, candidates, num_to_keep
from decausal.sampling.settings import SamplerSettings

__all__ = ["Denoised", "OnStep", "SamplerSettings", "denoise"]

OnStep = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called after every step with (step, ids [B T], is_open [B T] after the step, newly_kept [B T])."""


@dataclass(frozen=True)
class Denoised:
    """Finished rows.

    Attributes:
        ids: Tokens. After the end token of a row that ended, its other open positions hold the end token too.
        step_of_token: The step, from 0, in which a token was kept for good; -1 for given ones and after the end.
        num_forwards: Forward passes that each row took part in; the largest is the number of model calls.
    """

    ids: Int[Tensor, "B T"]
    step_of_token: Int[Tensor, "B T"]
    num_forwards: Int[Tensor, "B"]

    @property
    def tokens_per_forward(self) -> Float[Tensor, "B"]:
        """Tokens kept, the end token included, over the row's forward passes; 0 for a row without open positions."""
        return (self.step_of_token >= 0).sum(1) / self.num_forwards.clamp(min=1)


def denoise(
    model: Any,
    facts: ConversionFacts,
    ids: Int[Tensor, "B T"],
    is_open: Bool[Tensor, "B T"],
    settings: SamplerSettings,
    *,
    document_ids: Int[Tensor, "B T"] | None = None,
    row_seeds: Int[Tensor, "B"] | None = None,
    end_token_ids: Sequence[int] = (),
    on_step: OnStep | None = None,
) -> Denoised:
    """Replaces the open positions of each row by tokens, most confident first.

    Each step runs the body over the rows that are not finished, the head at their masked positions alone (with
    `settings.remask` also at kept ones), draws one candidate per masked position and keeps the best. The mask token is
    never drawn. Rows that finish leave the batch.

    Args:
        model: The converted model; put into eval mode for the call.
        facts: Says layout, shift and mask token. The layout is "causal" or "bidirectional".
        ids: Given tokens; what stands at open positions is ignored.
        is_open: Positions to fill. With shift 1 never the first of a row.
        settings: See `SamplerSettings`; `max_new_tokens` plays no part here.
        document_ids: -1 for padding, which stands at the end of a row; documents do not see each other.
            None: no padding, one document per row.
        row_seeds: One seed per row. None: row i has `settings.seed + i`.
        end_token_ids: A row is finished once one of these is kept and everything open before it is kept too.
        on_step: See `OnStep`. Rows that finished earlier are shown as they ended.

    Raises:
        UserError: A "block" layout; an open position that no state predicts.
    """
    document_ids = torch.zeros_like(ids) if document_ids is None else document_ids
    _refuse_what_cannot_be_sampled(facts, is_open, document_ids)
    rows = _Rows(
        ids=ids.masked_fill(is_open, facts.mask_token_id),
        is_open=is_open,
        is_masked=is_open.clone(),
        document_ids=document_ids,
        seeds=settings.seed + torch.arange(len(ids), device=ids.device) if row_seeds is None else row_seeds,
        step_of_token=torch.full_like(ids, -1),
        num_forwards=torch.zeros_like(ids[:, 0]),
        settings=RowSettings.of([settings] * len(ids), ids.device),
    )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            _denoise(_Predictor.of(model, facts), rows, end_token_ids, on_step)
    finally:
        model.train(was_training)
    return Denoised(rows.ids, rows.step_of_token, rows.num_forwards)


@dataclass
class _Rows:
    """The batch as it is being denoised, or the rows of it that are not finished."""

    ids: Int[Tensor, "B T"]
    is_open: Bool[Tensor, "B T"]
    is_masked: Bool[Tensor, "B T"]
    document_ids: Int[Tensor, "B T"]
    seeds: Int[Tensor, "B"]
    step_of_token: Int[Tensor, "B T"]
    num_forwards: Int[Tensor, "B"]
    settings: RowSettings
    is_whole: bool = False  # every row is one document without padding: the model needs no explicit mask

    def unfinished(self) -> tuple[Int[Tensor, "A"], _Rows]:
        """Copies the rows with masked positions, without the columns that are padding in all of them."""
        active = self.is_masked.any(1).nonzero().squeeze(1)
        is_real = (self.document_ids[active] >= 0).any(0)
        length = int((is_real * torch.arange(1, len(is_real) + 1, device=is_real.device)).max()) if len(active) else 0
        cut = {name: getattr(self, name)[active, :length] for name in (*_FIXED, *_CHANGING)}
        is_whole = bool((cut["document_ids"] == cut["document_ids"][:, :1]).all())
        vectors = {"seeds": self.seeds[active], "num_forwards": self.num_forwards[active]}
        return active, _Rows(**cut, **vectors, settings=self.settings.rows(active), is_whole=is_whole)

    def put(self, active: Int[Tensor, "A"], rows: _Rows) -> None:
        """Writes copied rows back."""
        length = rows.ids.shape[1]
        for name in _CHANGING:
            getattr(self, name)[active, :length] = getattr(rows, name)
        self.num_forwards[active] = rows.num_forwards


_FIXED = ("is_open", "document_ids")
_CHANGING = ("ids", "is_masked", "step_of_token")


def _denoise(predictor: _Predictor, batch: _Rows, end_token_ids: Sequence[int], on_step: OnStep | None) -> None:
    ends = torch.tensor(list(end_token_ids), dtype=batch.ids.dtype, device=batch.ids.device)
    step = 0
    active, rows = batch.unfinished()
    while len(active):
        _advance(predictor, rows, step)
        if len(ends):
            _end_rows(rows, ends)
        batch.put(active, rows)
        if on_step:
            on_step(step, batch.ids.clone(), batch.is_masked.clone(), batch.step_of_token == step)
        step += 1
        if not bool(rows.is_masked.any(1).all()):
            active, rows = batch.unfinished()


def _advance(predictor: _Predictor, rows: _Rows, step: int) -> None:
    """One forward pass, and what it keeps."""
    is_scored = rows.is_open if rows.settings.remask else rows.is_masked
    tokens, scores = predictor(rows, is_scored, step)
    is_kept = best(scores, num_to_keep(scores, rows.is_open, rows.is_masked, rows.settings, step))
    is_new = is_kept & rows.is_masked
    rows.ids = torch.where(is_new, tokens, rows.ids)
    rows.is_masked = is_scored & ~is_kept
    rows.ids = rows.ids.masked_fill(rows.is_masked, predictor.mask_token_id)
    rows.step_of_token = rows.step_of_token.masked_fill(is_new, step)
    rows.num_forwards = rows.num_forwards + 1


def _end_rows(rows: _Rows, ends: Int[Tensor, "E"]) -> None:
    """Finishes rows that hold a kept end token and nothing masked before it: what was open after it becomes the end."""
    is_end = torch.isin(rows.ids, ends) & rows.is_open & ~rows.is_masked
    num_ends = is_end.cumsum(1)
    is_ended = is_end.any(1) & ~(rows.is_masked & (num_ends == 0)).any(1)
    is_after = (num_ends > 0) & ~(is_end & (num_ends == 1)) & rows.is_open & is_ended[:, None]
    rows.ids = torch.where(is_after, ends[0], rows.ids)
    rows.is_masked = rows.is_masked & ~is_after
    rows.step_of_token = rows.step_of_token.masked_fill(is_after, -1)


@dataclass(frozen=True)
class _Predictor:
    """A converted model as the sampler sees it: candidates and their confidence at the positions it asks for."""

    model: Any
    head: Head
    layout: Layout
    shift: int
    mask_token_id: int

    @classmethod
    def of(cls, model: Any, facts: ConversionFacts) -> _Predictor:
        head = head_of(model)._replace(banned=facts.mask_token_id)
        return cls(model, head, facts.attention, facts.shift, facts.mask_token_id)

    def __call__(
        self, rows: _Rows, is_scored: Bool[Tensor, "A T"], step: int
    ) -> tuple[Int[Tensor, "A T"], Float[Tensor, "A T"]]:
        """Returns a token and its confidence where `is_scored`; the tokens in place and -inf elsewhere.

        Masked positions get a candidate; kept ones are scored as they stand.
        """
        document_ids = None if rows.is_whole else rows.document_ids
        body = body_forward(self.model, rows.ids, self.layout, document_ids=document_ids)
        index = is_scored.flatten().nonzero().squeeze(1)
        states = body.last_hidden_state.flatten(0, 1)[predicting_index(index, self.shift)]
        length = rows.ids.shape[1]
        row = index // length
        settings = rows.settings
        numbers = None if settings.is_greedy else uniform_numbers(rows.seeds[row], step, index % length)
        kept = (rows.ids.flatten()[index], ~rows.is_masked.flatten()[index]) if settings.remask else None
        tokens, scores = candidates(states, self.head, settings.at(row), numbers, kept)
        all_tokens = rows.ids.flatten().index_copy(0, index, tokens)
        all_scores = scores.new_full((rows.ids.numel(),), -torch.inf).index_copy(0, index, scores)
        return all_tokens.view_as(rows.ids), all_scores.view_as(rows.ids)


def _refuse_what_cannot_be_sampled(
    facts: ConversionFacts, is_open: Bool[Tensor, "B T"], document_ids: Int[Tensor, "B T"]
) -> None:
    if facts.layout == "block":
        raise UserError(
            f"this model has layout 'block' (block size {facts.block_size}): it is denoised not all at once "
            "but block by block, as generate does (sampling.engine.BlockEngine)"
        )
    unpredicted = (is_open & ~predictable(document_ids, facts.shift)).nonzero()
    if len(unpredicted):
        row, position = unpredicted[0].tolist()
        raise UserError(
            f"position {position} of row {row} is open, but no state predicts it: with shift {facts.shift} open "
            "positions are never padding, and with shift 1 never the first of a document; give at least one token first"
        )
