"""Measures all runs on the same held-out prompts or rows, with the AR model beside them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decausal.compare.arms import ArmRun
from decausal.compare.inputs import held_out_problems
from decausal.compare.records import Score
from decausal.compare.settings import SPECULATIVE, STATIC, CompareSettings, Schedule
from decausal.data.rows import PackedRows, load_rows
from decausal.data.sources import task_source
from decausal.data.tasks import Example
from decausal.data.template import set_template
from decausal.devices import best_device
from decausal.errors import UserError
from decausal.evaluation.likelihood import evaluate_ar_nll, evaluate_nll
from decausal.evaluation.tasks import TaskScores, evaluate_tasks, longest_completion
from decausal.models.adapt import adapt, load_source
from decausal.models.architecture import refuse_longer_rows
from decausal.models.checkpoint import Converted
from decausal.models.doctor import refuse_if_unusable
from decausal.models.facts import ConversionFacts
from decausal.models.gated import gated_mask_token_id

ROWS_TOGETHER = 16
EVAL_SEED = 0  # not the runs' seeds: all runs are measured on the same masks


class Measure(ABC):
    """Measures students on held-out data. Creating one loads the AR model and refuses bad input.

    Attributes:
        settings: The settings of the comparison.
        source: The frozen AR model.
        tokenizer: The tokenizer, with the mask token.
    """

    higher_is_better: bool
    unit: str

    def __init__(self, settings: CompareSettings, run: ArmRun) -> None:
        self.settings = settings
        self.source, tokenizer = load_source(settings.model_name_or_path, revision=run.conversion.revision)
        refuse_if_unusable(self.source, tokenizer)
        refuse_longer_rows(run.conversion.max_length, self.source.config)
        self.ar_tokenizer = copy.deepcopy(tokenizer)
        self._start = copy.deepcopy(self.source)
        self._mask_token_id = adapt(self._start, tokenizer, mask_token=run.conversion.mask_token)
        set_template(tokenizer, run.conversion.chat_template, run.conversion.chat_template_kwargs)
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        device = best_device()
        self.source.to(device)
        self._start.to(device)
        self._start_scores: dict[tuple[Any, ...], tuple[Score, ...]] = {}
        self._ar_scores: dict[bool, Score] = {}

    @property
    @abstractmethod
    def thresholds(self) -> tuple[Schedule, ...]:
        """Decoding schedules while a run trains; (None,) if nothing is decoded."""

    @abstractmethod
    def final_thresholds(self, run: ArmRun) -> tuple[Schedule, ...]:
        """Decoding schedules at a run's end."""

    @abstractmethod
    def measured(self, *, is_final: bool) -> dict[str, Any]:
        """Returns a description of what is measured. Measurements with equal descriptions can be compared."""

    @abstractmethod
    def _score(self, converted: Converted, threshold: Schedule, is_final: bool) -> Score: ...

    @abstractmethod
    def _ar_score(self, is_final: bool) -> Score: ...

    def facts(self, run: ArmRun) -> ConversionFacts:
        """Returns how a run's student reads and decodes."""
        conversion = run.conversion
        names = ("block_size", "causal_context", "causal_groups", "weights") if conversion.layout == "block" else ()
        more = {name: getattr(conversion, name) for name in names}
        is_gated = conversion.weights == "gated"
        return ConversionFacts(
            source=conversion.model_name_or_path,
            layout=conversion.layout,
            shift=conversion.shift,
            mask_token_id=gated_mask_token_id(self.source) if is_gated else self._mask_token_id,
            **more,
        )

    def scores(
        self, model: PreTrainedModel, run: ArmRun, thresholds: Sequence[Schedule], *, is_final: bool = False
    ) -> tuple[Score, ...]:
        """Measures a student under each schedule."""
        return self._scores(model, self.facts(run), run, thresholds, is_final=is_final)

    def _scores(
        self,
        model: PreTrainedModel,
        facts: ConversionFacts,
        run: ArmRun,
        thresholds: Sequence[Schedule],
        *,
        is_final: bool = False,
    ) -> tuple[Score, ...]:
        was_training = model.training
        model.eval()
        try:
            with self._precision(run), torch.inference_mode():
                converted = Converted(model, self.tokenizer, facts)
                return tuple(self._score(converted, threshold, is_final) for threshold in thresholds)
        finally:
            model.train(was_training)

    def start_scores(self, run: ArmRun) -> tuple[Score, ...]:
        """Measures a run's student before any training, once for all arms that read alike."""
        facts = self.facts(run)
        if facts.is_gated:  # before any training its masks are read by the source's weights, as shared ones are
            facts = replace(facts.shared(), mask_token_id=self._mask_token_id)
        key = (facts.attention, facts.shift)
        if key not in self._start_scores:
            self._start_scores[key] = self._scores(self._start, facts, run, self.thresholds)
        return self._start_scores[key]

    def ar_score(self, *, is_final: bool) -> Score:
        """Measures the AR model: greedy, one token per forward."""
        if is_final not in self._ar_scores:
            with torch.inference_mode():
                self._ar_scores[is_final] = self._ar_score(is_final)
        return self._ar_scores[is_final]

    @contextmanager
    def _precision(self, run: ArmRun) -> Iterator[None]:
        with torch.autocast(self.source.device.type, torch.bfloat16, enabled=run.training["bf16"]):
            yield


