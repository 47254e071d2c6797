"""The training steps that are compared: ours, through the library's own code, and the naive forms of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from decausal.data.stream import Batch
from decausal.diffusion.layout import Layout
from decausal.models.backbone import body_forward
from decausal.training.losses import Supervision, loss_sums, weighted_loss
from decausal.training.questions import Vocabulary, ask
from decausal.training.teacher import CAUSAL, Teacher
from decausal.training.terms import AlignmentTerm, TokenTerm

ALIGNMENT_WEIGHT = 10.0
BIDIRECTIONAL = Layout("bidirectional")
IGNORED = -100


@dataclass(frozen=True)
class Arms:
    """The student, its teacher, and how they are compared."""

    student: PreTrainedModel
    teacher: Teacher
    supervision: Supervision
    alignment: AlignmentTerm


@dataclass(frozen=True)
class Case:
    """One kind of step.

    Attributes:
        loss: the forward pass; `backward` on what it returns completes the step.
        views: noised views of each clean row in its batches; the student reads as many rows in every case.
        baseline: the case, on the same batches, that its figures are divided by.
        is_aligned: whether the floor includes a teacher.
        time_target, memory_target: the most that the ratios to the baseline may be.
    """

    loss: Callable[[Arms, Batch], Tensor]
    views: int
    baseline: str
    is_aligned: bool
    time_target: float | None = None
    memory_target: float | None = None


def plain(arms: Arms, batch: Batch) -> Tensor:
    """The denoising step."""
    return loss_sums(arms.student, batch, arms.supervision)[TokenTerm()] / batch["counts"]["tokens"]


def aligned(arms: Arms, batch: Batch) -> Tensor:
    """The REPR-ALIGN step."""
    weights = {TokenTerm(): 1.0, arms.alignment: ALIGNMENT_WEIGHT}
    vocabulary = Vocabulary(arms.student.config.vocab_size, arms.supervision.mask_token_id)
    answers = ask(arms.teacher, arms.alignment.questions, batch, vocabulary)
    return weighted_loss(arms.student, batch, arms.supervision, weights, batch["counts"], answers)[0]


def naive_plain(arms: Arms, batch: Batch) -> Tensor:
    """Logits at every position, in fp32, and a cross-entropy that ignores most of them."""
    output = body_forward(arms.student, batch["noised_ids"], BIDIRECTIONAL, **_documents(batch))
    return _naive_token_loss(arms, output.last_hidden_state, batch)


def naive_aligned(arms: Arms, batch: Batch) -> Tensor:
    """And all states of both models stacked, compared everywhere, from a teacher that computes its logits, too."""
    with torch.no_grad():
        teacher = arms.teacher.model
        teacher_output = body_forward(
            teacher, batch["clean_ids"], CAUSAL, **_documents(batch), output_hidden_states=True
        )
        teacher.get_output_embeddings()(teacher_output.last_hidden_state)
    output = body_forward(
        arms.student, batch["noised_ids"], BIDIRECTIONAL, **_documents(batch), output_hidden_states=True
    )
    cosines = functional.cosine_similarity(
        torch.stack(output.hidden_states), torch.stack(teacher_output.hidden_states), dim=-1
    )
    is_aligned = torch.zeros(batch["noised_ids"].numel(), device=cosines.device)
    is_aligned[batch["aligned_index"]] = 1.0
    distance = ((1 - cosines.flatten(1)) * is_aligned).sum() / (is_aligned.sum() * len(cosines))
    return _naive_token_loss(arms, output.last_hidden_state, batch) + ALIGNMENT_WEIGHT * distance


def _naive_token_loss(arms: Arms, hidden: Tensor, batch: Batch) -> Tensor:
    labels = torch.full_like(batch["noised_ids"], IGNORED).flatten()
    labels[batch["target_index"]] = batch["target_ids"]
    logits = arms.student.get_output_embeddings()(hidden).float()
    logits[..., arms.supervision.mask_token_id] = -torch.inf
    return functional.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED)


def _documents(batch: Batch) -> dict[str, Tensor | None]:
    return {"document_ids": batch.get("document_ids"), "position_ids": batch.get("position_ids")}


CASES = {
    "plain": Case(plain, 1, "plain", False),
    "aligned": Case(aligned, 1, "plain", True, time_target=1.30, memory_target=1.15),
    "plain_2_views": Case(plain, 2, "plain_2_views", False),
    "aligned_2_views": Case(aligned, 2, "plain_2_views", True, time_target=1.18, memory_target=1.15),
    "naive_plain": Case(naive_plain, 1, "plain", False),
    "naive_aligned": Case(naive_aligned, 1, "plain", True),
}
