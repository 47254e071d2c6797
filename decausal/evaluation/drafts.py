"""How good a model's drafts are on given text: the share that verified decoding would keep.

A draft is right if it is the token of the text. If the text is the AR model's own greedy answer, verified decoding
would find the same, and take the passes counted here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate.utils import send_to_device
from jaxtyping import Bool, Int
from torch import Tensor, nn

from decausal.data.group_collator import GroupCollator
from decausal.data.stream import Batch, Rows, clean_item, places_of_groups
from decausal.diffusion.grouping import ALL, Grouping
from decausal.errors import UserError
from decausal.evaluation.passes import device_of, in_batches, measuring, spread_indices
from decausal.evaluation.results import DraftFigures
from decausal.models.architecture import context_length
from decausal.models.backbone import stock_model
from decausal.models.draft_head import draft_vocabulary
from decausal.models.facts import ConversionFacts
from decausal.models.grouped import grouped_forward
from decausal.objectives.head import logits

_CHUNK = 512


def evaluate_drafts(
    model: nn.Module, facts: ConversionFacts, rows: Rows, *, num_rows: int | None = None, batch_size: int = 4
) -> DraftFigures:
    """Measures the drafts of a model that was trained on groups of masks.

    Gradients are off and the model is in eval mode. Afterwards its modes are restored.

    Args:
        model: The converted model, or one in training.
        facts: Its layout, block size and mask token.
        rows: Packed rows, see `decausal.data.stream.Rows`.
        num_rows: Measure this many rows, spread evenly over all; None is all.
        batch_size: Rows in a forward pass.

    Raises:
        UserError: No row has two tokens to predict.
    """
    assert facts.block_size is not None
    collator = GroupCollator(context_length(stock_model(model).config))
    grouping = Grouping((facts.block_size,), ALL)
    tally = _Tally(facts.block_size)
    with measuring(model):
        for batch in in_batches(_items(rows, spread_indices(rows, num_rows), grouping), batch_size):
            collated = collator(batch)
            is_first = torch.stack([item["is_first"] for item in batch])
            documents = torch.stack([item["document_ids"] for item in batch])
            tally.add(is_first, documents, *_num_right(model, facts, collated, is_first))
    return tally.figures()


def _items(rows: Rows, indices: list[int], grouping: Grouping) -> Iterator[dict[str, Tensor]]:
    for index in indices:
        item = clean_item(rows[index], shift=1)
        yield item | places_of_groups(item, grouping, position=index, seed=0, num_rows=1)


def _num_right(
    model: nn.Module, facts: ConversionFacts, batch: Batch, is_first: Bool[Tensor, "B T"]
) -> tuple[Int[Tensor, " groups"], Int[Tensor, " groups"]]:
    """Returns how many drafts of each group are right from the first on, and how many tokens of the text it drafts."""
    on_device = send_to_device(batch, device_of(model))
    states = grouped_forward(
        model,
        on_device["clean_ids"],
        on_device["groups"],
        facts.mask_token_id,
        document_ids=on_device.get("document_ids"),
        position_ids=on_device.get("position_ids"),
        causal_groups=facts.causal_groups,
        clean_gradient=False,
    ).last.index_select(0, on_device["target_index"])
    vocabulary = draft_vocabulary(model, facts.mask_token_id)
    best = torch.cat([logits(chunk, vocabulary.head).argmax(-1) for chunk in states.split(_CHUNK)])
    best = vocabulary.ids(best).cpu()
    length, width = facts.block_size, batch["groups"].group_ids.shape[1]
    row, place = batch["groups"].target_mask // width, batch["groups"].target_mask % width
    first_of_row = is_first.sum(1).cumsum(0) - is_first.sum(1)
    group = first_of_row[row] + place // length
    is_right = torch.zeros(int(is_first.sum()), length, dtype=torch.long)
    is_right[group, batch["groups"].offset - 1] = (best == batch["target_ids"]).long()
    num_targets = torch.bincount(group, minlength=len(is_right))
    return is_right.cumprod(1).sum(1), num_targets


class _Tally:
    """Sums over groups, and the passes for a text."""

    def __init__(self, length: int) -> None:
        self.asked, self.right = torch.zeros(2, length, dtype=torch.float64)
        self.num_tokens = self.num_passes = 0

    def add(
        self,
        is_first: Bool[Tensor, "B T"],
        documents: Int[Tensor, "B T"],
        num_right: Int[Tensor, " groups"],
        num_targets: Int[Tensor, " groups"],
    ) -> None:
        place = torch.arange(len(self.asked))
        self.asked += ((place <= num_right[:, None]) & (place < num_targets[:, None])).sum(0)
        self.right += (place < num_right[:, None]).sum(0)
        row, column = is_first.nonzero(as_tuple=True)
        at = {(r, c): n for r, c, n in zip(row.tolist(), column.tolist(), num_right.tolist(), strict=True)}
        for r, c in at:
            if (r, c - 1) not in at or documents[r, c - 1] != documents[r, c]:
                self._write(at, r, c)

    def _write(self, at: dict[tuple[int, int], int], row: int, column: int) -> None:
        """Walks along a text like verified decoding, without the last token."""
        while (row, column) in at:
            brought = sum((row, column + offset) in at for offset in range(at[row, column] + 1))
            self.num_tokens += brought
            self.num_passes += 1
            column += brought

    def figures(self) -> DraftFigures:
        if not self.num_passes:
            raise UserError("no row has two tokens to predict one after the other: there is nothing to draft")
        acceptance = (self.right / self.asked.clamp(min=1)).tolist()
        return DraftFigures(tuple(acceptance), self.num_tokens / self.num_passes, self.num_tokens)
