"""What a task is, one example of it, and when a completion of its prompt is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Task:
    """One kind of problem.

    Attributes:
        name: what data sources and reports call it.
        make: draws a problem of a size: its prompt, and its completion with all steps written out.
        sizes: the sizes that examples have, each as often as any other; what size means is the task's own affair.
        has_steps: the completion may write steps; its answer is what follows its last "=".
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
    """A problem and how it is solved: `prompt` + `completion` is the whole text."""

    task: Task
    prompt: str
    completion: str

    @property
    def answer(self) -> str:
        """The final answer alone, without the steps."""
        return self.task.final_answer(self.completion)


def is_right(example: Example, completion: str) -> bool:
    """Whether a completion, without the end-of-text token, ends in the example's final answer, character by character.

    Of a task with steps, only what follows the last "=" counts: a slip that does not reach the answer is forgiven, and
    so are steps left out. Of the others, the whole completion is the answer.
    """
    return example.task.final_answer(completion) == example.answer
