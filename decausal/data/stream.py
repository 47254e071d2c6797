"""Packed rows to training batches: order, noise and index sets, all functions of (seed, position in the run).

Everything random about a training row follows from the run's seed and the row's position since the start of the run.
So a run resumes by skipping to a position, and a batch holds the same noised rows whether it is made at once, in
micro-batches or on several processes. Index sets are made here, on the CPU, so that a step never waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from decausal.diffusion.layout import is_packed, positions_in_documents
from decausal.diffusion.noise import draw_noise
from decausal.diffusion.shift import predictable, predicting_index

Weighting = Literal["none", "inverse_t"]
AlignedPositions = Literal["targets", "visible", "all"]
Batch = dict[str, Tensor]


@runtime_checkable
class Rows(Protocol):
    """Packed rows: row i holds clean_ids [T], document_ids [T] (-1 is padding) and is_maskable [T]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Noising:
    """How clean rows become noised views.

    Attributes:
        views: noised views of one clean row, K. One teacher pass serves them all.
        complementary: with K = 2, the second view masks exactly what the first leaves, at level 1 - t.
        stratified: spread noise levels evenly over neighbouring rows instead of drawing them independently.
    """

    views: int = 1
    complementary: bool = False
    stratified: bool = True


class TrainingStream(Dataset[dict[str, Tensor]]):
    """The run's training rows in the order they are trained on; item p is a function of (seed, p) alone.

    Rows are shuffled anew in each epoch. `noising` None leaves them clean: autoregressive training.
    """

    def __init__(self, rows: Rows, num_samples: int, *, seed: int, shift: int, noising: Noising | None) -> None:
        self.rows = rows
        self.num_samples = num_samples
        self.seed = seed
        self.shift = shift
        self.noising = noising
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.num_samples

    def row_index(self, position: int) -> int:
        """Returns which row stands at `position` of the run."""
        epoch, offset = divmod(position, len(self.rows))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
            self._epoch = epoch
        return int(self._order[offset])

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        row = self.rows[self.row_index(position)]
        is_predictable = row["is_maskable"] & predictable(row["document_ids"][None], self.shift)[0]
        item = {"clean_ids": row["clean_ids"], "document_ids": row["document_ids"], "is_predictable": is_predictable}
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
        )
        return item | {"is_masked": noise.is_masked, "level": noise.level}


@dataclass(frozen=True)
class Collator:
    """Stacks items of a `TrainingStream` into a batch.

    The batch holds, for B rows of T tokens in K views (views of row 0 first, then of row 1, ...):
        clean_ids [B T], noised_ids [B*K T];
        document_ids, position_ids [B T], absent where every row is one whole document without padding;
        target_index [n]: flat index into [B*K*T] of the state that predicts each target;
        target_ids [n], target_weight [n] (1, or 1/t);
        aligned_index, teacher_index [m]: the aligned states, in [B*K*T] and in [B*T];
        denominators [2]: what the token loss and the alignment are means over. Summed over the whole global batch.
    """

    mask_token_id: int
    shift: int
    weighting: Weighting = "none"
    aligned_positions: AlignedPositions = "targets"
    predict_all: bool = False  # autoregressive training: every predictable token is a target, nothing is masked

    def __call__(self, items: Sequence[dict[str, Tensor]]) -> Batch:
        clean_ids, document_ids, is_predictable, is_masked, level = (
            torch.stack([item[name] for item in items])
            for name in ("clean_ids", "document_ids", "is_predictable", "is_masked", "level")
        )
        num_rows, views, length = is_masked.shape
        view_clean_ids = clean_ids[:, None].expand(num_rows, views, length)
        is_target = is_predictable[:, None] if self.predict_all else is_masked

        target_index = is_target.reshape(-1).nonzero()[:, 0]
        target_weight = torch.ones(len(target_index))
        num_token_terms = len(target_index)
        if self.weighting == "inverse_t" and not self.predict_all:
            target_weight = 1.0 / level.reshape(-1)[target_index]
            num_token_terms = views * int(is_predictable.sum())

        aligned_index = self._aligned_index(target_index, is_masked, document_ids)
        batch = {
            "clean_ids": clean_ids,
            "noised_ids": torch.where(is_masked, self.mask_token_id, view_clean_ids).reshape(-1, length),
            "target_index": predicting_index(target_index, self.shift),
            "target_ids": view_clean_ids.reshape(-1)[target_index],
            "target_weight": target_weight,
            "aligned_index": aligned_index,
            "teacher_index": aligned_index // (views * length) * length + aligned_index % length,
            "denominators": torch.tensor([num_token_terms, len(aligned_index)], dtype=torch.float64),
        }
        if is_packed(document_ids):
            batch["document_ids"] = document_ids
            batch["position_ids"] = positions_in_documents(document_ids)
        return batch

    def _aligned_index(self, target_index: Tensor, is_masked: Tensor, document_ids: Tensor) -> Tensor:
        if self.aligned_positions == "targets":
            return predicting_index(target_index, self.shift)
        is_aligned = (document_ids >= 0)[:, None].expand_as(is_masked)
        if self.aligned_positions == "visible":
            is_aligned = is_aligned & ~is_masked
        return is_aligned.reshape(-1).nonzero()[:, 0]
