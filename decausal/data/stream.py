"""From packed rows to training batches: order, noise and index sets, all functions of (seed, position in the run).

Everything random about a training row follows from the run's seed and the row's position in the run. So a run resumes
by skipping to a position. A batch holds the same noised rows whether it is made at once, in micro-batches or on several
processes. Index sets are made here, on the CPU, so that a step never waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from decausal.data.counts import counted
from decausal.data.streamed_rows import StreamedRows
from decausal.diffusion.grouping import Grouping
from decausal.diffusion.groups import is_first_of_group
from decausal.diffusion.layout import block_numbers, is_packed, positions_in_documents
from decausal.diffusion.noise import draw_noise
from decausal.diffusion.shift import predictable, predicting_index

Weighting = Literal["none", "inverse_t"]
AlignedPositions = Literal["targets", "visible", "all"]
KlMean = Literal["token", "sequence"]
Batch = dict[str, Any]  # tensors by name, and `counts`: scalars by `Count`


@runtime_checkable
class Rows(Protocol):
    """Packed rows: row i holds clean_ids [T], document_ids [T] (-1 is padding) and is_maskable [T]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Noising:
    """How clean rows become noised views.

    Attributes:
        views: Noised views of one clean row, K. They share one teacher pass.
        complementary: With K = 2, the second view masks exactly what the first one leaves, at level 1 - t.
        stratified: Whether noise levels are spread evenly over neighbouring rows instead of drawn independently.
        block_size: Tokens per block if each block has its own noise level. None: each document has one.
    """

    views: int = 1
    complementary: bool = False
    stratified: bool = True
    block_size: int | None = None


class TrainingStream(Dataset[dict[str, Tensor]]):
    """The run's training rows in the order of training. Item p is a function of (seed, p) alone.

    Rows are shuffled again in each epoch, streamed ones within their windows. With `noising` None they stay clean, for
    autoregressive training. With a `Grouping` they stay clean too, and it says where groups of masks begin: `is_first`
    [T] and `group_length`.
    """

    def __init__(
        self, rows: Rows | StreamedRows, num_samples: int, *, seed: int, shift: int, noising: Noising | Grouping | None
    ) -> None:
        self.rows = rows
        self.num_samples = num_samples
        self.seed = seed
        self.shift = shift
        self.noising = noising
        self._number = -1  # of the epoch or window that is in order
        self._order = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.num_samples

    def epochs(self, position: int | float) -> float:
        """Returns how many times all rows have been read at a position of the run."""
        if isinstance(self.rows, StreamedRows):
            return self.rows.epochs(position)
        return position / len(self.rows)

    @property
    def sample(self) -> Rows:
        """All rows, or those of the first window, to look at before training."""
        return self.rows.first if isinstance(self.rows, StreamedRows) else self.rows

    def close(self) -> None:
        """Ends what prepares streamed rows in the background."""
        if isinstance(self.rows, StreamedRows):
            self.rows.close()

    def row_index(self, position: int) -> int:
        """Returns which row stands at `position` of the run."""
        is_streamed = isinstance(self.rows, StreamedRows)
        size = self.rows.window_rows if is_streamed else len(self.rows)
        number, offset = divmod(position, size)
        if number != self._number:
            self._order = np.random.default_rng([self.seed, number]).permutation(size)
            self._number = number
        return int(self._order[offset]) + (number * size if is_streamed else 0)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        row = self.rows[self.row_index(position)]
        item = clean_item(row, self.shift)
        is_predictable = item["is_predictable"]
        if isinstance(self.noising, Grouping):
            return item | self._groups(item, self.noising, position)
        if self.noising is None:
            level = torch.ones(1, len(is_predictable))
            return item | {"is_masked": torch.zeros_like(is_predictable)[None], "level": level}
        noise = draw_noise(
            row["document_ids"],
            is_predictable,
            position=position,
            seed=self.seed,
            views=self.noising.views,
            complementary=self.noising.complementary,
            stratified=self.noising.stratified,
            block_size=self.noising.block_size,
        )
        return item | {"is_masked": noise.is_masked, "level": noise.level}

    def _groups(self, item: dict[str, Tensor], grouping: Grouping, position: int) -> dict[str, Tensor]:
        return places_of_groups(item, grouping, position=position, seed=self.seed, num_rows=self.num_samples)


