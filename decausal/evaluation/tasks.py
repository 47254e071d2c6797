"""Accuracy on tasks with exact answers, and tokens per forward pass, of AR and converted models."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decausal.data.encode import SpecialTokens
from decausal.data.tasks import Example, examples, is_right
from decausal.data.tasks.stream import named
from decausal.devices import best_device, decoding_dtype
from decausal.errors import UserError
from decausal.models.adapt import load_source
from decausal.models.checkpoint import Converted, load_converted
from decausal.models.names import is_converted
from decausal.sampling.generate import generate
from decausal.sampling.jobs import Drafts
from decausal.sampling.stopping import end_token_ids

BATCH_SIZE = 64
EXAMPLES_PER_TASK = 100

ArModel = tuple[PreTrainedModel, PreTrainedTokenizerBase]


class Written(NamedTuple):
    """A model's answer to one prompt: the new tokens, including an end token, and the passes that it took."""

    ids: list[int]
    num_forwards: int
    drafts: Drafts | None = None


@dataclass(frozen=True)
class TaskScore:
    """One task's result.

    Attributes:
        task: Its name.
        is_right: Whether the answer to each example was right, in order.
        num_tokens: All written tokens, including end tokens.
        num_forwards: All forward passes. Each row counts those that it took part in.
        drafts: Figures of self-speculation.
    """

    task: str
    is_right: tuple[bool, ...]
    num_tokens: int
    num_forwards: int
    drafts: Drafts | None = None

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return sum(self.is_right) / len(self.is_right)

    @property
    def standard_error(self) -> float | None:
        """The accuracy's standard error over the choice of examples: sqrt(p (1 - p) / (n - 1)). None for one
        example."""
        if len(self.is_right) < 2:
            return None
        return math.sqrt(self.accuracy * (1 - self.accuracy) / (len(self.is_right) - 1))

    @property
    def tokens_per_forward(self) -> float:
        """Written tokens divided by forward passes: 1 for an AR model."""
        return self.num_tokens / max(self.num_forwards, 1)


@dataclass(frozen=True)
class TaskScores:
    """The results of all tasks, which have equal weight in the mean.

    Attributes:
        tasks: Each task's result.
        seconds: Time of writing all answers.
        data_hash: A hash of the prompts and expected completions.
    """

    tasks: tuple[TaskScore, ...]
    seconds: float | None = field(default=None, compare=False)
    data_hash: str = field(default="", compare=False)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of all tasks divided by seconds of writing; None if not timed."""
        return None if not self.seconds else sum(score.num_tokens for score in self.tasks) / self.seconds

    @property
    def accuracy(self) -> float:
        """The mean of the tasks' accuracies."""
        return sum(score.accuracy for score in self.tasks) / len(self.tasks)

    @property
    def standard_error(self) -> float | None:
        """The standard error of the mean. None if a task has only one example."""
        errors = [score.standard_error for score in self.tasks]
        known = [error for error in errors if error is not None]
        return math.hypot(*known) / len(errors) if len(known) == len(errors) else None

    @property
    def tokens_per_forward(self) -> float:
        """All tokens divided by all forward passes."""
        return sum(score.num_tokens for score in self.tasks) / max(sum(score.num_forwards for score in self.tasks), 1)

    @property
    def drafts(self) -> Drafts | None:
        """Figures of self-speculation in all tasks together."""
        return Drafts.sum(score.drafts for score in self.tasks)

    def as_dict(self) -> dict[str, Any]:
        """Returns all figures as plain values: the means, and each task's figures by name under "tasks"."""
        return _figures(self) | {
            "num_examples": sum(len(score.is_right) for score in self.tasks),
            "tokens_per_second": self.tokens_per_second,
            "data_hash": self.data_hash,
            "tasks": {score.task: _figures(score) | {"num_examples": len(score.is_right)} for score in self.tasks},
        }

    def as_table(self) -> Table:
        """Returns the figures as a table for a terminal."""
        table = Table("task", title="right answers", caption=None if self.drafts is None else str(self.drafts))
        for heading in ("accuracy", "± s.e.", "examples", "tokens per forward"):
            table.add_column(heading, justify="right")
        for score in self.tasks:
            table.add_row(score.task, *_cells(score, len(score.is_right)))
        table.add_section()
        table.add_row("mean", *_cells(self, sum(len(score.is_right) for score in self.tasks)))
        return table


