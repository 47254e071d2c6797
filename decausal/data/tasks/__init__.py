"""Small tasks with exact answers: an endless, seeded supply of prompts and completions that a program can check."""

from __future__ import annotations

from decausal.data.tasks.example import Example, Task, is_right
from decausal.data.tasks.stream import TASKS, examples, split_of

__all__ = ["TASKS", "Example", "Task", "examples", "is_right", "split_of"]
