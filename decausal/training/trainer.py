"""The trainer: transformers' own, fed from a `TrainingStream`, with global means and complete checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainingArguments

from decausal.data.stream import Batch, TrainingStream
from decausal.devices import choices
from decausal.diffusion.layout import future_order
from decausal.errors import UserError
from decausal.models.backbone import stock_model
from decausal.models.compiled import uncompiled
from decausal.models.mask_row import MASK_ROW, fold_mask_row, load_mask_row, save_mask_row
from decausal.privacy import secrets_set_aside
from decausal.training.log_means import LogMeans
from decausal.training.losses import (
    Supervision,
    install_training_forward,
    remove_training_forward,
    weighed,
    weighted_loss,
)
from decausal.training.meters import TokenCounts, TokenMeter
from decausal.training.on_policy import POSITIONS, OnPolicyStream
from decausal.training.progress import show_progress
from decausal.training.questions import Question, Vocabulary, ask
from decausal.training.rollouts import Decoding, Rollout, Task
from decausal.training.run import argument_errors
from decausal.training.run_directory import STAGING, checkpoints, discard, disk_errors, seal, sealed
from decausal.training.sharding import are_finite, gathered, reshard, shard_layers, tie
from decausal.training.teacher import AdapterTeacher, Teacher
from decausal.training.terms import Term

Result = TypeVar("Result")
Counts = dict[str, Tensor]  # scalars, by the values of `decausal.data.counts.Count`
_NEVER = torch.iinfo(torch.int64).max


class ConversionTrainer(Trainer):
    """Trains a stock causal LM under any layout, rows and supervision. Pretraining is the causal case without masks.

    It changes these things in `transformers.Trainer`:
        - rows come in the stream's order (no sampler state), so a resumed run sees what it would have seen;
        - losses are divided by counts over the global batch, whatever the accumulation and number of processes;
        - a checkpoint is written elsewhere and renamed when complete;
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
        eval_dataset = None if measure is None else []  # transformers needs one; `measure` has its own
        with argument_errors():
            super().__init__(
                model, args, train_dataset=stream, eval_dataset=eval_dataset, data_collator=collator, **more
            )
        self.model_accepts_loss_kwargs = True  # our losses are already global means: transformers must not rescale them
        self.supervision = supervision
        self.teacher = teacher
        self.decoding = decoding
        self.finish_checkpoint = finish_checkpoint
        self.measure = measure
        self.run_record = run_record
        self.meter = TokenMeter() if meter is None else meter
        show_progress(self, self.meter)
        self._means = LogMeans()
        self._first_bad_step: Tensor | None = None
        self._is_staging = False
        self._future_order: Tensor | None = None
        self.on_policy = stream.on_policy if isinstance(stream, OnPolicyStream) else None
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
        self._watch_for_bad_loss(value, step)
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

    def _watch_for_bad_loss(self, loss: Tensor, step: int) -> None:
        """Stores, on the device, the first step whose loss is not finite. It is read only when the host waits
        anyway."""
        if self._first_bad_step is None:
            self._first_bad_step = torch.full((), _NEVER, device=loss.device)
        bad_step = torch.where(loss.detach().isfinite(), _NEVER, step + 1)
        self._first_bad_step = torch.minimum(self._first_bad_step, bad_step)
        if _reads_at_once(loss.device) and int(self._first_bad_step) != _NEVER:
            raise self._bad_step_error(f"the loss at step {int(self._first_bad_step)} is not finite")

    def _stop_if_bad(self) -> None:
        """Raises in all processes if any of them has seen a bad loss."""
        if self._first_bad_step is None:
            return
        first = int(self.accelerator.gather(self._first_bad_step.reshape(1)).min())
        if first != _NEVER:
            raise self._bad_step_error(f"the loss at step {first} is not finite")

    def _stop_if_weights_are_bad(self) -> None:
        """Raises if weights are not finite: a finite loss can have another gradient, and checkpoints must be finite."""
        if not bool(self.accelerator.gather(are_finite(self.model).reshape(1)).all()):
            raise self._bad_step_error(f"after step {self.state.global_step} some weights are not finite")

    def _bad_step_error(self, what: str) -> UserError:
        kept = checkpoints(Path(self.args.output_dir))
        where = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been saved yet"
        remedy = "try a lower --learning_rate, a longer --warmup_steps or --bf16 false"
        return UserError(f"{what}, so training stopped; {where}; {remedy}")

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the loss's parts to transformers' log line. Only here the host waits for the device.

        `epoch` counts passes over the data. For transformers the whole run is one pass.
        """
        self._stop_if_bad()
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
            mixed = self.accelerator.autocast() if choices(self.args.device).is_mixed else nullcontext()
            with mixed, gathered(self.model), uncompiled(self.model):
                return self.measure(stock_model(self.model))

        return self._inside(measure)

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return os.path.join(self.args.output_dir, STAGING) if self._is_staging else self.args.output_dir

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._stop_if_bad()
        self._stop_if_weights_are_bad()
        output_dir = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        staged = output_dir / STAGING / name
        with disk_errors(output_dir):
            self._is_staging = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._is_staging = False
            if self.on_policy is not None:
                self.on_policy.save(staged)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._finish_checkpoint(staged)
                discard(output_dir / name)
                os.replace(staged, output_dir / name)
        self.discard_surplus_checkpoints()
        self.accelerator.wait_for_everyone()

    def _finish_checkpoint(self, staged: Path) -> None:
        if self.state.best_global_step:  # transformers looked for it in the wrong directory
            self.state.best_model_checkpoint = str(
                Path(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
            )
            self.state.save_to_json(str(staged / "trainer_state.json"))
        self.finish_checkpoint(staged)
        record = dict(self.run_record or {}) | {"tokens": self.meter.counts._asdict()}
        seal(staged, is_resumable=not self.args.save_only_model, run=record)

    def discard_surplus_checkpoints(self) -> None:
        """Keeps `save_total_limit` checkpoints, and the best one."""
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        output_dir = Path(self.args.output_dir)
        if limit and self.args.should_save:
            with disk_errors(output_dir):
                for old in checkpoints(output_dir)[:-limit]:
                    if str(old) != best:
                        discard(old)

    def whole_state_dict(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """Returns all weights of the student that `trained_model` returned, gathered from FSDP's shards.

        Only the first process gets them.
        """
        return tie(model, self.accelerator.get_state_dict(model)) if self.is_fsdp_enabled else model.state_dict()

    def trained_model(self) -> torch.nn.Module:
        """Returns the student in eval mode without our or accelerate's wrappers. Adapters stay.

        Under FSDP its weights are shards.
        """
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        reshard(model)
        remove_training_forward(stock_model(model))
        return model.eval()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        directory = output_dir or self.args.output_dir
        state_dict = self.model.state_dict() if state_dict is None else tie(self.model, state_dict)
        if stock_model(self.model) is self.model:
            with secrets_set_aside(self.args):  # training_args.bin is a file like any other
                super()._save(directory, state_dict=fold_mask_row(self.model, state_dict))
        elif self.args.should_save:
            # PEFT would add the embeddings if a mask token was added, but the row has its own file.
            self.model.save_pretrained(directory, state_dict=state_dict, save_embedding_layers=False)
            save_mask_row(state_dict, Path(directory))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_mask_row(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self.meter.start_from(TokenCounts(**sealed(Path(checkpoint)).get("tokens", {})))
        if self.on_policy is not None:
            self.on_policy.load(Path(checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_mask_row(Path(str(self.state.best_model_checkpoint)))

    def _load_mask_row(self, checkpoint: Path) -> None:
        if not self.is_fsdp_enabled:  # whose checkpoints store the row separately
            load_mask_row(self.model, checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """The mask row is not a weight of the source, and tied weights are saved once. So these may be missing."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        loaded = {id(value) for name, value in parameters.items() if name not in load_result.missing_keys}
        missing = [
            name
            for name in load_result.missing_keys
            if name.rpartition(".")[2] != MASK_ROW and id(parameters.get(name)) not in loaded
        ]
        super()._issue_warnings_after_load(type(load_result)(missing, load_result.unexpected_keys))


def _reads_at_once(device: torch.device) -> bool:
    """Returns whether reading a value is free. On an accelerator the host would wait for all queued work."""
    return device.type == "cpu"
