"""Measures quality against speed: the same questions under one sampler setting after another, and for the AR source.

The AR source writes in the engine of block models, one token per pass, so that all are timed in the same way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from typing import Any, Protocol, runtime_checkable

import torch
import xxhash

from decausal.data.encode import SpecialTokens
from decausal.data.tasks import Example, examples
from decausal.data.tasks.stream import named
from decausal.errors import UserError
from decausal.evaluation.results import ratio_over_rows
from decausal.evaluation.sweep_settings import AR, VERIFIED, Tried
from decausal.evaluation.tasks import Written, longest_completion, score
from decausal.models.checkpoint import Converted
from decausal.report.texts import text_figures
from decausal.sampling.engines import engine_for
from decausal.sampling.jobs import Ended, Job, run
from decausal.sampling.rows import Row
from decausal.sampling.settings.of_model import settings_for
from decausal.sampling.stopping import end_token_ids


@dataclass(frozen=True)
class Answered:
    """What a model wrote after all questions.

    Attributes:
        values: By task, the score of each example, in order.
        num_tokens: New tokens, end tokens included.
        num_forwards: Forward passes; each row counts those that it took part in.
        seconds: Time of writing.
        texts: How the texts look, see `decausal.report.texts`.
        data_hash: A hash of the questions.
    """

    values: dict[str, list[float]]
    num_tokens: int
    num_forwards: int
    seconds: float
    texts: dict[str, Any]
    data_hash: str


@runtime_checkable
class Questions(Protocol):
    """What is asked."""

    def ask(self, converted: Converted, options: dict[str, Any]) -> Answered:
        """Has a model answer everything under sampler settings."""


@dataclass(frozen=True)
class Point:
    """One setting's figures.

    Attributes:
        series: What it belongs to: "AR", "verified", or the setting that is swept.
        options: The sampler settings that were given.
        accuracy: Mean over tasks of the mean score.
        standard_error: Over examples; None for a single example.
        num_examples: Questions of all tasks.
        tokens_per_forward: New tokens over forward passes.
        tokens_per_second: New tokens over seconds of writing.
        texts: How the texts look.
        retention: Accuracy over the AR source's, in percent.
        retention_standard_error: Over examples, which both answered.
        speedup: Tokens per second over the AR source's.
    """

    series: str
    options: dict[str, Any]
    accuracy: float
    standard_error: float | None
    num_examples: int
    tokens_per_forward: float
    tokens_per_second: float
    texts: dict[str, Any] = field(default_factory=dict)
    retention: float | None = None
    retention_standard_error: float | None = None
    speedup: float | None = None


class OurQuestions:
    """Held-out examples of the tasks whose answers a program checks.

    Args:
        names: Tasks; all of them if empty.
        num_examples: Examples of each.
        batch_size: Rows written together.
    """

    def __init__(self, names: Sequence[str], num_examples: int, batch_size: int) -> None:
        self.problems: list[Example] = list(islice(examples(names, "heldout"), num_examples * len(named(names))))
        self.batch_size = batch_size

    def ask(self, converted: Converted, options: dict[str, Any]) -> Answered:
        """See `Questions.ask`."""
        tokenizer, ends = converted.tokenizer, end_token_ids(converted)
        prefix = SpecialTokens(tokenizer).prefix
        prompts = tokenizer([each.prompt for each in self.problems], add_special_tokens=False)["input_ids"]
        length = longest_completion(self.problems, tokenizer)
        rows, seconds = written(converted, [prefix + ids for ids in prompts], length, self.batch_size, options)
        scores = score(self.problems, [Written(row.ids, row.num_forwards) for row in rows], tokenizer, ends)
        asked = repr([(each.task.name, each.prompt, each.completion) for each in self.problems])
        return Answered(
            values={each.task: [float(right) for right in each.is_right] for each in scores.tasks},
            num_tokens=sum(len(row.ids) for row in rows),
            num_forwards=sum(row.num_forwards for row in rows),
            seconds=seconds,
            texts=text_figures([row.ids for row in rows]).as_dict(),
            data_hash=xxhash.xxh3_128_hexdigest(asked.encode()),
        )


def written(
    converted: Converted, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int, options: dict[str, Any]
) -> tuple[list[Ended], float]:
    """Continues prompts. An AR model writes from left to right in the same engine. Returns the rows and the seconds."""
    settings = settings_for(converted.facts, **options, max_new_tokens=max_new_tokens)
    ends, block_size = end_token_ids(converted), converted.facts.block_size or 1
    jobs = [
        Job(Row((ids, []), (max_new_tokens,), f"question {number}"), settings, settings.seed + number, ends)
        for number, ids in enumerate(prompts, 1)
    ]
    for job in jobs:
        job.row.check(converted)
    engine = engine_for(
        converted,
        max_rows=min(batch_size, len(jobs)),
        max_length=-(-max(job.row.length for job in jobs) // block_size) * block_size,
        is_autoregressive=converted.facts.layout == "causal",
    )
    start = time.perf_counter()
    found = dict(run(engine, jobs))
    return [found[index] for index in range(len(jobs))], time.perf_counter() - start


def sweep(
    converted: Converted,
    source: Converted | None,
    questions: Questions,
    settings: Sequence[Tried],
    *,
    done: Sequence[Point] = (),
    on_point: Callable[[list[Point], str], None] = lambda points, data_hash: None,
) -> Iterator[Point]:
    """Yields a point for each setting, in their order; the AR source first, if there is one.

    Args:
        converted: Model, tokenizer and facts.
        source: The AR source as `load_causal` gives it.
        questions: What is asked.
        settings: What is tried.
        done: Points of an interrupted run, which are not measured again. Retention of later points needs the AR
            source's answers, so those are always asked for.
        on_point: Called with all points so far, and the hash of the questions.
    """
    points: list[Point] = []
    by_ar: Answered | None = None
    for tried in [*([] if source is None else [Tried(AR, {})]), *settings]:
        kept = [point for point in done if (point.series, point.options) == (tried.series, tried.options)]
        if kept and tried.series != AR:
            points.append(kept[0])
            yield points[-1]
            continue
        model = _with_block_size(converted, tried) if tried.series != AR else source
        assert model is not None
        options = {name: value for name, value in tried.options.items() if name != "block_size"}
        answered = questions.ask(model, options)
        by_ar = answered if tried.series == AR else by_ar
        points.append(_point(tried, answered, by_ar))
        on_point(points, answered.data_hash)
        yield points[-1]


def _with_block_size(converted: Converted, tried: Tried) -> Converted:
    """Returns the model with another block size, where one is tried."""
    block_size = tried.options.get("block_size")
    if block_size is None:
        return converted
    if converted.facts.layout != "block":
        raise UserError(
            f"block_size={block_size}: only a model of layout 'block' writes in blocks, and this one's is "
            f"'{converted.facts.layout}'; leave it out"
        )
    return converted._replace(facts=replace(converted.facts, block_size=block_size))


def _point(tried: Tried, answered: Answered, by_ar: Answered | None) -> Point:
    accuracy, error, num_examples = _mean(answered.values)
    point = Point(
        series=tried.series,
        options=tried.options,
        accuracy=accuracy,
        standard_error=error,
        num_examples=num_examples,
        tokens_per_forward=answered.num_tokens / max(answered.num_forwards, 1),
        tokens_per_second=answered.num_tokens / answered.seconds,
        texts=answered.texts,
    )
    if by_ar is None:
        return point
    ours, theirs = (torch.tensor(list(chain(*each.values.values())), dtype=torch.float64) for each in (answered, by_ar))
    kept = ratio_over_rows(ours, theirs)
    return replace(
        point,
        retention=None if kept.value is None else 100 * kept.value,
        retention_standard_error=None if kept.standard_error is None else 100 * kept.standard_error,
        speedup=point.tokens_per_second / (by_ar.num_tokens / by_ar.seconds),
    )


def _mean(values: dict[str, list[float]]) -> tuple[float, float | None, int]:
    """Returns the mean over tasks of their means, its standard error and the number of examples."""
    columns = [torch.tensor(of_task, dtype=torch.float64) for of_task in values.values()]
    means = [float(column.mean()) for column in columns]
    num_examples = sum(map(len, columns))
    if any(len(column) < 2 for column in columns):
        return sum(means) / len(means), None, num_examples
    variance = sum(float(column.var()) / len(column) for column in columns)
    return sum(means) / len(means), variance**0.5 / len(columns), num_examples


def as_figures(points: Sequence[Point], tasks: Sequence[str], data_hash: str) -> dict[str, Any]:
    """Returns a sweep as plain values."""
    return {"tasks": list(tasks), "data_hash": data_hash, "points": [asdict(point) for point in points]}


__all__ = ["AR", "VERIFIED", "Answered", "OurQuestions", "Point", "Questions", "as_figures", "sweep", "written"]