def clean_item(row: dict[str, Tensor], shift: int) -> dict[str, Tensor]:
    """Returns a row as training reads it: clean_ids, document_ids and is_predictable [T]."""
    is_predictable = row["is_maskable"] & predictable(row["document_ids"][None], shift)[0]
    return {"clean_ids": row["clean_ids"], "document_ids": row["document_ids"], "is_predictable": is_predictable}


def places_of_groups(
    item: dict[str, Tensor], grouping: Grouping, *, position: int, seed: int, num_rows: int
) -> dict[str, Tensor]:
    """Returns where the groups of a row begin, and how long they are, at a position of a run of `num_rows` rows."""
    length = grouping.length_at(position, num_rows)
    is_first = is_first_of_group(
        item["document_ids"], item["is_predictable"], grouping, length, position=position, seed=seed
    )
    return {"is_first": is_first, "group_length": torch.tensor(length)}


class Items(NamedTuple):
    """Items of a `TrainingStream`, stacked: B rows of T tokens in K views."""

    clean_ids: Int[Tensor, "B T"]
    document_ids: Int[Tensor, "B T"]
    is_predictable: Bool[Tensor, "B T"]
    is_masked: Bool[Tensor, "B K T"]
    level: Float[Tensor, "B K T"]

    @staticmethod
    def stack(items: Sequence[dict[str, Tensor]]) -> Items:
        return Items(*(torch.stack([item[name] for item in items]) for name in Items._fields))

    def clean_rows(self) -> Batch:
        """Returns what the teacher reads."""
        return clean_rows(self.clean_ids, self.document_ids)


