"""Batches of block layouts: the student reads doubled rows, the teacher the clean ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from decausal.data.counts import counted
from decausal.data.stream import AlignedPositions, Batch, Items, KlMean, Targets, Weighting, targets_of
from decausal.diffusion.doubled import Doubled, block_starts, double, needs_copy
from decausal.diffusion.layout import Layout
from decausal.diffusion.shift import predictable


@dataclass(frozen=True)
class BlockCollator:
    """Stacks items of a `TrainingStream` (or of rollouts, in the same form) into a batch of a block layout.

    The batch holds, for B rows of T tokens in K views, whose doubled rows have S places:
        clean_ids [B T]; document_ids, position_ids [B T], absent where every row is one whole document: the teacher's;
        student_ids, student_document_ids, student_position_ids, stream_ids [B S]: see `decausal.diffusion.doubled`;
        target_index [n]: flat index into [B*S] of the state that predicts each target;
        target_ids, target_weight, next_token_index, logit_weight [n]: as in `Collator`;
        aligned_index, teacher_index [m]: the aligned states, in [B*S] and in [B*T];
        causal_index, causal_teacher_index [c]: in [B*S] and in [B*T], clean states that have read exactly what precedes
        a predictable token: any token if the context is causal, else those that begin a block; causal_target_ids [c]:
        these tokens; counts: as in `Collator`.

    Attributes:
        mask_token_id: Stands for masked tokens.
        shift: 0 or 1, see `Doubled.predicting_place`.
        layout: A block layout.
        context_length: Positions that the model has, or None.
        weighting, kl_mean: See `targets_of`.
        aligned_positions: "targets": the states that predict targets. "visible": those of tokens that are not masked,
            including the clean stream. "all": those of masked tokens too. Only the last two need copies of all blocks
            with a predictable token. Otherwise a view holds only the blocks of its targets.
        row_multiple: Doubled rows are padded to a multiple of this, so that few lengths occur.
    """

    mask_token_id: int
    shift: int
    layout: Layout
    context_length: int | None = None
    weighting: Weighting = "none"
    aligned_positions: AlignedPositions = "targets"
    kl_mean: KlMean = "token"
    row_multiple: int = 1

    def __call__(self, items: Sequence[dict[str, Tensor]]) -> Batch:
        stacked = Items.stack(items)
        targets = Targets.where(stacked.is_masked & stacked.is_predictable[:, None])
        rows = self._doubled(stacked)
        of_targets = targets_of(stacked, targets, self.weighting, self.kl_mean)
        target_index = rows.predicting_place(targets.view + 1, targets.token_index, self.shift)
        aligned_index = self._aligned_index(rows, target_index)
        causal_target = self._causal_targets(stacked, rows)
        counts = counted(aligned=len(aligned_index), finished=len(causal_target))
        return (
            stacked.clean_rows()
            | of_targets
            | {
                "student_ids": rows.ids,
                "student_document_ids": rows.document_ids,
                "student_position_ids": rows.position_ids,
                "stream_ids": rows.stream_ids,
                "target_index": target_index,
                "aligned_index": aligned_index,
                "teacher_index": rows.source_index.reshape(-1)[aligned_index],
                "causal_index": rows.place_of(0, causal_target - 1),
                "causal_teacher_index": causal_target - 1,
                "causal_target_ids": stacked.clean_ids.reshape(-1)[causal_target],
                "counts": of_targets["counts"] | counts,
            }
        )

    def _doubled(self, items: Items) -> Doubled:
        is_noised = items.is_predictable
        if self.aligned_positions == "targets":
            is_first = block_starts(items.document_ids, self.layout.block_size)
            is_noised = needs_copy(items.is_masked & items.is_predictable[:, None], is_first, self.shift)
        return double(
            items.clean_ids,
            items.document_ids,
            is_noised,
            items.is_masked,
            self.mask_token_id,
            self.layout.block_size,
            self.context_length,
            self.row_multiple,
        )

    def _aligned_index(self, rows: Doubled, target_index: Tensor) -> Tensor:
        if self.aligned_positions == "targets":
            return target_index
        is_aligned = rows.source_index >= 0
        if self.aligned_positions == "visible":
            is_aligned = is_aligned & (rows.ids != self.mask_token_id)
        return is_aligned.reshape(-1).nonzero()[:, 0]

    def _causal_targets(self, items: Items, rows: Doubled) -> Tensor:
        is_target = items.is_predictable & predictable(items.document_ids, shift=1)
        if not self.layout.causal_context:
            is_target = is_target & rows.is_block_start
        return is_target.reshape(-1).nonzero()[:, 0]
