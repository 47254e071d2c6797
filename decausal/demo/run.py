"""The demo from beginning to end: prepare, convert twice, compare, fill a gap, report."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from decausal.data.rows import PackedRows, load_rows
from decausal.demo.arms import Arm, arm_settings, train_arm
from decausal.demo.held_out import HeldOut, prepare
from decausal.demo.history import MEASURES, best, crossing
from decausal.demo.infilling import Filling, Gap, choose_gap, fill
from decausal.demo.output import ARM_NAMES, MARK, refuse_foreign_files, remove_reports
from decausal.demo.report import write_report
from decausal.demo.result import DemoResult
from decausal.demo.settings import DemoSettings
from decausal.demo.terminal import LABELS, TrainingView, cosine_table
from decausal.devices import is_fast_in_bf16
from decausal.evaluation.results import ArLikelihood, Ratio, nelbo_difference
from decausal.models.architecture import context_length
from decausal.reporting import quiet_libraries
from decausal.sampling.model import load
from decausal.sampling.watching.watch import Watch
from decausal.training.run_directory import claimed
from decausal.training.settings import ConversionSettings
from decausal.wording import quantity


def run_demo(settings: DemoSettings, console: Console | None = None) -> DemoResult:
    """Converts a model with and without alignment, at equal steps, data, seed and frozen parameters, and reports.

    Args:
        settings: What to convert, on what, for how long.
        console: Where to print; the standard output by default.

    Returns:
        The result. `output_dir` then holds both models, ready for `decausal.load`, and the report.

    Raises:
        UserError: As `decausal.training.convert.convert`, or the directory holds something that no demo made.
    """
    console = console or Console(file=sys.stdout)
    output_dir = Path(settings.output_dir)
    refuse_foreign_files(output_dir)
    with claimed(output_dir, resume=True) as directory, quiet_libraries():
        demo = _Demo(settings, console)
        directory.begin(vars(settings) | MARK)
        remove_reports(output_dir)
        result = demo.run()
        written = write_report(result)
    _tell_findings(console, result)
    _say(console, "\n[bold]Look:[/bold]", *(f"  {escape(str(path))}" for path in written), is_to_copy=True)
    _say(console, "[bold]Go on:[/bold]", *(f"  {escape(command)}" for command in result.commands()), is_to_copy=True)
    real = f"  {escape(result.command_for_real_model())}"
    _say(console, "[bold]The same on a real model, three seeds:[/bold]", real, is_to_copy=True)
    return result


class _Demo:
    """The demo's parts in order. Creating one loads model and data, and refuses bad input."""

    def __init__(self, settings: DemoSettings, console: Console) -> None:
        self.settings, self.console = settings, console
        self.clock_start = time.perf_counter()
        self.started = datetime.now().astimezone().isoformat(timespec="seconds")
        self.is_bf16 = is_fast_in_bf16() if settings.bf16 is None else settings.bf16
        _say(
            console,
            f"[bold]decausal demo[/bold]: {escape(settings.model_name_or_path)} becomes a diffusion model, twice",
        )
        conversion, training = arm_settings(settings, "aligned", is_bf16=self.is_bf16)
        self.held_out = prepare(
            conversion,
            settings.eval_data,
            num_rows=settings.eval_rows,
            samples_per_row=settings.eval_samples,
            is_bf16=self.is_bf16,
        )
        self.training_rows = _training_rows(conversion, training["seed"], self.held_out)
        self.gap = choose_gap(
            settings.eval_data,
            self.held_out.tokenizer,
            most_tokens=settings.infill_tokens,
            context_length=context_length(self.held_out.source.config),
            seed=settings.seed,
        )

    def run(self) -> DemoResult:
        ar = self.held_out.ar_likelihood()
        self._tell_plan(ar)
        cosines = {"before": self.held_out.cosines(self.held_out.start)}
        arms = self._train()
        cosines |= {name: self.held_out.cosines(arm.conversion.model) for name, arm in arms.items()}
        plain, aligned = arms["plain"].measurements, arms["aligned"].measurements
        return DemoResult(
            settings=self.settings,
            started=self.started,
            is_bf16=self.is_bf16,
            held_out=self.held_out,
            training_rows=self.training_rows,
            ar=ar,
            arms=arms,
            crossings={measure: crossing(plain, aligned, measure) for measure in MEASURES},
            nelbo_difference=_difference_of_best(arms),
            cosines=cosines,
            gap=self.gap,
            fillings=self._fill(self.gap, arms) if self.gap else {},
            seconds=time.perf_counter() - self.clock_start,
        )

    def _train(self) -> dict[str, Arm]:
        with TrainingView(self.console, self.settings.max_steps) as view:
            return {
                name: train_arm(self.settings, name, self.held_out.likelihood, view, is_bf16=self.is_bf16)
                for name in ARM_NAMES
            }

    def _fill(self, gap: Gap, arms: dict[str, Arm]) -> dict[str, Filling]:
        """Fills the gap with each saved model. The aligned one is shown live."""
        fillings = {"plain": fill(load(arms["plain"].conversion.output_dir), gap)}
        model = load(arms["aligned"].conversion.output_dir)
        _say(
            self.console,
            f"\n[bold]{LABELS['aligned']} fills in {quantity(gap.num_tokens, 'token')} of[/bold] "
            f"{escape(gap.origin)}\n",
        )
        with Watch(model.tokenizer, self.console, pause=self.settings.infill_pause) as watch:
            fillings["aligned"] = fill(model, gap, on_step=watch)
        return fillings

    def _tell_plan(self, ar: ArLikelihood) -> None:
        settings, source, rows = self.settings, self.held_out.source, self.training_rows
        precision = "bfloat16" if self.is_bf16 else "float32"
        _say(
            self.console,
            f"  AR model     {source.num_parameters() / 1e6:.1f} million parameters, "
            f"{ar.nll_per_token:.3f} nats per held-out token",
            f"  trained on   {quantity(rows.num_documents, 'document')}, "
            f"{quantity(rows.num_tokens, 'token')} of {escape(settings.data)}",
            f"  measured on  {quantity(ar.num_tokens, 'token')} of {escape(settings.eval_data)}, "
            f"{quantity(settings.eval_samples, 'mask pattern')} each",
            f"  two runs     {quantity(settings.max_steps, 'step')} of "
            f"{quantity(settings.per_device_train_batch_size, 'row')} of "
            f"{quantity(settings.max_length, 'token')}, alike except for the alignment; "
            f"{precision}, {quantity(torch.get_num_threads(), 'thread')}\n",
        )


