"""What one training forward computes: the student's pass over a noised batch, and the sums of its losses."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from decausal.diffusion.layout import Layout
from decausal.models.backbone import body_forward, head_of
from decausal.objectives.head import Head
from decausal.objectives.hidden import alignment_at
from decausal.objectives.logits import States, TopK, chunked_divergence
from decausal.objectives.tokens import chunked_cross_entropy
from decausal.training.schedule import WeightSchedule
from decausal.training.sharding import gather_head

# In the order of a batch's denominators.
TERMS = ("tokens", "alignment", "logits", "causal_logits")


@dataclass(frozen=True)
class Distillation:
    """How next-token distributions are compared, see `decausal.objectives.logits.chunked_divergence`.

    Attributes:
        divergence: "forward_kl", "reverse_kl" or "jsd".
        beta: of "jsd".
        top_k: tokens of the teacher's to compare on; None: all.
        tail_bucket: with `top_k`, whether all other tokens count as one.
    """

    divergence: str = "forward_kl"
    beta: float = 0.5
    top_k: int | None = None
    tail_bucket: bool = False


@dataclass(frozen=True)
class Supervision:
    """What a noised row is compared with, and under which layout it is read.

    Attributes:
        layout: who attends to whom in the student.
        mask_token_id: never a prediction: the head gives it no probability.
        tokens: weight of the token loss by step.
        papl: weight of the second token term, mean of stop_gradient(p) * CE (planner-aware loss; 0 or 1 in use).
        alignment: weight of the hidden-state term by step; None leaves it out.
        aligned_layers: indices into the L + 1 hidden states.
        distance: "cosine" or "l2".
        logits: weight, by step, of the divergence from the teacher's next-token distribution at targets; None leaves it
            out.
        causal_logits: the same at finished tokens, for block layouts.
        distillation: how these two compare.
        anneal_steps: steps over which attention opens from causal to `layout`; 0 starts there.
    """

    layout: Layout
    mask_token_id: int
    tokens: WeightSchedule = WeightSchedule(1.0)  # noqa: RUF009 - a frozen value
    papl: float = 0.0
    alignment: WeightSchedule | None = None
    aligned_layers: tuple[int, ...] = ()
    distance: str = "cosine"
    logits: WeightSchedule | None = None
    causal_logits: WeightSchedule | None = None
    distillation: Distillation = Distillation()
    anneal_steps: int = 0

    @property
    def schedules(self) -> dict[str, WeightSchedule]:
        """The weights of the terms in use, by their names in `TERMS`."""
        schedules = {name: getattr(self, name) for name in TERMS}
        return {name: schedule for name, schedule in schedules.items() if schedule is not None}

    def weights(self, step: int) -> dict[str, float]:
        """The terms of a step and their weights, none of them 0 - but where all are, the token loss at 0."""
        weights = {name: schedule(step) for name, schedule in self.schedules.items()}
        return {name: weight for name, weight in weights.items() if weight} or {"tokens": 0.0}

    def needs_teacher(self, step: int) -> bool:
        """Whether the AR model is compared with at `step` or at any later one."""
        return any(not schedule.is_over(step) for name, schedule in self.schedules.items() if name != "tokens")


class StepLoss:
    """The weighted loss of a training batch, called inside of the student's forward: `model(inside=StepLoss(...))`.

    Under mixed precision FSDP casts what goes into that forward and what comes out of it. This is no dataclass and no
    mapping, in which it would find the batch's weights and states; and sums are divided and weighed before they leave.

    Args:
        model: the stock student.
        batch: see `loss_sums`.
        supervision: what to compare with.
        weights: of each term that counts.
        counts: what the sum of each term in `TERMS` is divided by.

    Attributes:
        means: each term's mean, detached, once it was called.
        value: what it returned, detached, as it was before it went through FSDP.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: dict[str, Any],
        supervision: Supervision,
        weights: dict[str, float],
        counts: Float[Tensor, "4"],
    ) -> None:
        self.model, self.batch, self.supervision, self.weights, self.counts = model, batch, supervision, weights, counts
        self.means: dict[str, Tensor] = {}
        self.value: Tensor | None = None

    def __call__(self) -> Float[Tensor, ""]:
        sums = loss_sums(self.model, self.batch, self.supervision, tuple(self.weights))
        loss = torch.zeros((), device=self.counts.device)
        for name, count in zip(TERMS, self.counts.unbind(), strict=True):
            if name in self.weights:
                mean = sums[name] / count
                self.means[name] = mean.detach()
                loss = loss + self.weights[name] * mean
        self.value = loss.detach()
        return loss