class TaskMeasure(Measure):
    """Exact answers on held-out prompts: accuracy, the mean over tasks.

    Raises:
        UserError: The held-out data holds no tasks, or the model's tokenizer cannot read their characters.
    """

    higher_is_better = True
    unit = "accuracy"

    def __init__(self, settings: CompareSettings, run: ArmRun) -> None:
        self._problems = held_out_problems(settings)
        super().__init__(settings, run)
        refuse_unread_characters(self.tokenizer, self._problems, settings.model_name_or_path)
        self.max_new_tokens = settings.max_new_tokens or longest_completion(self._problems, self.tokenizer)

    @property
    def thresholds(self) -> tuple[Schedule, ...]:
        return self.settings.eval_thresholds

    def final_thresholds(self, run: ArmRun) -> tuple[Schedule, ...]:
        if self.facts(run).only_drafts:
            return (SPECULATIVE,)
        is_speculated = self.settings.speculative and run.conversion.layout == "block"
        return (*self.settings.thresholds, *((SPECULATIVE,) if is_speculated else ()))

    def measured(self, *, is_final: bool) -> dict[str, Any]:
        return {
            "eval": "tasks",
            "data": str(task_source(self.settings.measured_data)),
            "prompts": len(self.problems(is_final)),
            "max_new_tokens": self.max_new_tokens,
        }

    def problems(self, is_final: bool) -> list[Example]:
        return self._problems[: self.settings.final_prompts if is_final else self.settings.eval_prompts]

    def _score(self, converted: Converted, threshold: Schedule, is_final: bool) -> Score:
        options: dict[str, Any] = {"threshold": threshold}
        if threshold == STATIC:
            options = static_schedule(converted.facts, self.max_new_tokens)
        options["speculative"] = False  # a model's own settings may say otherwise
        if threshold == SPECULATIVE or converted.facts.only_drafts:
            options = {"speculative": True, "draft": "quadratic"}  # a figure must not hang on the machine's times
        return self._evaluated(converted, threshold, is_final, options)

    def _ar_score(self, is_final: bool) -> Score:
        return self._evaluated((self.source, self.ar_tokenizer), STATIC, is_final, {})

    def _evaluated(self, model: Any, threshold: Schedule, is_final: bool, options: dict[str, Any]) -> Score:
        found = evaluate_tasks(
            model,
            self.problems(is_final),
            batch_size=self.settings.eval_batch_size,
            max_new_tokens=self.max_new_tokens,
            **options,
        )
        return _task_score(found, threshold)


