"""The trainer: transformers' own, fed from a `TrainingStream`, with losses as global means."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, TrainingArguments

from decausal.data.stream import Batch, TrainingStream
from decausal.diffusion.layout import future_order
from decausal.errors import UserError
from decausal.models.backbone import stock_model
from decausal.models.compiled import uncompiled
from decausal.training.checkpointing import CheckpointingTrainer
from decausal.training.log_means import LogMeans
from decausal.training.losses import (
    Supervision,
    install_training_forward,
    weighed,
    weighted_loss,
)
from decausal.training.meters import TokenMeter
from decausal.training.on_policy import POSITIONS, OnPolicyStream
from decausal.training.progress import show_progress
from decausal.training.questions import Question, Vocabulary, ask
from decausal.training.rollouts import Decoding, Rollout, Task
from decausal.training.run import argument_errors
from decausal.training.sharding import gathered, shard_layers
from decausal.training.teacher import AdapterTeacher, Teacher
from decausal.training.terms import Term

Result = TypeVar("Result")
Counts = dict[str, Tensor]  # scalars, by the values of `decausal.data.counts.Count`


class ConversionTrainer(CheckpointingTrainer):
    """Trains a stock causal LM under any layout, rows and supervision. Pretraining is the causal case without masks.

    It changes these things in `transformers.Trainer`, besides checkpoints:
        - rows come in the stream's order (no sampler state), so a resumed run sees what it would have seen;
        - losses are divided by counts over the global batch, whatever the accumulation and number of processes;
        - a loss that is not finite stops the run, naming the step, before it can reach a checkpoint.

    Args:
        model: The student, stock or wrapped by PEFT.
        args: Transformers' arguments. `max_steps` decides the length of the run.
        stream: The training rows.
        collator: Makes batches of the rows.
        supervision: The losses.
        teacher: The frozen AR model, or None if no loss needs it.
        decoding: How the rollouts of an `OnPolicyStream` are made.
        finish_checkpoint: Called with each checkpoint's directory before it gets its name, to add what makes it
            loadable (tokenizer, facts).
        measure: Called with the stock student when transformers would evaluate. Returns what to log.
        meter: Counts the tokens that are trained on.
        run_record: The run's record in checkpoints, see `decausal.training.resuming.run_record`.
        more: Passed on to `transformers.Trainer` (callbacks, optimizers).

    Raises:
        UserError: Transformers does not accept an argument.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        *,
        stream: TrainingStream | OnPolicyStream,
        collator: Callable[[Sequence[dict[str, Any]]], Batch],
        supervision: Supervision,
        teacher: Teacher | None = None,
        decoding: Decoding | None = None,
        finish_checkpoint: Callable[[Path], None] = lambda _: None,
        measure: Callable[[PreTrainedModel], dict[str, float]] | None = None,
        meter: TokenMeter | None = None,
        run_record: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(
            model,
            args,
            finish_checkpoint=finish_checkpoint,
            on_policy=stream.on_policy if isinstance(stream, OnPolicyStream) else None,
            meter=meter,
            run_record=run_record,
            train_dataset=stream,
            eval_dataset=None if measure is None else [],  # transformers needs one; `measure` has its own
            data_collator=collator,
            **more,
        )
        self.model_accepts_loss_kwargs = True  # our losses are already global means: transformers must not rescale them
        self.supervision = supervision
        self.teacher = teacher
        self.decoding = decoding
        self.measure = measure
        show_progress(self, self.meter)
        self._means = LogMeans()
        self._future_order: Tensor | None = None
        if self.on_policy is not None and self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise UserError("--rows rollout needs FSDP2: give fsdp_version 2 in the configuration, not 1")
        install_training_forward(stock_model(model))
        if teacher is not None and not isinstance(teacher, AdapterTeacher):
            if self.is_fsdp_enabled and self.accelerator.is_fsdp2:
                shard_layers(teacher.model)
            teacher.model.to(args.device)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        with argument_errors():
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        with argument_errors(TypeError):  # for a scheduler's own arguments
            return super().create_scheduler(*args, **kwargs)

    # A step: rows, teacher, student, loss

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Counts]:
        """Returns the batches that an optimizer step accumulates, and the denominators of their losses."""
        batches = [self._with_rows(batch) for batch in islice(epoch_iterator, num_batches)]
        counts = self.global_counts(batches, device) if batches else {}
        self.meter.add(counts)
        return batches, counts

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        """Moves a batch unchanged. Under DeepSpeed, transformers would round the targets' weights and counts to
        bf16."""
        return send_to_device(inputs, self.args.device)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Counts | None = None,
    ) -> Tensor:
        """Returns this micro-batch's share of the global mean loss."""
        if num_items_in_batch is None:
            raise ValueError("the loss is a global mean: it needs the global batch's counts")
        step = self.state.global_step
        weights = self._weights(step)
        batch = self._with_future(inputs, step)
        answers = self._ask_teacher(batch, weights)
        means: dict[Term, Tensor] = {}  # before FSDP rounds what its forward returns

        def student_loss() -> Tensor:
            loss, found = weighted_loss(
                stock_model(self.model), batch, self.supervision, weights, num_items_in_batch, answers
            )
            means.update(found)
            return loss

        loss = model(inside=student_loss)
        value = weighed(means, weights)
        for term, mean in means.items():
            self._means.add(term.log_name, mean)
        self.bad_steps.watch(value, step)
        loss = value + (loss - loss.detach())  # FSDP may have rounded this scalar, but not its gradient
        # Data parallelism averages gradients over processes; the sum over them is what the global mean needs.
        return loss * self.accelerator.num_processes

    def _with_rows(self, batch: Batch) -> Batch:
        """Makes a batch of on-policy rows now, with the weights that this step will change."""
        if POSITIONS not in batch:
            return batch
        made = self.on_policy.batch(batch[POSITIONS].tolist(), self.state.global_step, self._roll_out)
        return self._prepare_inputs(made)

    def _roll_out(self, tasks: Sequence[Task]) -> list[Rollout]:
        def roll_out() -> list[Rollout]:
            with self.accelerator.autocast(), gathered(self.model), uncompiled(self.model):
                return self.decoding.roll_out(self.model, tasks)

        return self._inside(roll_out)

    def global_counts(self, batches: Sequence[Batch], device: torch.device) -> Counts:
        """Sums the counts of the accumulated batches over all processes."""
        names = sorted(batches[0]["counts"])
        totals = torch.stack([torch.stack([batch["counts"][name] for name in names]) for batch in batches]).sum(0)
        totals = totals.to(device=device, dtype=torch.float32, non_blocking=True)
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, reduction="sum")
        return dict(zip(names, totals.unbind(), strict=True))

    def _weights(self, step: int) -> dict[Term, float]:
        """Returns the losses of this step. A teacher that none of them needs any more is dropped, which frees
        memory."""
        if not self.supervision.needs_teacher(step):
            self.teacher = None
        return self.supervision.weights(step)

    def _with_future(self, batch: Batch, step: int) -> Batch:
        """Adds how far attention has been opened, while it is annealed."""
        if step >= self.supervision.anneal_steps:
            return batch
        if self._future_order is None:
            clean_ids = batch["clean_ids"]
            self._future_order = future_order(clean_ids.shape[1], self.args.seed, clean_ids.device)
        return batch | {"future_order": self._future_order, "future_fraction": step / self.supervision.anneal_steps}

    def _ask_teacher(self, batch: Batch, terms: Collection[Term]) -> dict[Question, Any]:
        if self.supervision.is_gated:  # then its own clean half answers, inside the pass
            return {}
        questions = [question for term in terms for question in term.questions]
        head = stock_model(self.model).get_output_embeddings()
        vocabulary = Vocabulary(head.weight.shape[0], self.supervision.mask_token_id)

        def answers() -> dict[Question, Any]:
            with self.accelerator.autocast():
                return ask(self.teacher, questions, batch, vocabulary)

        # Adapters use the student's own weights, which FSDP has sharded.
        return self._inside(answers) if questions and isinstance(self.teacher, AdapterTeacher) else answers()

    def _inside(self, function: Callable[[], Result]) -> Result:
        """Calls a function inside the model's forward, where it can use weights that FSDP has sharded."""
        if not self.is_fsdp_enabled:
            return function()
        results = []  # FSDP would look for tensors in the result of its forward
        self.model_wrapped(inside=lambda: results.append(function()))
        return results[0]

    # Logs

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the loss's parts to transformers' log line. Only here the host waits for the device.

        `epoch` counts passes over the data. For transformers the whole run is one pass.
        """
        self.bad_steps.refuse()
        if "loss" in logs:
            sum_over_processes = partial(self.accelerator.reduce, reduction="sum")
            logs |= self._means.take(sum_over_processes, self.args.gradient_accumulation_steps)
            if self.on_policy is not None:
                totals = torch.tensor(self.on_policy.take_totals(), device=self.args.device)
                logs |= self.on_policy.means(sum_over_processes(totals).tolist())
        num_rows = self.state.global_step / self.args.max_steps * len(self.train_dataset)
        self.state.epoch = round(self.train_dataset.epochs(num_rows), 4)
        super().log(logs, *args, **kwargs)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measures the student with `measure`, logs the result and returns it."""
        metrics = self._measured()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measured(self) -> dict[str, float]:
        def measure() -> dict[str, float]:
            with self.accelerator.autocast(), gathered(self.model), uncompiled(self.model):
                return self.measure(stock_model(self.model))

        return self._inside(measure)