def clean_rows(clean_ids: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"]) -> Batch:
    """Returns `clean_ids`; with document and position ids only where rows are packed or padded."""
    rows: Batch = {"clean_ids": clean_ids}
    if is_packed(document_ids):
        rows |= {"document_ids": document_ids, "position_ids": positions_in_documents(document_ids)}
    return rows


class Targets(NamedTuple):
    """The n tokens that are predicted, over all views.

    Attributes:
        view_index: Flat index into [B*K*T].
        token_index: Flat index into [B*T].
        view: In 0 .. K - 1.
    """

    view_index: Int[Tensor, " n"]
    token_index: Int[Tensor, " n"]
    view: Int[Tensor, " n"]

    @staticmethod
    def where(is_target: Bool[Tensor, "B K T"]) -> Targets:
        _, views, length = is_target.shape
        view_index = is_target.reshape(-1).nonzero()[:, 0]
        row, view = view_index // (views * length), view_index // length % views
        return Targets(view_index, row * length + view_index % length, view)


def targets_of(items: Items, targets: Targets, weighting: Weighting, kl_mean: KlMean) -> Batch:
    """Returns what losses need for each target, whatever the layout.

    Args:
        items: Rows.
        targets: Their targets.
        weighting: "none": a target's token loss has weight 1. "inverse_t": it has weight 1/t, and the mean is over all
            predictable tokens.
        kl_mean: "token": a target's divergence has weight 1. "sequence": the mean is taken per sequence (a document in
            one view), then over sequences.

    Returns:
        `target_ids`, `target_weight`, `next_token_index` and `logit_weight` [n], as `Collator` describes them, and the
        `counts` that do not depend on the layout.
    """
    target_weight = torch.ones(len(targets.view_index))
    num_token_terms = len(targets.view_index)
    if weighting == "inverse_t":
        target_weight = 1.0 / items.level.reshape(-1)[targets.view_index]
        num_token_terms = items.is_masked.shape[1] * int(items.is_predictable.sum())
    # No teacher's state predicts a document's first token: the index points to the token itself, with weight 0.
    is_next = predictable(items.document_ids, shift=1).reshape(-1)[targets.token_index]
    logit_weight = is_next.double()
    if kl_mean == "sequence":
        logit_weight = logit_weight / _num_in_sequence(items, targets, is_next)
    return {
        "target_ids": items.clean_ids.reshape(-1)[targets.token_index],
        "target_weight": target_weight,
        "next_token_index": targets.token_index - is_next.long(),
        "logit_weight": logit_weight.float(),
        "counts": counted(
            clean=int((items.document_ids >= 0).sum()),
            supervised=len(targets.view_index),
            tokens=num_token_terms,
            next_tokens=float(logit_weight.sum()),
        ),
    }


def _num_in_sequence(items: Items, targets: Targets, is_next: Bool[Tensor, " n"]) -> Float[Tensor, " n"]:
    length = items.is_masked.shape[2]
    sequence = block_numbers(items.document_ids, length).clamp(min=0).reshape(-1)[targets.token_index]
    sequence = (targets.view_index // length) * length + sequence  # at most `length` documents in a row
    return torch.bincount(sequence, weights=is_next.double()).clamp(min=1)[sequence]


@dataclass(frozen=True)
class Collator:
    """Stacks items of a `TrainingStream` into a batch. Block layouts use `BlockCollator`.

    The batch holds, for B rows of T tokens in K views (views of row 0 first, then of row 1, ...):
        clean_ids [B T], noised_ids [B*K T];
        document_ids, position_ids [B T], absent where every row is one whole document without padding;
        target_index [n]: flat index into [B*K*T] of the state that predicts each target;
        target_ids [n], target_weight [n] (1, or 1/t);
        aligned_index, teacher_index [m]: the aligned states, in [B*K*T] and in [B*T];
        next_token_index [n]: flat index into [B*T] of the causal teacher's state that predicts the same target;
        logit_weight [n]: weight of a target's divergence from the teacher's distribution;
        counts: denominators of the losses, and what is trained on. Scalars by `Count`, which the caller sums over the
        whole global batch.
    """

    mask_token_id: int
    shift: int
    weighting: Weighting = "none"
    aligned_positions: AlignedPositions = "targets"
    predict_all: bool = False  # autoregressive training: every predictable token is a target, nothing is masked
    kl_mean: KlMean = "token"

    def __call__(self, items: Sequence[dict[str, Tensor]]) -> Batch:
        stacked = Items.stack(items)
        num_rows, views, length = stacked.is_masked.shape
        view_clean_ids = stacked.clean_ids[:, None].expand(num_rows, views, length)
        targets = Targets.where(stacked.is_predictable[:, None] if self.predict_all else stacked.is_masked)
        of_targets = targets_of(stacked, targets, "none" if self.predict_all else self.weighting, self.kl_mean)
        aligned_index = self._aligned_index(targets.view_index, stacked.is_masked, stacked.document_ids)
        return (
            stacked.clean_rows()
            | of_targets
            | {
                "noised_ids": torch.where(stacked.is_masked, self.mask_token_id, view_clean_ids).reshape(-1, length),
                "target_index": predicting_index(targets.view_index, self.shift),
                "aligned_index": aligned_index,
                "teacher_index": aligned_index // (views * length) * length + aligned_index % length,
                "counts": of_targets["counts"] | counted(aligned=len(aligned_index)),
            }
        )

    def _aligned_index(self, target_index: Tensor, is_masked: Tensor, document_ids: Tensor) -> Tensor:
        if self.aligned_positions == "targets":
            return predicting_index(target_index, self.shift)
        is_aligned = (document_ids >= 0)[:, None].expand_as(is_masked)
        if self.aligned_positions == "visible":
            is_aligned = is_aligned & ~is_masked
        return is_aligned.reshape(-1).nonzero()[:, 0]