class LikelihoodMeasure(Measure):
    """NELBO per token of held-out text, on the same mask patterns each time."""

    higher_is_better = False
    unit = "NELBO"

    def __init__(self, settings: CompareSettings, run: ArmRun) -> None:
        super().__init__(settings, run)
        if self.facts(run).only_drafts:
            raise UserError(
                "--eval nll: masks of this recipe draft and do not denoise, so there is no NELBO; --eval tasks"
            )
        self._max_length, self._reading = run.conversion.max_length, run.conversion.eval_reading
        _ = self.rows

    @property
    def thresholds(self) -> tuple[Schedule, ...]:
        return (None,)

    def final_thresholds(self, run: ArmRun) -> tuple[Schedule, ...]:
        return self.thresholds

    def measured(self, *, is_final: bool) -> dict[str, Any]:
        return {
            "eval": "nll",
            "data": self.settings.measured_data,
            "rows": min(self.settings.eval_rows, len(self.rows)),
            "samples_per_row": self.settings.eval_samples,
            "max_length": self._max_length,
        }

    @cached_property
    def rows(self) -> PackedRows:
        """All held-out rows."""
        return load_rows(self.settings.measured_data, self.tokenizer, self._max_length, reading=self._reading)

    def _score(self, converted: Converted, threshold: Schedule, is_final: bool) -> Score:
        found = evaluate_nll(
            converted.model,
            converted.facts,
            self.rows,
            self.tokenizer,
            num_rows=min(self.settings.eval_rows, len(self.rows)),
            samples_per_row=self.settings.eval_samples,
            batch_size=ROWS_TOGETHER,
            seed=EVAL_SEED,
        )
        details = {"masked_cross_entropy": found.masked_cross_entropy, "bits_per_byte": found.bits_per_byte}
        return Score(None, found.nelbo_per_token, found.nelbo_standard_error, details=details)

    def _ar_score(self, is_final: bool) -> Score:
        found = evaluate_ar_nll(
            self.source,
            self.rows,
            self.tokenizer,
            num_rows=min(self.settings.eval_rows, len(self.rows)),
            batch_size=ROWS_TOGETHER,
        )
        details = {"bits_per_byte": found.bits_per_byte}
        return Score(None, found.nll_per_token, found.nll_standard_error, details=details)


def prepare(settings: CompareSettings, run: ArmRun) -> Measure:
    """Loads what all runs are measured on.

    Raises:
        UserError: The model cannot be converted, or the held-out data is not for it.
    """
    return (TaskMeasure if settings.eval == "tasks" else LikelihoodMeasure)(settings, run)


def refuse_unread_characters(tokenizer: PreTrainedTokenizerBase, problems: Sequence[Example], model_name: str) -> None:
    """Raises UserError if the tokenizer does not reproduce a task's text, or has no end-of-text token."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"{model_name} has no end-of-text token, so its answers to tasks do not end; use --eval nll")
    for problem in problems:
        text = problem.prompt + problem.completion
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
            raise UserError(
                f"--eval tasks needs a model that reads the tasks' characters: the tokenizer of {model_name} does not "
                f"give back {text!r}; use tiny-tasks, a model with a byte-level tokenizer, or --eval nll"
            )


def static_schedule(facts: ConversionFacts, max_new_tokens: int) -> dict[str, int]:
    """Returns the sampler's options for one token per forward: a step for each token of a block or of the answer."""
    return {"num_steps": facts.block_size or max_new_tokens}


def _task_score(found: TaskScores, threshold: Schedule) -> Score:
    return Score(
        threshold,
        found.accuracy,
        found.standard_error,
        by_task={score.task: score.accuracy for score in found.tasks},
        tokens_per_forward=found.tokens_per_forward,
        right="".join("1" if right else "0" for score in found.tasks for right in score.is_right),
    )
