"""What a run measures of its student: likelihood or drafts on held-out rows, and samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from decausal.data.reading import say
from decausal.data.rows import PackedRows
from decausal.data.sources import find_sources, have_splits, names_of
from decausal.evaluation.drafts import evaluate_drafts
from decausal.evaluation.likelihood import evaluate_nll
from decausal.models.facts import ConversionFacts
from decausal.training.draft_figure import keep_drafts
from decausal.training.meters import TokenMeter
from decausal.training.run_directory import disk_errors
from decausal.training.run_rows import corpus_rows
from decausal.training.sample_prompts import read_sample_prompts
from decausal.training.samples import Samples
from decausal.training.settings import ConversionSettings

Measure = Callable[[PreTrainedModel], dict[str, float]]


def with_evaluation(settings: ConversionSettings, training: dict[str, Any], *, is_measured: bool) -> dict[str, Any]:
    """Returns transformers' arguments with an evaluation each tenth of the run, if there is anything to measure."""
    is_measured = is_measured or settings.eval_data is not None or settings.sample_prompts is not None
    if is_measured and "eval_strategy" not in training:
        return {"eval_strategy": "steps", "eval_steps": 0.1} | training
    return training


def measurement(
    settings: ConversionSettings,
    args: TrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: ConversionFacts,
    *,
    measure: Measure | None,
    meter: TokenMeter,
    step: Callable[[], int],
) -> Measure | None:
    """Returns what the trainer calls at each evaluation, or None if there is nothing to measure.

    Args:
        settings: The settings of the run.
        args: Transformers' arguments.
        model: The model before training.
        tokenizer: Its tokenizer.
        facts: The facts of the model that the run makes.
        measure: Replaces the measurement on `eval_data`.
        meter: Counts the tokens that are trained on.
        step: Returns the optimizer step that the run has reached.

    Raises:
        UserError: The held-out data or the sample prompts cannot be used.
    """
    output_dir = Path(args.output_dir)
    if measure is None and settings.eval_data is not None:
        _say_overlap(settings)
        held_out = corpus_rows(settings, settings.eval_data, settings.eval_reading, tokenizer, args.seed, 1.0)
        measure = _on_rows(held_out, settings, tokenizer, facts)
        if settings.noise == "all" and args.process_index == 0:
            measure = _with_draft_figure(measure, output_dir, meter, step)
    if settings.sample_prompts is not None:
        prompts = read_sample_prompts(settings.sample_prompts)
        where = output_dir if args.process_index == 0 else None
        samples = Samples(prompts, tokenizer, facts, settings.sample_tokens, where)
        samples.refuse_unusable(model)
        measure = _with_samples(measure, samples, step)
    return measure


def _say_overlap(settings: ConversionSettings) -> None:
    """Says that data are both trained on and measured on, as the same directory of splits would be."""
    named = [names_of(data) for data in (settings.data, settings.eval_data) if data]
    both = sorted(set(named[0]) & set(named[1])) if len(named) == 2 else []
    splits = settings.reading.split, settings.eval_reading.split
    if splits[0] != splits[1]:
        both = [name for name in both if not have_splits(name) or _is_in_both(name, splits)]
    if both:
        say(f"--eval_data {', '.join(both)}: trained on too, so its figures say little about new text")


def _is_in_both(name: str, splits: tuple[str, str]) -> bool:
    first, second = (set(find_sources(name, split)) for split in splits)
    return bool(first & second)


def _on_rows(
    rows: PackedRows, settings: ConversionSettings, tokenizer: PreTrainedTokenizerBase, facts: ConversionFacts
) -> Measure:
    def measure(model: PreTrainedModel) -> dict[str, float]:
        if settings.noise == "all":
            return evaluate_drafts(model, facts, rows, num_rows=settings.eval_rows).as_logs()
        likelihood = evaluate_nll(
            model, facts, rows, tokenizer, num_rows=settings.eval_rows, samples_per_row=settings.eval_samples
        )
        return {
            "eval_masked_cross_entropy": likelihood.masked_cross_entropy,
            "eval_nelbo_per_token": likelihood.nelbo_per_token,
            "eval_bits_per_byte": likelihood.bits_per_byte,
        }

    return measure


def _with_draft_figure(measure: Measure, output_dir: Path, meter: TokenMeter, step: Callable[[], int]) -> Measure:
    def measure_and_draw(model: PreTrainedModel) -> dict[str, float]:
        found = measure(model)
        with disk_errors(output_dir):
            keep_drafts(output_dir, found, step(), meter.counts.total)
        return found

    return measure_and_draw


def _with_samples(measure: Measure | None, samples: Samples, step: Callable[[], int]) -> Measure:
    def measure_and_sample(model: PreTrainedModel) -> dict[str, float]:
        found = {} if measure is None else measure(model)
        with disk_errors(samples.output_dir or Path()):
            samples.write(model, step())
        return found

    return measure_and_sample
