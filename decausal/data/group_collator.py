"""Batches of drafts: clean rows, and the groups of masks that are read after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decausal.data.counts import counted
from decausal.data.stream import Batch, KlMean, clean_rows
from decausal.diffusion.groups import Groups, groups_of, offset_weights
from decausal.diffusion.shift import predictable


@dataclass(frozen=True)
class GroupCollator:
    """Stacks items of a `TrainingStream` with a `Grouping` (or of rollouts, in the same form) into a batch.

    The batch holds, for B rows of T tokens and G masks:
        clean_ids [B T]; document_ids, position_ids [B T], absent where every row is one whole document: the clean rows;
        groups: the masks, see `decausal.diffusion.groups.Groups`;
        target_index [n]: the state that predicts each target, in the list of all B*T clean states and then all B*G
        states of masks;
        target_ids, next_token_index, teacher_index, target_weight, logit_weight [n]: as in `Collator`, and
        aligned_index, the same as target_index: a mask's state is compared with the clean one in its place, which
        predicts the same token;
        causal_index, causal_teacher_index, causal_target_ids [c]: clean states that predict a predictable token, and
        the token;
        counts: as in `Collator`.

    Attributes:
        context_length: Positions that the model has, None for no limit.
        offset_gamma: See `decausal.diffusion.groups.offset_weights`.
        kl_mean: "token": weighted mean over targets; "sequence": weighted means of documents, then over documents.
        row_multiple: Rows of masks are padded to a multiple of this.
    """

    context_length: int | None = None
    offset_gamma: float | None = None
    kl_mean: KlMean = "token"
    row_multiple: int = 1

    def __call__(self, items: Sequence[dict[str, Tensor]]) -> Batch:
        names = ("clean_ids", "document_ids", "is_predictable", "is_first")
        clean_ids, document_ids, is_predictable, is_first = (
            torch.stack([item[name] for item in items]) for name in names
        )
        lengths = torch.stack([item["group_length"] for item in items])
        groups = groups_of(is_first, document_ids, is_predictable, lengths, self.context_length, self.row_multiple)
        weight = offset_weights(groups.offset, self.offset_gamma).double()
        logit_weight = weight
        if self.kl_mean == "sequence":
            logit_weight = weight / _sum_in_document(groups, document_ids, weight)
        target_index = clean_ids.numel() + groups.target_mask
        causal_target = (is_predictable & predictable(document_ids, shift=1)).reshape(-1).nonzero()[:, 0]
        flat_ids = clean_ids.reshape(-1)
        return clean_rows(clean_ids, document_ids) | {
            "groups": groups,
            "target_index": target_index,
            "target_ids": flat_ids[groups.target_token],
            "target_weight": weight.float(),
            "next_token_index": groups.target_token - 1,
            "logit_weight": logit_weight.float(),
            "aligned_index": target_index,
            "teacher_index": groups.target_token - 1,
            "causal_index": causal_target - 1,
            "causal_teacher_index": causal_target - 1,
            "causal_target_ids": flat_ids[causal_target],
            "counts": counted(
                clean=int((document_ids >= 0).sum()),
                supervised=len(target_index),
                tokens=float(weight.sum()),
                next_tokens=float(logit_weight.sum()),
                aligned=len(target_index),
                finished=len(causal_target),
            ),
        }


def _sum_in_document(groups: Groups, document_ids: Tensor, weight: Tensor) -> Tensor:
    """Returns the sum of the weights of all targets in each target's document."""
    length = document_ids.shape[1]
    row = groups.target_token // length
    document = row * length + document_ids.reshape(-1)[groups.target_token]  # at most `length` documents in a row
    return torch.bincount(document, weights=weight)[document]