def install_training_forward(model: PreTrainedModel) -> None:
    """Makes `model(inside=function)` call the function, and return what it returns; every other call stays as it was.

    Losses run inside of the module's own forward because sharding and data-parallel wrappers only see that: a head
    applied outside of it would find its weights sharded away. The model stays the stock class, and so does what is
    saved of it.
    """
    stock_forward = model.forward

    def forward(*args: Any, inside: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        if inside is None:
            return stock_forward(*args, **kwargs)
        gather_head(model)
        return inside()

    model.forward = forward


def remove_training_forward(model: PreTrainedModel) -> None:
    """Gives the model its class's own forward back."""
    model.__dict__.pop("forward", None)


def loss_sums(
    model: nn.Module, batch: dict[str, Any], supervision: Supervision, terms: Collection[str] = ("tokens",)
) -> dict[str, Tensor]:
    """Returns sums, not means: what they are means over is known only when the whole global batch has been seen.

    Args:
        model: the student, stock or wrapped by PEFT.
        batch: see `decausal.data.stream.Collator` and `decausal.data.block_collator.BlockCollator`; with
            `future_order` [T T] and `future_fraction` for annealed attention, and with what the terms need of the
            teacher (`decausal.training.trainer`): "alignment" needs `teacher_states`, a list of [m D], one per aligned
            layer; "logits" and "causal_logits" need `teacher_next` and `teacher_causal`, from `Teacher.distribution`.
        supervision: what to compare with.
        terms: names out of `TERMS`.

    Returns:
        The sum of each term, differentiable, by its name; of the alignment the mean over layers. With the token loss,
        "nll": its unweighted counterpart, detached.
    """
    output = _student_forward(model, batch, supervision, output_hidden_states="alignment" in terms)
    sums: dict[str, Tensor] = {}
    head = head_of(model)._replace(banned=supervision.mask_token_id)
    states = output.last_hidden_state.flatten(0, 1)
    if "tokens" in terms or "logits" in terms:
        rows = states.index_select(0, batch["target_index"])
    if "tokens" in terms:
        loss = chunked_cross_entropy(rows, head, batch["target_ids"], batch["target_weight"], papl=supervision.papl)
        sums |= {"tokens": loss.loss_sum, "nll": loss.nll.sum()}
    if "alignment" in terms:
        distances = [
            alignment_at(output.hidden_states[layer], batch["aligned_index"], of_teacher, supervision.distance)
            for layer, of_teacher in zip(supervision.aligned_layers, batch["teacher_states"], strict=True)
        ]
        sums["alignment"] = torch.stack(distances).mean()
    if "logits" in terms:
        sums["logits"] = _divergence(rows, head, batch["teacher_next"], batch["logit_weight"], supervision)
    if "causal_logits" in terms:
        rows = states.index_select(0, batch["causal_index"])
        weights = torch.ones(len(rows), device=rows.device)
        sums["causal_logits"] = _divergence(rows, head, batch["teacher_causal"], weights, supervision)
    return sums


def _divergence(rows: Tensor, head: Head, teacher: TopK | States, weights: Tensor, supervision: Supervision) -> Tensor:
    how = supervision.distillation
    loss = chunked_divergence(rows, head, teacher, weights, how.divergence, beta=how.beta, tail_bucket=how.tail_bucket)
    return loss.loss_sum


def _student_forward(
    model: nn.Module, batch: dict[str, Any], supervision: Supervision, *, output_hidden_states: bool
) -> BaseModelOutput:
    if supervision.layout.kind == "block":
        return body_forward(
            model,
            batch["student_ids"],
            supervision.layout,
            document_ids=batch["student_document_ids"],
            position_ids=batch["student_position_ids"],
            stream_ids=batch["stream_ids"],
            output_hidden_states=output_hidden_states,
        )
    views = len(batch["noised_ids"]) // len(batch["clean_ids"])
    return body_forward(
        model,
        batch["noised_ids"],
        supervision.layout,
        document_ids=_per_view(batch.get("document_ids"), views),
        position_ids=_per_view(batch.get("position_ids"), views),
        future=(batch["future_order"], batch["future_fraction"]) if "future_order" in batch else None,
        output_hidden_states=output_hidden_states,
    )


def _per_view(rows: Tensor | None, views: int) -> Tensor | None:
    return rows if rows is None or views == 1 else rows.repeat_interleave(views, dim=0)
