"""The losses, one class each: its name, what it asks of the teacher, its denominator, and its sum.

Everything else loops over `TERMS`: settings, schedules, logs, the teacher's pass and the trainer. docs/extend.md adds
one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from decausal.data.counts import Count
from decausal.data.stream import Batch
from decausal.errors import UserError
from decausal.objectives.head import Head
from decausal.objectives.hidden import alignment_at
from decausal.objectives.logits import chunked_divergence
from decausal.objectives.tokens import chunked_cross_entropy
from decausal.training.questions import Answers, HiddenStates, NextTokens, Question
from decausal.training.settings import ConversionSettings


@dataclass
class Reading:
    """The result of the student's pass over a noised batch.

    Attributes:
        batch: The batch that it has read.
        last_states: The states after the final norm, of all rows one after another.
        all_states: The L + 1 hidden states in the same order, if a term reads them.
        head: The output head, which bans the mask token.
    """

    batch: Batch
    last_states: Float[Tensor, "N D"]
    all_states: tuple[Float[Tensor, "*batch D"], ...] | None
    head: Head
    _gathered: dict[str, Tensor] = field(default_factory=dict)

    def states_at(self, index: str) -> Float[Tensor, "n D"]:
        """Returns the last states at the flat positions that the batch calls `index`, gathered once for all terms."""
        if index not in self._gathered:
            self._gathered[index] = self.last_states.index_select(0, self.batch[index])
        return self._gathered[index]


@dataclass(frozen=True)
class Term(ABC):
    """One loss of a training step. Its fields say how it compares.

    Attributes:
        log_name: The name of its mean in logs.
        setting: The prefix of its settings: `{setting}_weight`, `_schedule`, `_start_step` and `_stop_step`.
        count: The denominator of its sum, over the global batch.
        reads_all_states: Whether it needs the student's hidden states of all layers.
    """

    log_name: ClassVar[str]
    setting: ClassVar[str]
    count: ClassVar[Count]
    reads_all_states: ClassVar[bool] = False

    @classmethod
    def of(cls, settings: ConversionSettings, num_layers: int) -> Term:
        """Returns the term that the settings of a conversion describe."""
        return cls()

    @property
    def questions(self) -> tuple[Question, ...]:
        """The questions to the teacher."""
        return ()

    def factor(self, means: Mapping[Term, Float[Tensor, ""]]) -> Float[Tensor, ""] | float:
        """Returns a factor of its mean apart from its weight, given the means of all terms without gradient."""
        return 1.0

    @abstractmethod
    def sum(self, reading: Reading, answers: Answers) -> Float[Tensor, ""]:
        """Returns the differentiable sum over everything that `count` counts."""


@dataclass(frozen=True)
class TokenTerm(Term):
    """Cross-entropy at targets.

    Attributes:
        papl: Weight of a second sum, of stop_gradient(p) * CE (planner-aware loss; 0 or 1 in use).
    """

    log_name = "token_loss"
    setting = "token"
    count = Count.TOKENS

    papl: float = 0.0

    @classmethod
    def of(cls, settings: ConversionSettings, num_layers: int) -> Term:
        return cls(settings.papl)

    def sum(self, reading: Reading, answers: Answers) -> Float[Tensor, ""]:
        rows, batch = reading.states_at("target_index"), reading.batch
        loss = chunked_cross_entropy(rows, reading.head, batch["target_ids"], batch["target_weight"], papl=self.papl)
        return loss.loss_sum


@dataclass(frozen=True)
class CleanTokenTerm(Term):
    """Cross-entropy at finished tokens, read causally: the autoregressive loss, for block layouts.

    Attributes:
        is_balanced: Scaled to the value of the token loss, without gradient.

    Source: I-DLM (arXiv 2604.11035), its code: a weight of 0.2, or balanced.
    """

    log_name = "clean_loss"
    setting = "clean"
    count = Count.FINISHED

    is_balanced: bool = False

    @classmethod
    def of(cls, settings: ConversionSettings, num_layers: int) -> Term:
        return cls(settings.clean_balanced)

    def factor(self, means: Mapping[Term, Float[Tensor, ""]]) -> Float[Tensor, ""] | float:
        drafted = [mean for term, mean in means.items() if isinstance(term, TokenTerm)]
        return (drafted[0] / means[self].clamp(min=1e-6)).detach() if self.is_balanced and drafted else 1.0

    def sum(self, reading: Reading, answers: Answers) -> Float[Tensor, ""]:
        rows, ids = reading.states_at("causal_index"), reading.batch["causal_target_ids"]
        weights = torch.ones(len(rows), device=rows.device)
        return chunked_cross_entropy(rows, reading.head, ids, weights).loss_sum


@dataclass(frozen=True)
class AlignmentTerm(Term):
    """Distance between hidden states, the mean over layers.

    Attributes:
        layers: Indices into the L + 1 hidden states.
        distance: "cosine" or "l2".
    """

    log_name = "alignment_loss"
    setting = "align"
    count = Count.ALIGNED
    reads_all_states = True

    layers: tuple[int, ...] = ()
    distance: str = "cosine"

    @classmethod
    def of(cls, settings: ConversionSettings, num_layers: int) -> Term:
        return cls(aligned_layers(settings.align_layers, num_layers), settings.align_distance)

    @property
    def questions(self) -> tuple[Question, ...]:
        return (HiddenStates(self.layers, "teacher_index"),)

    def sum(self, reading: Reading, answers: Answers) -> Float[Tensor, ""]:
        assert reading.all_states is not None
        index, (question,) = reading.batch["aligned_index"], self.questions
        distances = [
            alignment_at(reading.all_states[layer], index, of_teacher, self.distance)
            for layer, of_teacher in zip(self.layers, answers[question], strict=True)
        ]
        return torch.stack(distances).mean()


@dataclass(frozen=True)
class DivergenceTerm(Term):
    """Divergence from the teacher's next-token distribution at targets.

    Attributes:
        divergence: "forward_kl", "reverse_kl" or "jsd", see `decausal.objectives.logits.chunked_divergence`.
        beta: The mixture's weight for "jsd".
        top_k: Tokens of the teacher's to compare on; None: all.
        tail_bucket: With `top_k`, whether all other tokens count as one.
    """

    log_name = "kl_loss"
    setting = "kl"
    count = Count.NEXT_TOKENS

    divergence: str = "forward_kl"
    beta: float = 0.5
    top_k: int | None = None
    tail_bucket: bool = False

    @classmethod
    def of(cls, settings: ConversionSettings, num_layers: int) -> Term:
        return cls(settings.kl_divergence, settings.jsd_beta, settings.kl_top_k, settings.kl_tail_bucket)

    @property
    def questions(self) -> tuple[Question, ...]:
        return (NextTokens("next_token_index", self.top_k),)

    def sum(self, reading: Reading, answers: Answers) -> Float[Tensor, ""]:
        return self._sum(reading, answers, "target_index", reading.batch["logit_weight"])

    def _sum(self, reading: Reading, answers: Answers, index: str, weights: Tensor | None) -> Float[Tensor, ""]:
        rows, (question,) = reading.states_at(index), self.questions
        weights = torch.ones(len(rows), device=rows.device) if weights is None else weights
        loss = chunked_divergence(
            rows,
            reading.head,
            answers[question],
            weights,
            self.divergence,
            beta=self.beta,
            tail_bucket=self.tail_bucket,
        )
        return loss.loss_sum


@dataclass(frozen=True)
class FinishedDivergenceTerm(DivergenceTerm):
    """The same at finished tokens, for block layouts."""

    log_name = "causal_kl_loss"
    setting = "causal_kl"
    count = Count.FINISHED

    @property
    def questions(self) -> tuple[Question, ...]:
        return (NextTokens("causal_teacher_index", self.top_k),)

    def sum(self, reading: Reading, answers: Answers) -> Float[Tensor, ""]:
        return self._sum(reading, answers, "causal_index", None)


@dataclass(frozen=True)
class TotalVariationTerm(Term):
    """Half the L1 distance from the teacher's next-token distribution at targets.

    1 minus its mean is the share of tokens drafted from the student that the teacher would accept.
    """

    log_name = "tv_loss"
    setting = "tv"
    count = Count.NEXT_TOKENS

    @property
    def questions(self) -> tuple[Question, ...]:
        return (NextTokens("next_token_index"),)

    def sum(self, reading: Reading, answers: Answers) -> Float[Tensor, ""]:
        rows, (question,) = reading.states_at("target_index"), self.questions
        weights = reading.batch["logit_weight"]
        return chunked_divergence(rows, reading.head, answers[question], weights, "total_variation").loss_sum


TERMS: tuple[type[Term], ...] = (
    TokenTerm,
    CleanTokenTerm,
    AlignmentTerm,
    DivergenceTerm,
    FinishedDivergenceTerm,
    TotalVariationTerm,
)


def aligned_layers(choice: str | tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """Returns the indices into the L + 1 hidden states that `choice` names: all, a third, or indices.

    Raises:
        UserError: An unknown word or an index that the model does not have.
    """
    states = tuple(range(num_layers + 1))
    third = len(states) / 3
    thirds = {
        "all": states,
        "lower": states[: round(third)],
        "middle": states[round(third) : round(2 * third)],
        "upper": states[round(2 * third) :],
    }
    if isinstance(choice, str):
        if choice.isdigit():
            choice = (int(choice),)
        elif choice not in thirds:
            raise UserError(f"--align_layers {choice}: give {', '.join(thirds)}, or indices from 0 to {num_layers}")
        else:
            return thirds[choice]
    outside = [layer for layer in choice if layer not in states]
    if outside or not choice:
        raise UserError(f"--align_layers: the model has states 0 to {num_layers}, not {outside}")
    return tuple(sorted(set(choice)))
