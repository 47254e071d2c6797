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

from decausal.diffusion.shift import predictable
from decausal.errors import UserError
from decausal.models.facts import ConversionFacts
from decausal.sampling.bidirectional.denoiser import Denoiser, OpenRows, Step
from decausal.sampling.borders import Allowed
from decausal.sampling.row_settings import RowSettings
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
        num_forwards: Forward passes that each row took part in. The largest is the number of model calls, unless
            with a cache some rows are read whole while others are not.
        num_tokens_read: Tokens of each row that went through the model, over all passes: less than its length times
            `num_forwards` where a cache spares some.
    """

    ids: Int[Tensor, "B T"]
    step_of_token: Int[Tensor, "B T"]
    num_forwards: Int[Tensor, "B"]
    num_tokens_read: Int[Tensor, "B"]

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
    allowed: Allowed | None = None,
    on_step: OnStep | None = None,
) -> Denoised:
    """Replaces the open positions of each row by tokens, most confident first unless `settings.order` says otherwise.

    Each step runs the body over the rows that are not finished, the head at the masked positions of the current window
    alone (with `settings.remask` "p2" also at kept ones), draws one candidate per masked position and keeps the best.
    The mask token is never drawn. Rows that finish leave the batch.

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
        allowed: Which tokens some open positions may get; None: any, everywhere.
        on_step: See `OnStep`. Rows that finished earlier are shown as they ended.

    Raises:
        UserError: A "block" layout, or settings that the layout cannot honour; an open position that no state predicts;
            a cache for rows of several documents.
    """
    document_ids = torch.zeros_like(ids) if document_ids is None else document_ids
    settings.refuse_layout(facts.layout, facts.shift)
    _refuse_what_cannot_be_sampled(facts, is_open, document_ids, settings)
    num_rows = len(ids)
    batch = _Batch(
        rows=OpenRows(
            ids=ids.masked_fill(is_open, facts.mask_token_id),
            is_open=is_open,
            is_masked=is_open.clone(),
            document_ids=document_ids,
            seeds=settings.seed + torch.arange(num_rows, device=ids.device) if row_seeds is None else row_seeds,
            steps=torch.zeros_like(ids[:, 0]),
            places=torch.arange(num_rows, device=ids.device),
            settings=RowSettings.of([settings] * num_rows, ids.device),
            is_whole=False,
            allowed=allowed,
        ),
        step_of_token=torch.full_like(ids, -1),
        num_forwards=torch.zeros_like(ids[:, 0]),
        num_tokens_read=torch.zeros_like(ids[:, 0]),
    )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            _denoise(Denoiser(model, facts, num_rows), batch, end_token_ids, on_step)
    finally:
        model.train(was_training)
    return Denoised(batch.rows.ids, batch.step_of_token, batch.num_forwards, batch.num_tokens_read)


@dataclass
class _Batch:
    """All rows, finished or not, and what has been counted of them."""

    rows: OpenRows
    step_of_token: Int[Tensor, "B T"]
    num_forwards: Int[Tensor, "B"]
    num_tokens_read: Int[Tensor, "B"]

    def unfinished(self) -> OpenRows:
        """Copies the rows with masked positions, without the columns that are padding in all of them."""
        rows = self.rows
        # All that the host must know, in one piece: which rows go on, how long they are, and whether they are whole.
        is_real = rows.document_ids >= 0
        is_single = (rows.document_ids == rows.document_ids[:, :1]) | ~is_real
        told = torch.stack([rows.is_masked.any(1).long(), is_real.sum(1), is_single.all(1).long()], dim=1).tolist()
        going_on = [place for place, (is_active, _, _) in enumerate(told) if is_active]
        lengths = [told[place][1] for place in going_on]
        length = max(lengths, default=0)
        active = torch.tensor(going_on, dtype=torch.long, device=rows.ids.device)
        return OpenRows(
            ids=rows.ids[active, :length],
            is_open=rows.is_open[active, :length],
            is_masked=rows.is_masked[active, :length],
            document_ids=rows.document_ids[active, :length],
            seeds=rows.seeds[active],
            steps=rows.steps[active],
            places=active,
            settings=rows.settings.rows(active),
            is_whole=all(told[place][1] == length and told[place][2] for place in going_on),
            allowed=None if rows.allowed is None else rows.allowed.rows(active, length),
        )

    def take(self, rows: OpenRows, step: Step, is_cut: Bool[Tensor, "A T"] | None, number: int) -> None:
        """Writes copied rows back after a step."""
        here, length = rows.places, rows.ids.shape[1]
        self.rows.ids[here, :length] = rows.ids
        self.rows.is_masked[here, :length] = rows.is_masked
        self.rows.steps[here] = rows.steps
        step_of_token = self.step_of_token[here, :length].masked_fill(step.is_new, number)
        if is_cut is not None:
            step_of_token = step_of_token.masked_fill(is_cut, -1)
        self.step_of_token[here, :length] = step_of_token
        self.num_forwards[here] += step.num_forwards
        self.num_tokens_read[here] += step.num_tokens_read


def _denoise(denoiser: Denoiser, batch: _Batch, end_token_ids: Sequence[int], on_step: OnStep | None) -> None:
    ends = torch.tensor(list(end_token_ids), dtype=batch.rows.ids.dtype, device=batch.rows.ids.device)
    number = 0
    rows = batch.unfinished()
    while len(rows.ids):
        step = denoiser.advance(rows)
        batch.take(rows, step, _end_rows(rows, ends) if len(ends) else None, number)
        if on_step:
            on_step(number, batch.rows.ids.clone(), batch.rows.is_masked.clone(), batch.step_of_token == number)
        number += 1
        if not bool(rows.is_masked.any(1).all()):
            rows = batch.unfinished()


def _end_rows(rows: OpenRows, ends: Int[Tensor, "E"]) -> Bool[Tensor, "A T"]:
    """Finishes rows that hold a kept end token and nothing masked before it: what was open after it becomes the end.

    Returns:
        Positions behind the ends of rows.
    """
    is_end = torch.isin(rows.ids, ends) & rows.is_open & ~rows.is_masked
    num_ends = is_end.cumsum(1)
    is_ended = is_end.any(1) & ~(rows.is_masked & (num_ends == 0)).any(1)
    is_after = (num_ends > 0) & ~(is_end & (num_ends == 1)) & rows.is_open & is_ended[:, None]
    rows.ids = torch.where(is_after, ends[0], rows.ids)
    rows.is_masked = rows.is_masked & ~is_after
    return is_after


def _refuse_what_cannot_be_sampled(
    facts: ConversionFacts,
    is_open: Bool[Tensor, "B T"],
    document_ids: Int[Tensor, "B T"],
    settings: SamplerSettings,
) -> None:
    if facts.layout == "block":
        raise UserError(
            f"this model has layout 'block' (block size {facts.block_size}): it is denoised not all at once "
            "but block by block, as generate does (sampling.blocks.engine.BlockEngine)"
        )
    if settings.cache != "none" and bool((document_ids > 0).any()):
        raise UserError(f"cache={settings.cache!r} needs rows of one document each; leave it out, or split the rows")
    unpredicted = (is_open & ~predictable(document_ids, facts.shift)).nonzero()
    if len(unpredicted):
        row, position = unpredicted[0].tolist()
        raise UserError(
            f"position {position} of row {row} is open, but no state predicts it: with shift {facts.shift} open "
            "positions are never padding, and with shift 1 never the first of a document; give at least one token first"
        )