def evaluate_tasks(
    model: Converted | ArModel,
    problems: Sequence[Example],
    *,
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int | None = None,
    **options: Any,
) -> TaskScores:
    """Lets a model complete each problem's prompt, and checks its answers.

    A converted model writes like `decausal.sampling.generate.generate`, an AR model greedily.

    Args:
        model: A converted model, or an AR model with its tokenizer.
        problems: Examples of tasks; see `decausal.data.tasks.examples`.
        batch_size: Prompts completed together.
        max_new_tokens: The most tokens to write. None: those of the longest completion of the problems, with its end
            token.
        **options: `SamplerSettings` by name, only for a converted model.

    Raises:
        UserError: No problems, a bad sampler setting, or a prompt that does not fit the model's context.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: must be at least 1")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {max_new_tokens}: must be at least 1")
    tokenizer, ends = model[1], ends_of(model)
    prompts = [problem.prompt for problem in problems]
    max_new_tokens, start = max_new_tokens or longest_completion(problems, tokenizer), time.perf_counter()
    if isinstance(model, Converted):
        generations = generate(model, prompts, batch_size=batch_size, max_new_tokens=max_new_tokens, **options)
        written = [Written(each.ids, each.num_forwards, each.drafts) for each in generations]
    else:
        if options:
            raise UserError(f"{', '.join(options)}: for converted models only; an AR model writes greedily")
        written = write_greedily(*model, prompts, batch_size=batch_size, max_new_tokens=max_new_tokens)
    seconds = time.perf_counter() - start
    return replace(score(problems, written, tokenizer, ends), seconds=seconds, data_hash=_hash_of(problems))


def evaluate_tasks_of(
    model_name_or_path: str | Path,
    names: Sequence[str] = (),
    num_examples: int = EXAMPLES_PER_TASK,
    *,
    device: torch.device | str | None = None,
    **options: Any,
) -> TaskScores:
    """Measures a converted or AR model, given by directory or name, on held-out examples.

    Args:
        model_name_or_path: What `decausal convert` wrote, or an AR model as `load_source` takes it.
        names: Tasks; all of them if empty.
        num_examples: Examples of each task.
        device: Where the model runs. None: CUDA in bfloat16 if there is one, else the CPU.
        **options: See `evaluate_tasks`.

    Raises:
        UserError: As `evaluate_tasks`; there is no such model or task.
    """
    if num_examples < 1:
        raise UserError(f"--num_examples {num_examples}: must be at least 1")
    problems = list(islice(examples(names, "heldout"), num_examples * len(named(names))))
    device = torch.device(device or best_device())
    dtype = decoding_dtype(device)
    if is_converted(model_name_or_path):
        return evaluate_tasks(load_converted(model_name_or_path, dtype, device), problems, **options)
    model, tokenizer = load_source(model_name_or_path, dtype=dtype)
    return evaluate_tasks((model.to(device), tokenizer), problems, **options)


def longest_completion(problems: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the number of tokens of the longest completion, including its end token.

    Raises:
        UserError: There are no problems.
    """
    if not problems:
        raise UserError("there are no examples to measure on: give at least one")
    completions = [problem.completion for problem in problems]
    return 1 + max(map(len, tokenizer(completions, add_special_tokens=False)["input_ids"]))


def ends_of(model: Converted | ArModel) -> tuple[int, ...]:
    """Returns the tokens that end what a model writes."""
    if isinstance(model, Converted):
        return end_token_ids(model)
    listed = getattr(model[0].generation_config, "eos_token_id", None)
    ends = [model[1].eos_token_id, *(listed if isinstance(listed, list) else [listed])]
    return tuple(dict.fromkeys(end for end in ends if end is not None))


def score(
    problems: Sequence[Example],
    written: Sequence[Written],
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
) -> TaskScores:
    """Checks the answer to each problem. Tasks are in the order in which they first appear.

    The text up to the first of `ends` is the completion. Special tokens in it count as text, so they make it wrong.
    """
    by_task: dict[str, list[tuple[bool, Written]]] = defaultdict(list)
    for problem, one in zip(problems, written, strict=True):
        text = tokenizer.decode(_before_end(one.ids, ends), skip_special_tokens=False)
        by_task[problem.task.name].append((is_right(problem, text), one))
    return TaskScores(
        tuple(
            TaskScore(
                task=name,
                is_right=tuple(right for right, _ in results),
                num_tokens=sum(len(one.ids) for _, one in results),
                num_forwards=sum(one.num_forwards for _, one in results),
                drafts=Drafts.sum(one.drafts for _, one in results),
            )
            for name, results in by_task.items()
        )
    )


@torch.no_grad()
def write_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[Written]:
    """Completes prompts with an AR model through transformers' generate: greedy, batched, with a cache."""
    ends, prefix = ends_of((model, tokenizer)), SpecialTokens(tokenizer).prefix
    end = ends[0]
    prompt_ids = [prefix + ids for ids in tokenizer(list(prompts), add_special_tokens=False)["input_ids"]]
    written = []
    for start in range(0, len(prompts), batch_size):
        batch = prompt_ids[start : start + batch_size]
        length = max(map(len, batch))
        ids = torch.tensor([[end] * (length - len(row)) + row for row in batch], device=model.device)
        is_prompt = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in batch], device=model.device)
        completed = model.generate(
            ids,
            attention_mask=is_prompt,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=end,
            eos_token_id=list(ends),
        )
        for row in completed[:, length:].tolist():
            new_ids = row[: len(_before_end(row, ends)) + 1]
            written.append(Written(new_ids, num_forwards=len(new_ids)))
    return written


def _hash_of(problems: Sequence[Example]) -> str:
    asked = repr([(each.task.name, each.prompt, each.completion) for each in problems])
    return xxhash.xxh3_128_hexdigest(asked.encode())


def _before_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    return list(takewhile(lambda each: each not in ends, ids))


def _figures(scores: TaskScore | TaskScores) -> dict[str, Any]:
    drafts = {} if scores.drafts is None else {"drafts": scores.drafts.as_dict()}
    return {
        "accuracy": scores.accuracy,
        "standard_error": scores.standard_error,
        "tokens_per_forward": scores.tokens_per_forward,
        **drafts,
    }


def _cells(scores: TaskScore | TaskScores, num_examples: int) -> list[str]:
    error = "" if scores.standard_error is None else f"{scores.standard_error:.3f}"
    return [f"{scores.accuracy:.3f}", error, str(num_examples), f"{scores.tokens_per_forward:.2f}"]
