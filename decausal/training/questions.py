"""What losses ask of the frozen AR model. Questions are values, so shared ones are asked once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from decausal.data.stream import Batch
from decausal.objectives.logits import States, TopK
from decausal.training.teacher import Teacher


class Place(NamedTuple):
    """States of the teacher: a layer (-1 is the last), and the batch's name for their flat positions in clean rows."""

    layer: int
    index: str


class Vocabulary(NamedTuple):
    """What the student can predict: rows of its head, except the mask token."""

    size: int
    mask_token_id: int


@runtime_checkable
class Question(Protocol):
    """A hashable value that says which states it needs, and what it makes from them."""

    @property
    def places(self) -> tuple[Place, ...]: ...

    def answer(self, teacher: Teacher, states: list[Tensor], vocabulary: Vocabulary) -> Any: ...


Answers = Mapping[Question, Any]


@dataclass(frozen=True)
class HiddenStates:
    """The states of some layers at the positions that the batch calls `index`: a list of [m D]."""

    layers: tuple[int, ...]
    index: str

    @property
    def places(self) -> tuple[Place, ...]:
        return tuple(Place(layer, self.index) for layer in self.layers)

    def answer(
        self, teacher: Teacher, states: list[Float[Tensor, "_ D"]], vocabulary: Vocabulary
    ) -> list[Float[Tensor, "_ D"]]:
        return states


@dataclass(frozen=True)
class NextTokens:
    """The next-token distributions at the positions that the batch calls `index`.

    Attributes:
        index: Name of the flat positions in clean rows.
        top_k: How many of the most probable tokens to keep. None: the full vocabulary.
    """

    index: str
    top_k: int | None = None

    @property
    def places(self) -> tuple[Place, ...]:
        return (Place(-1, self.index),)

    def answer(self, teacher: Teacher, states: list[Float[Tensor, "_ D"]], vocabulary: Vocabulary) -> TopK | States:
        return teacher.distribution(
            states[0], self.top_k, banned=vocabulary.mask_token_id, vocabulary_size=vocabulary.size
        )


def ask(
    teacher: Teacher | None, questions: Iterable[Question], batch: Batch, vocabulary: Vocabulary
) -> dict[Question, Any]:
    """Returns the answers to all questions from one pass of the teacher. Without questions there is no pass."""
    questions = list(dict.fromkeys(questions))
    places = list(dict.fromkeys(place for question in questions for place in question.places))
    if not places:
        return {}
    assert teacher is not None
    wanted = [(layer, batch[index]) for layer, index in places]
    read = teacher.read(batch["clean_ids"], wanted, batch.get("document_ids"), batch.get("position_ids"))
    states = dict(zip(places, read, strict=True))
    return {
        question: question.answer(teacher, [states[place] for place in question.places], vocabulary)
        for question in questions
    }
