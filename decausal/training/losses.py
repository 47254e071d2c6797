"""A training forward: the student's pass over a noised batch, and the sums of its losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from decausal.data.stream import Batch
from decausal.diffusion.layout import Layout
from decausal.models.backbone import body_forward, denoising_head
from decausal.models.grouped import grouped_forward
from decausal.training.questions import Answers, Question, Vocabulary, ask
from decausal.training.schedule import WeightSchedule
from decausal.training.sharding import gather_head
from decausal.training.teacher import CleanHalf
from decausal.training.terms import Reading, Term, TokenTerm


class Weighted(NamedTuple):
    """A loss and its weight by step."""

    term: Term
    schedule: WeightSchedule


TOKENS_ONLY = (Weighted(TokenTerm(), WeightSchedule(1.0)),)


@dataclass(frozen=True)
class Supervision:
    """What noised rows are compared with, and the layout under which they are read.

    Attributes:
        layout: Who attends to whom in the student.
        mask_token_id: The mask token, to which the head gives no probability.
        losses: The losses, at least one.
        anneal_steps: Steps over which attention opens from causal to `layout`; 0 starts with `layout`.
        is_gated: The student's weights are the AR model's except at masks, so its own clean half teaches the masks.
    """

    layout: Layout
    mask_token_id: int
    losses: tuple[Weighted, ...] = TOKENS_ONLY
    anneal_steps: int = 0
    is_gated: bool = False

    def weights(self, step: int) -> dict[Term, float]:
        """Returns the terms of a step with their weights, without those of weight 0. If all are 0, the first term at
        0."""
        weights = {term: schedule(step) for term, schedule in self.losses}
        return {term: weight for term, weight in weights.items() if weight} or {self.losses[0].term: 0.0}

    def needs_teacher(self, step: int) -> bool:
        """Returns whether another model is needed at `step` or any later one."""
        return not self.is_gated and any(
            term.questions and not schedule.is_over(step) for term, schedule in self.losses
        )


def weighted_loss(
    model: nn.Module,
    batch: Batch,
    supervision: Supervision,
    weights: Mapping[Term, float],
    counts: Mapping[str, Float[Tensor, ""]],
    answers: Answers,
) -> tuple[Float[Tensor, ""], dict[Term, Float[Tensor, ""]]]:
    """Returns the weighted loss of a training batch, and each term's mean, detached.

    Call it inside the student's forward, `model(inside=...)`. There sums are divided and weighted before FSDP's mixed
    precision casts the result.

    Args:
        model: The student.
        batch: See `loss_sums`.
        supervision: How the student reads.
        weights: The weight of each term that counts.
        counts: Denominators of the global batch by `Count`; at least 1 is used.
        answers: The teacher's answers to the questions of these terms.
    """
    sums = loss_sums(model, batch, supervision, weights, answers)
    means = {term: total / counts[term.count].clamp(min=1.0) for term, total in sums.items()}
    return weighed(means, weights), {term: mean.detach() for term, mean in means.items()}


def weighed(means: Mapping[Term, Float[Tensor, ""]], weights: Mapping[Term, float]) -> Float[Tensor, ""]:
    """Returns the loss from the terms' means."""
    return torch.stack([weights[term] * term.factor(means) * mean for term, mean in means.items()]).sum()


def install_training_forward(model: PreTrainedModel) -> None:
    """Makes `model(inside=function)` call the function and return its result. Other calls are not changed.

    Losses run inside the module's own forward because sharding and data-parallel wrappers only see that. Outside of it,
    the head's weights may be sharded. The model and what is saved of it stay the stock class.
    """
    stock_forward = model.forward

    def forward(*args: Any, inside: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        if inside is None:
            return stock_forward(*args, **kwargs)
        gather_head(model)
        return inside()

    model.forward = forward


def remove_training_forward(model: PreTrainedModel) -> None:
    """Restores the forward of the model's class."""
    model.__dict__.pop("forward", None)


def loss_sums(
    model: nn.Module,
    batch: Batch,
    supervision: Supervision,
    terms: Iterable[Term] = (TokenTerm(),),
    answers: Answers | None = None,
) -> dict[Term, Float[Tensor, ""]]:
    """Returns sums, not means, because the denominators are only known for the whole global batch.

    Args:
        model: The student, stock or wrapped by PEFT.
        batch: See `decausal.data.stream.Collator` and `decausal.data.block_collator.BlockCollator`, or
            `decausal.data.group_collator.GroupCollator`; with `future_order` [T T] and `future_fraction` for
            annealed attention.
        supervision: How the student reads.
        terms: What to compare.
        answers: The teacher's answers to the questions of these terms.

    Returns:
        The sum of each term, differentiable.
    """
    terms = list(terms)
    return sums_of_reading(model, student_reading(model, batch, supervision, terms), supervision, terms, answers)


def student_reading(model: nn.Module, batch: Batch, supervision: Supervision, terms: Iterable[Term]) -> Reading:
    """Returns what the student's forward pass gives the terms; see `loss_sums`."""
    last_states, all_states = _student_states(
        model, batch, supervision, output_hidden_states=any(term.reads_all_states for term in terms)
    )
    return Reading(batch, last_states, all_states, denoising_head(model, supervision.mask_token_id))


def sums_of_reading(
    model: nn.Module,
    reading: Reading,
    supervision: Supervision,
    terms: Iterable[Term],
    answers: Answers | None,
) -> dict[Term, Float[Tensor, ""]]:
    """Returns the sum of each term over what a student has read; see `loss_sums`."""
    terms = list(terms)
    if supervision.is_gated:
        answers = _answers_of_clean_half(model, reading, supervision, terms)
    return {term: term.sum(reading, answers or {}) for term in terms}


def _answers_of_clean_half(
    model: nn.Module, reading: Reading, supervision: Supervision, terms: Iterable[Term]
) -> dict[Question, Any]:
    """Returns the AR model's answers from states that a gated student has already computed.

    Clean states come first in the reading, in the order of the clean rows.
    """
    questions = [question for term in terms for question in term.questions]
    vocabulary = Vocabulary(len(reading.head.weight), supervision.mask_token_id)
    return ask(CleanHalf(model, reading.last_states, reading.all_states), questions, reading.batch, vocabulary)


def _student_states(
    model: nn.Module, batch: Batch, supervision: Supervision, *, output_hidden_states: bool
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Returns the states after the final norm of all rows, one after another, and those of all layers if asked for."""
    if "groups" in batch:
        return grouped_forward(
            model,
            batch["clean_ids"],
            batch["groups"],
            supervision.mask_token_id,
            document_ids=batch.get("document_ids"),
            position_ids=batch.get("position_ids"),
            causal_groups=supervision.layout.causal_groups,
            clean_gradient=not supervision.is_gated,
            output_hidden_states=output_hidden_states,
        )
    output = _student_forward(model, batch, supervision, output_hidden_states=output_hidden_states)
    return output.last_hidden_state.flatten(0, 1), output.hidden_states


def _student_forward(
    model: nn.Module, batch: Batch, supervision: Supervision, *, output_hidden_states: bool
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
