"""Tasks of lm-evaluation-harness as the questions of a sweep: those whose answers are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from decausal.errors import UserError
from decausal.evaluation.harness.code_tasks import prepare
from decausal.evaluation.harness.model import DecausalLM
from decausal.evaluation.harness.run import HarnessSettings, run_tasks
from decausal.evaluation.harness.scores import data_hash_of, scores_of, texts_of, values_of
from decausal.evaluation.harness.tasks_by_name import load_tasks, tasks_of
from decausal.evaluation.sweep import Answered
from decausal.models.checkpoint import Converted


class HarnessQuestions:
    """The questions of tasks of lm-evaluation-harness.

    Args:
        tasks: Names of tasks, patterns, or YAML files.
        settings: The settings for the harness. Their sampler settings are replaced by those that are tried.
        include_path: Directory of YAML files of tasks.
        metric: The metric of the tasks, followed by a comma and the filter of answers if there is one. None: the first
            metric of each task for which higher is better.

    Raises:
        UserError: There is no such task, or one asks for likelihoods, which no sampler setting changes.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        settings: HarnessSettings,
        include_path: str | Path | None = None,
        metric: str | None = None,
    ) -> None:
        self._loaded, self._settings, self._metric = load_tasks(tasks, include_path), settings, metric
        found = tasks_of(self._loaded)
        for name, task in found.items():
            if task.OUTPUT_TYPE != "generate_until":
                raise UserError(
                    f"task '{name}' asks how likely answers are, which no sampler setting changes: name tasks whose "
                    "answers are written, such as gsm8k or humaneval"
                )
        prepare(
            list(found.values()),
            may_run=settings.allow_code_execution,
            num_answers=settings.num_answers,
            ks=settings.ks,
            is_drawn=bool(settings.gen_kwargs.get("temperature")),
        )

    def ask(self, converted: Converted, options: dict[str, Any]) -> Answered:
        """See `decausal.evaluation.sweep.Questions.ask`."""
        settings = replace(self._settings, sampler=options, use_cache=None)  # answers from a cache have no time
        model = DecausalLM(converted, batch_size=settings.batch_size, max_length=settings.max_length, **options)
        results = run_tasks(model, self._loaded, settings, {})
        spent = model.writer.spent
        texts = texts_of(results, model.tok_encode)
        return Answered(
            values={task: self._values(results, task) for task in tasks_of(self._loaded)},
            num_tokens=spent.num_tokens,
            num_forwards=spent.num_forwards,
            seconds=spent.seconds,
            texts=next(iter(texts.values()), {}) if len(texts) == 1 else texts,
            data_hash=data_hash_of(results),
        )

    def _values(self, results: dict[str, Any], task: str) -> list[float]:
        scores = [score for score in scores_of(results) if score.task == task]
        for score in scores:
            if score.metric == self._metric or (self._metric is None and score.higher_is_better):
                values = values_of(results, task, *score.metric.split(","))
                if values and all(isinstance(value, int | float) for value in values):
                    return [float(value) for value in values]
        names = ", ".join(score.metric for score in scores)
        raise UserError(f"--metric {self._metric}: task '{task}' has no such score of each example; it has {names}")
