"""All tasks, and endless examples of them, split by their prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256
from random import Random

from decausal.data.corpus import Split
from decausal.data.tasks.arithmetic import addition, python, word_problem
from decausal.data.tasks.example import Example, Task
from decausal.data.tasks.sequences import brackets, lookup, reversing, sorting
from decausal.errors import UserError, nearest

HELDOUT_FRACTION = 0.05

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("addition", addition, sizes=(2, 3, 4), has_steps=True),
        Task("sorting", sorting, sizes=(5, 6, 7, 8, 9, 10)),
        Task("reversing", reversing, sizes=(5, 6, 7, 8, 9, 10, 11, 12)),
        Task("lookup", lookup, sizes=(3, 4, 5, 6)),
        Task("brackets", brackets, sizes=(3, 4, 5, 6, 7, 8)),
        Task("python", python, sizes=(9,), has_steps=True),
        Task("words", word_problem, sizes=(10, 20, 30), has_steps=True),
    )
}


def examples(names: Sequence[str] = (), split: Split = "train", seed: int = 0) -> Iterator[Example]:
    """Yields endless examples, of each task in turn.

    A task's examples are a function of its name, the split and the seed. Other tasks do not change them.
    Prompts may repeat, but no prompt is in both splits, whatever the seeds.

    Args:
        names: Names in `TASKS`; all of them if empty.
        split: "train" or "heldout".
        seed: Any integer.

    Raises:
        UserError: An unknown task, or one named twice.
    """
    streams = [_stream(task, split, seed) for task in named(names)]
    while True:
        yield from map(next, streams)


def named(names: Sequence[str]) -> list[Task]:
    """Returns tasks by name; all of them if no names are given.

    Raises:
        UserError: An unknown name, or one given twice.
    """
    for number, name in enumerate(names):
        if name not in TASKS:
            raise UserError(f"unknown task '{name}'{nearest(name, TASKS)} Tasks: {', '.join(TASKS)}")
        if name in names[:number]:
            raise UserError(f"task '{name}' is named twice")
    return [TASKS[name] for name in names or TASKS]


def split_of(prompt: str) -> Split:
    """Returns which split a prompt belongs to, from a hash of the prompt."""
    digest = sha256(prompt.encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") / 2**64 < HELDOUT_FRACTION else "train"


def _stream(task: Task, split: Split, seed: int) -> Iterator[Example]:
    random = Random(f"{seed} {task.name} {split}")  # a string is hashed the same way in every process
    while True:
        example = task.draw(random)
        if split_of(example.prompt) == split:
            yield example
