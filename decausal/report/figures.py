"""Puts the scores of all kinds of evaluations into one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from decausal.report.records import Evaluation
from decausal.wording import quantity


@dataclass(frozen=True)
class Figure:
    """One score.

    Attributes:
        model: The model's name.
        measure: What was measured.
        value: The model's value.
        error: Its standard error.
        source: The AR source's value.
        source_error: Its standard error.
        kept: How much of the AR source's score is kept, in percent.
        kept_error: Its standard error.
        made_of: What the score was computed from, and on how many examples.
        number: The evaluation that it comes from, from 1.
    """

    model: str
    measure: str
    value: float
    error: float | None = None
    source: float | None = None
    source_error: float | None = None
    kept: float | None = None
    kept_error: float | None = None
    made_of: str = ""
    number: int = 0


def figures_of(evaluations: Sequence[Evaluation]) -> list[Figure]:
    """Returns the scores of evaluations, in their order. Sweeps and texts have sections of their own."""
    return [
        figure
        for number, evaluation in enumerate(evaluations, 1)
        for figure in _READERS.get(evaluation.kind, _nothing)(evaluation, number)
    ]


def _nothing(evaluation: Evaluation, number: int) -> Iterator[Figure]:
    yield from ()


def _nll(evaluation: Evaluation, number: int) -> Iterator[Figure]:
    found = evaluation.figures
    if "likelihood" in found:
        yield from _drafted(evaluation, number)
        return
    data = _data(evaluation)
    masks, rows = quantity(found["samples_per_row"], "mask"), quantity(found["num_rows"], "row")
    made_of = f"NELBO, {masks} in each of {rows}"
    for unit, value, error, source in (
        ("bits per byte", "bits_per_byte", "bits_per_byte_standard_error", "ar_bits_per_byte"),
        ("nats per token", "nelbo_per_token", "nelbo_standard_error", "ar_nll_per_token"),
    ):
        if found.get(value) is None:
            continue
        ar, ar_error = found.get(source), found.get(source.replace("_per_token", "") + "_standard_error")
        kept = None if ar is None else 100 * ar / found[value]
        yield Figure(
            evaluation.name,
            f"{data}, {unit}",
            found[value],
            found.get(error),
            ar,
            ar_error,
            kept,
            None,
            made_of,
            number,
        )


def _drafted(evaluation: Evaluation, number: int) -> Iterator[Figure]:
    found, data = evaluation.figures, _data(evaluation)
    own, source = found["likelihood"], found.get("source") or {}
    ar = source.get("bits_per_byte")
    kept = None if ar is None else 100 * ar / own["bits_per_byte"]
    made_of = f"exact, read causally, {quantity(own['num_rows'], 'row')}"
    yield Figure(
        evaluation.name,
        f"{data}, bits per byte",
        own["bits_per_byte"],
        own["bits_per_byte_standard_error"],
        ar,
        source.get("bits_per_byte_standard_error"),
        kept,
        None,
        made_of,
        number,
    )
    per_pass = found["drafts"]["tokens_per_pass"]
    yield Figure(evaluation.name, f"{data}, tokens per pass", per_pass, source=1.0, made_of="drafts", number=number)


def _tasks(evaluation: Evaluation, number: int) -> Iterator[Figure]:
    found = evaluation.figures
    made_of = quantity(found["num_examples"], "example")
    for name, scores in found["tasks"].items():
        yield Figure(
            evaluation.name, name, scores["accuracy"], scores["standard_error"], made_of=made_of, number=number
        )
    yield Figure(
        evaluation.name, "our tasks", found["accuracy"], found["standard_error"], made_of=made_of, number=number
    )
    yield from _speed(evaluation.name, "our tasks", found, number)


def _harness(evaluation: Evaluation, number: int) -> Iterator[Figure]:
    found = evaluation.figures
    for score in found["scores"]:
        yield Figure(
            evaluation.name,
            f"{score['task']} {score['metric']}",
            score["value"],
            score["standard_error"],
            score["source"],
            score["source_standard_error"],
            score["retention"],
            score["retention_standard_error"],
            f"{found['settings']['made_of'][score['task']]}, {quantity(score['num_examples'], 'example')}",
            number,
        )
    if found.get("speed"):
        yield from _speed(evaluation.name, ", ".join(found["texts"]), found["speed"], number)


def _speed(model: str, what: str, found: dict[str, Any], number: int) -> Iterator[Figure]:
    for unit in ("tokens per forward", "tokens per second"):
        value = found.get(unit.replace(" ", "_"))
        if value is not None:
            yield Figure(model, f"{what}, {unit}", value, made_of="written texts", number=number)


def _data(evaluation: Evaluation) -> str:
    """Returns the last part of the name of an evaluation's data."""
    arguments = evaluation.arguments
    for place, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == "--data":
            named = value if equals else arguments[place + 1]
            return ",".join(PurePath(part).name for part in named.split(","))
    return "text"


_READERS: dict[str, Callable[[Evaluation, int], Iterator[Figure]]] = {
    "nll": _nll,
    "tasks": _tasks,
    "harness": _harness,
}
