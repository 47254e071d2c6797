"""The harness's scores of a converted model and its AR source, and how much of the source's score is kept."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table

from decausal.evaluation.results import Ratio, ratio_over_rows
from decausal.report.texts import text_figures
from decausal.wording import quantity

Sample = dict[str, Any]


@dataclass(frozen=True)
class Score:
    """One figure of a task.

    Attributes:
        task: The task's name.
        metric: The metric's name, followed by a comma and the filter of answers if there is one.
        value: The model's value.
        standard_error: The harness's standard error over examples, or None.
        higher_is_better: Whether higher is better; None if the harness does not say.
        num_examples: Number of examples.
        source: The AR source's value; None without it.
        source_standard_error: Its standard error.
        retention: How much of the source's score is kept, in percent.
        retention_standard_error: Its standard error over examples, which both models share.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    higher_is_better: bool | None
    num_examples: int
    source: float | None = None
    source_standard_error: float | None = None
    retention: float | None = None
    retention_standard_error: float | None = None


@dataclass(frozen=True)
class HarnessScores:
    """All figures, and what they come from.

    Attributes:
        scores: The scores in the order of the tasks.
        model: The model's facts and its kind of likelihood, from `DecausalLM.get_model_info`.
        mask_errors: For tasks with an estimated NELBO, the standard error of a request's log-likelihood over the draw
            of masks, in nats, as a root mean square over requests.
        settings: The settings for the harness.
        source_missing: Why there are no figures of the source.
        speed: Tokens, passes and seconds of written texts; None if none were written now.
        texts: By task, the look of what was written, see `decausal.report.texts`.
        data_hash: A hash of all examples that were asked about.
    """

    scores: tuple[Score, ...]
    model: dict[str, Any]
    mask_errors: dict[str, float]
    settings: dict[str, Any]
    source_missing: str | None = None
    speed: dict[str, Any] | None = None
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    data_hash: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        return {
            "model": self.model,
            "settings": self.settings,
            "mask_standard_error_nats": self.mask_errors,
            "source_missing": self.source_missing,
            "speed": self.speed,
            "texts": self.texts,
            "data_hash": self.data_hash,
            "scores": [asdict(score) for score in self.scores],
        }

    def as_table(self) -> Table:
        """Returns the figures as a table for a terminal."""
        table = Table("task", "metric", "made of", title=f"lm-evaluation-harness {self.settings['lm_eval']}")
        has_source = any(score.source is not None for score in self.scores)
        for heading in ("examples", "score", "± s.e.", *(("source", "± s.e.", "kept", "± s.e.") if has_source else ())):
            table.add_column(heading, justify="right")
        for score in self.scores:
            cells = [str(score.num_examples), _number(score.value), _number(score.standard_error)]
            if has_source:
                cells += [_number(score.source), _number(score.source_standard_error)]
                cells += [_percent(score.retention), _percent(score.retention_standard_error)]
            table.add_row(score.task, score.metric, self.settings["made_of"][score.task], *cells)
        captions = [f"no AR source: {self.source_missing}"] if self.source_missing else []
        captions += [f"{task}: {_looks(texts)}" for task, texts in self.texts.items()]
        if self.speed is not None:
            rates = (self.speed[name] for name in ("tokens_per_forward", "tokens_per_second"))
            captions.append("written at {:.2f} tokens per forward, {:.1f} tokens per second".format(*rates))
        captions += [
            f"{task}: a NELBO is known to ± {error:.3g} nats (masks)"
            for task, error in self.mask_errors.items()
            if error
        ]
        if self.settings.get("programs"):
            held = [name for name, holds in self.settings["programs"].items() if holds]
            open_ = [name for name, holds in self.settings["programs"].items() if not holds]
            captions.append(f"programs ran with limits: {', '.join(held)}")
            captions += [f"NOT enforced on this machine: {', '.join(open_)}"] if open_ else []
        table.caption = "\n".join(captions) or None
        return table


def scores_of(results: dict[str, Any], source: dict[str, Any] | None = None) -> tuple[Score, ...]:
    """Reads the figures from the harness's results for a model and its source."""
    return tuple(
        _score(results, source, task, key)
        for task, figures in results["results"].items()
        for key in figures
        if _is_figure(key, figures)
    )


def mask_errors_of(results: dict[str, Any]) -> dict[str, float]:
    """Returns, by task, the root mean square of the log-likelihoods' standard errors over the draw of masks."""
    found = {}
    for task, samples in results["samples"].items():
        errors = [error for sample in samples for error in _mask_errors(sample["resps"])]
        if errors:
            found[task] = math.sqrt(sum(error * error for error in errors) / len(errors))
    return found


def texts_of(results: dict[str, Any], encode: Callable[[str], list[int]]) -> dict[str, dict[str, Any]]:
    """Returns, by task, how the texts look that a model wrote. Tasks without any are left out."""
    found = {}
    for task, samples in results["samples"].items():
        filters = samples[0]["filter"] if samples else None
        texts = [text for sample in samples if sample["filter"] == filters for text in _texts(sample["resps"])]
        if texts:
            found[task] = text_figures([encode(text) for text in texts]).as_dict()
    return found


