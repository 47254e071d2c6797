"""A task, its examples, and the check of a completion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Task:
    """One kind of problem.

    Attributes:
        name: What data sources and reports call it.
        make: Draws a problem of a size: its prompt, and its completion with all steps.
        sizes: The sizes of examples, all equally likely. Each task defines what size means.
        has_steps: Whether the completion may hold steps; the answer then follows its last "=".
    """

    name: str
    make: Callable[[Random, int], tuple[str, str]]
    sizes: tuple[int, ...]
    has_steps: bool = False

    def draw(self, random: Random) -> Example:
        """Returns one example."""
        return Example(self, *self.make(random, random.choice(self.sizes)))

    def final_answer(self, completion: str) -> str:
        """Returns the part of a completion that counts: what follows the last "=", or all of it."""
        return completion.rpartition("=")[2] if self.has_steps else completion


@dataclass(frozen=True)
class Example:
    """A problem and its solution: `prompt` + `completion` is the whole text."""

    task: Task
    prompt: str
    completion: str

    @property
    def answer(self) -> str:
        """The final answer alone, without the steps."""
        return self.task.final_answer(self.completion)


def is_right(example: Example, completion: str) -> bool:
    """Returns whether a completion, without the end-of-text token, ends in exactly the example's final answer.

    In a task with steps only what follows the last "=" counts. Missing steps, and slips that do not change the answer,
    are forgiven. In the other tasks the whole completion is the answer.
    """
    return example.task.final_answer(completion) == example.answer
