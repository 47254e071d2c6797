"""What one training forward computes: the student's pass over a noised batch, and the sums of its losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from decausal.diffusion.layout import Layout
from decausal.models.backbone import body_forward, head_of
from decausal.objectives.hidden import alignment_at
from decausal.objectives.tokens import chunked_cross_entropy
from decausal.training.schedule import WeightSchedule


@dataclass(frozen=True)
class Supervision:
    """What a noised row is compared with, and under which layout it is read.

    Attributes:
        layout: who attends to whom in the student.
        mask_token_id: never a prediction: the head gives it no probability.
        papl: weight of the second token term, mean of stop_gradient(p) * CE (planner-aware loss; 0 or 1 in use).
        alignment: weight of the hidden-state term by step; None leaves it and the teacher out.
        aligned_layers: indices into the L + 1 hidden states.
        distance: "cosine" or "l2".
        anneal_steps: steps over which attention opens from causal to `layout`; 0 starts there.
    """

    layout: Layout
    mask_token_id: int
    papl: float = 0.0
    alignment: WeightSchedule | None = None
    aligned_layers: tuple[int, ...] = ()
    distance: str = "cosine"
    anneal_steps: int = 0


def install_training_forward(model: PreTrainedModel, supervision: Supervision) -> None:
    """Makes `model(training_batch=batch)` return the batch's loss sums; every other call stays the stock forward.

    The losses run inside the module's own forward because sharding and data-parallel wrappers only see that: a head
    applied outside of it would find its weights sharded away. The model stays the stock class, and so does what is
    saved of it.
    """
    stock_forward = model.forward

    def forward(*args, training_batch: dict[str, Any] | None = None, **kwargs):
        if training_batch is None:
            return stock_forward(*args, **kwargs)
        return loss_sums(model, training_batch, supervision)

    model.forward = forward


def remove_training_forward(model: PreTrainedModel) -> None:
    """Gives the model its class's own forward back."""
    model.__dict__.pop("forward", None)


def loss_sums(model: nn.Module, batch: dict[str, Any], supervision: Supervision) -> dict[str, Tensor]:
    """Returns sums, not means: what they are means over is known only when the whole global batch has been seen.

    Args:
        model: the student, stock or wrapped by PEFT.
        batch: see `decausal.data.stream.Collator`; `teacher_states` (a list of [m D], one per aligned layer) turns the
            alignment on, `future_order` [T T] and `future_fraction` the annealed attention.
        supervision: what to compare with.

    Returns:
        "tokens": the weighted token loss, differentiable. "nll": its unweighted, detached counterpart. "alignment":
        the mean over layers of summed distances, differentiable (absent without a teacher).
    """
    views = len(batch["noised_ids"]) // len(batch["clean_ids"])
    aligned = "teacher_states" in batch
    output = body_forward(
        model,
        batch["noised_ids"],
        supervision.layout,
        document_ids=_per_view(batch.get("document_ids"), views),
        position_ids=_per_view(batch.get("position_ids"), views),
        future=(batch["future_order"], batch["future_fraction"]) if "future_order" in batch else None,
        output_hidden_states=aligned,
    )
    rows = output.last_hidden_state.flatten(0, 1).index_select(0, batch["target_index"])
    head = head_of(model)._replace(banned=supervision.mask_token_id)
    tokens = chunked_cross_entropy(rows, head, batch["target_ids"], batch["target_weight"], papl=supervision.papl)
    sums = {"tokens": tokens.loss_sum, "nll": tokens.nll.sum()}
    if aligned:
        distances = [
            alignment_at(output.hidden_states[layer], batch["aligned_index"], states, supervision.distance)
            for layer, states in zip(supervision.aligned_layers, batch["teacher_states"], strict=True)
        ]
        sums["alignment"] = torch.stack(distances).mean()
    return sums


def _per_view(rows: Tensor | None, views: int) -> Tensor | None:
    return rows if rows is None or views == 1 else rows.repeat_interleave(views, dim=0)