def _texts(answer: Any) -> list[str]:
    if isinstance(answer, list | tuple):
        return [text for part in answer for text in _texts(part)]
    return [answer] if isinstance(answer, str) else []


def data_hash_of(results: dict[str, Any]) -> str:
    """Returns a hash of the examples and prompts of all tasks."""
    asked = [
        [task, sample["doc_id"], sample["doc_hash"], sample["prompt_hash"], sample["target_hash"]]
        for task, samples in sorted(results["samples"].items())
        for sample in samples
    ]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


def _mask_errors(answer: Any) -> list[float]:
    if isinstance(answer, list | tuple):
        return [error for part in answer for error in _mask_errors(part)]
    error = getattr(answer, "standard_error", None)
    return [] if error is None else [error]


def _is_figure(key: str, figures: dict[str, Any]) -> bool:
    return "," in key and "_stderr," not in key and isinstance(figures[key], int | float)


def _score(results: dict[str, Any], source: dict[str, Any] | None, task: str, key: str) -> Score:
    metric, _, answer_filter = key.partition(",")
    figures = results["results"][task]
    higher = results["higher_is_better"].get(task, {}).get(metric)
    counts = results["n-samples"].get(task, {})
    score = Score(
        task=task,
        metric=metric if answer_filter == "none" else key,
        value=float(figures[key]),
        standard_error=_error(figures, metric, answer_filter),
        higher_is_better=higher,
        num_examples=int(counts.get("effective", figures.get("sample_len", 0))),
    )
    if source is None:
        return score
    theirs = source["results"][task]
    kept = retention(
        metric,
        higher,
        (score.value, float(theirs[key])),
        [values_of(run, task, metric, answer_filter) for run in (results, source)],
    )
    return Score(
        **{name: value for name, value in asdict(score).items() if not name.startswith(("source", "retention"))},
        source=float(theirs[key]),
        source_standard_error=_error(theirs, metric, answer_filter),
        retention=kept.value,
        retention_standard_error=kept.standard_error,
    )


def retention(
    metric: str, higher_is_better: bool | None, values: tuple[float, float], samples: Sequence[Sequence[Any]]
) -> Ratio:
    """Returns how much of the source's score a model keeps, in percent, and the standard error over examples.

    It is score over source if higher is better, and source over score if lower is better. The error takes into account
    that both models answer the same examples.

    Args:
        metric: The harness's name of the metric.
        higher_is_better: Whether higher is better; None if neither is.
        values: The model's score and the source's.
        samples: The model's and the source's figure for each example, which the harness averages.
    """
    ours, theirs = values if higher_is_better else values[::-1]
    if higher_is_better is None or not theirs:
        return Ratio(None, None)
    percent = 100 * ours / theirs
    error = _relative_error(metric, samples if higher_is_better else samples[::-1])
    return Ratio(percent, None if error is None else percent * error)


def _relative_error(metric: str, samples: Sequence[Sequence[Any]]) -> float | None:
    """Returns the standard error of the ratio of two scores, relative to the ratio, from their common examples."""
    ours, theirs = samples
    if len(ours) != len(theirs) or len(ours) < 2:
        return None
    if all(isinstance(value, tuple | list) and len(value) == 2 for value in (*ours, *theirs)):
        (our_sums, counts), (their_sums, _) = (_columns(values) for values in (ours, theirs))
        if metric == "bits_per_byte":  # both have the same bytes
            return _over_itself(ratio_over_rows(our_sums, their_sums))
        return ratio_over_rows(our_sums - their_sums, counts).standard_error  # exp of it for perplexities
    if not all(isinstance(value, int | float) for value in (*ours, *theirs)):
        return None
    our_column, their_column = (torch.tensor(values, dtype=torch.float64) for values in (ours, theirs))
    if metric == "perplexity":
        return ratio_over_rows(our_column - their_column, torch.ones_like(our_column)).standard_error
    return _over_itself(ratio_over_rows(our_column, their_column))


def _over_itself(ratio: Ratio) -> float | None:
    return None if not ratio.value or ratio.standard_error is None else ratio.standard_error / abs(ratio.value)


def _columns(pairs: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    table = torch.tensor([list(pair) for pair in pairs], dtype=torch.float64)
    return table[:, 0], table[:, 1]


def values_of(run: dict[str, Any], task: str, metric: str, answer_filter: str = "none") -> list[Any]:
    """Returns a metric's figure for each example, in the order of the task."""
    samples: list[Sample] = run["samples"].get(task, [])
    chosen = [sample for sample in samples if sample["filter"] == answer_filter and metric in sample]
    return [sample[metric] for sample in sorted(chosen, key=lambda sample: sample["doc_id"])]


def _error(figures: dict[str, Any], metric: str, answer_filter: str) -> float | None:
    error = figures.get(f"{metric}_stderr,{answer_filter}")
    return float(error) if isinstance(error, int | float) else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _looks(texts: dict[str, Any]) -> str:
    distinct = "/".join(_number(share) for share in texts["distinct"])
    return (
        f"{quantity(texts['num_texts'], 'text')} of {texts['length']:.1f} tokens, "
        f"repetition {_number(texts['repetition'])}, "
        f"distinct 1/2/3-grams {distinct}, entropy {_number(texts['entropy'])} nats"
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"