def _training_rows(conversion: ConversionSettings, seed: int, held_out: HeldOut) -> PackedRows:
    """Returns the rows that `convert` will load from the cache. They are packed here, so that neither run's clock
    waits."""
    return load_rows(
        conversion.data,
        held_out.tokenizer,
        conversion.max_length,
        reading=conversion.reading,
        data_fraction=conversion.data_fraction,
        seed=seed,
    )


def _difference_of_best(arms: dict[str, Arm]) -> Ratio:
    lowest = []
    for name in ("aligned", "plain"):
        arm = arms[name]
        lowest.append(arm.likelihoods[arm.measurements.index(best(arm.measurements, "nelbo_per_token"))])
    return nelbo_difference(*lowest)


def _tell_findings(console: Console, result: DemoResult) -> None:
    _say(console, "")
    if result.gap is not None:
        kept = {name: filling.num_as_in_file for name, filling in result.fillings.items()}
        passes = quantity(result.fillings["aligned"].num_forwards, "forward pass", "forward passes")
        _say(
            console,
            f"{quantity(result.gap.num_tokens, 'token')} in {passes}; {kept['aligned']} are the file's own, "
            f"place by place ({kept['plain']} of plain denoising's)\n",
        )
    console.print(cosine_table(result.cosines["before"], result.cosines["plain"], result.cosines["aligned"]))
    _say(
        console,
        "\n[bold]Found:[/bold]",
        *(f"  {found.sentence()}" for found in result.crossings.values()),
        f"  {result.difference_sentence()}",
        f"  One run of each, seed {result.settings.seed}; times are of training alone. "
        f"The demo took {result.seconds:.0f} s.",
    )


def _say(console: Console, *lines: str, is_to_copy: bool = False) -> None:
    for line in lines:
        console.print(line, highlight=False, soft_wrap=is_to_copy or not console.is_terminal)
