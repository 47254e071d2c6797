"""The one trainer: transformers' own, fed from a `TrainingStream`, with global means and checkpoints that are whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainingArguments

from decausal.data.stream import Collator, TrainingStream
from decausal.diffusion.layout import future_order
from decausal.errors import UserError
from decausal.models.backbone import stock_model
from decausal.models.mask_row import fold_mask_row, load_mask_row, save_mask_row
from decausal.training.losses import Supervision, install_training_forward
from decausal.training.run_directory import STAGING, checkpoints
from decausal.training.teacher import Teacher

_NEVER = torch.iinfo(torch.int64).max


class ConversionTrainer(Trainer):
    """Trains a stock causal LM under any layout, rows and supervision; pretraining is its causal, unmasked case.

    What it changes in `transformers.Trainer`, and why:
        - rows come in the stream's order (no sampler state), so a resumed run sees what it would have seen;
        - losses are divided by counts over the global batch, whatever the accumulation and number of processes;
        - a checkpoint is written aside and renamed when whole;
        - a loss that is not finite stops the run, naming the step, before it can reach a checkpoint.

    Args:
        model: the student, stock or wrapped by PEFT.
        args: transformers' arguments; `max_steps` decides the length of the run.
        stream: training rows.
        collator: makes batches of them.
        supervision: the losses.
        teacher: the frozen AR model, None where the supervision has no use for it.
        finish_checkpoint: called with each checkpoint's directory before it gets its name, to add what makes it
            loadable (tokenizer, facts).
        measure: called with the stock student wherever transformers would evaluate; returns what to log.
        more: passed on to `transformers.Trainer` (callbacks, optimizers).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        stream: TrainingStream,
        collator: Collator,
        supervision: Supervision,
        teacher: Teacher | None = None,
        finish_checkpoint: Callable[[Path], None] = lambda _: None,
        measure: Callable[[PreTrainedModel], dict[str, float]] | None = None,
        **more: Any,
    ) -> None:
        eval_dataset = None if measure is None else []  # transformers asks for one; `measure` has its own
        super().__init__(model, args, train_dataset=stream, eval_dataset=eval_dataset, data_collator=collator, **more)
        self.model_accepts_loss_kwargs = True  # our losses are global means already: transformers must not rescale them
        self.supervision = supervision
        self.teacher = teacher
        self.finish_checkpoint = finish_checkpoint
        self.measure = measure
        self._sums: dict[str, Tensor | float] = defaultdict(float)
        self._num_logged_steps = 0
        self._first_bad_step: Tensor | None = None
        self._is_staging = False
        self._future_order: Tensor | None = None
        install_training_forward(stock_model(model), supervision)
        if teacher is not None:
            teacher.model.to(args.device)

    # Rows and losses

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Sums the batches' denominators over the accumulated batches and over all processes: [2]."""
        denominators = torch.stack([batch["denominators"] for batch in batch_samples]).sum(0)
        denominators = denominators.to(device=device, dtype=torch.float32)
        if self.args.world_size > 1:
            denominators = self.accelerator.reduce(denominators, reduction="sum")
        return denominators.clamp(min=1.0)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """Returns this micro-batch's share of the global mean loss."""
        if num_items_in_batch is None:
            raise ValueError("the loss is a global mean: it needs the global batch's denominators")
        step = self.state.global_step
        batch = dict(inputs)
        weight = self._alignment_weight(step)
        if weight:
            batch["teacher_states"] = self._teacher_states(batch)
        if step < self.supervision.anneal_steps:
            batch["future_order"] = self._order_of_futures(batch["clean_ids"])
            batch["future_fraction"] = step / self.supervision.anneal_steps
        sums = model(training_batch=batch)

        num_token_terms, num_aligned = num_items_in_batch.unbind()
        loss = sums["tokens"] / num_token_terms
        self._record("token_loss", loss)
        if weight:
            distance = sums["alignment"] / num_aligned
            self._record("alignment_loss", distance)
            loss = loss + weight * distance
        self._watch_for_bad_loss(loss, step)
        # Data parallelism averages gradients over processes; the sum over them is what the global mean needs.
        return loss * self.accelerator.num_processes

    def _alignment_weight(self, step: int) -> float:
        schedule = self.supervision.alignment
        if schedule is None or self.teacher is None:
            return 0.0
        if schedule.is_over(step):
            self.teacher = None  # its memory is free from here on
            return 0.0
        return schedule(step)

    def _teacher_states(self, batch: dict[str, Tensor]) -> list[Tensor]:
        with self.accelerator.autocast():
            return self.teacher.states(
                batch["clean_ids"],
                batch["teacher_index"],
                self.supervision.aligned_layers,
                batch.get("document_ids"),
                batch.get("position_ids"),
            )

    def _order_of_futures(self, clean_ids: Tensor) -> Tensor:
        if self._future_order is None:
            self._future_order = future_order(clean_ids.shape[1], self.args.seed, clean_ids.device)
        return self._future_order

    # Logs

    def _record(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value.detach()

    def _watch_for_bad_loss(self, loss: Tensor, step: int) -> None:
        """Remembers, on the device, the first step whose loss is not finite; read only where the host waits anyway."""
        if self._first_bad_step is None:
            self._first_bad_step = torch.tensor(_NEVER, device=loss.device)
        bad_step = torch.where(loss.detach().isfinite(), _NEVER, step + 1)
        self._first_bad_step = torch.minimum(self._first_bad_step, bad_step)
        if loss.device.type == "cpu":
            self._stop_on_bad_loss()

    def _stop_on_bad_loss(self) -> None:
        if self._first_bad_step is None or int(self._first_bad_step) == _NEVER:
            return
        kept = checkpoints(Path(self.args.output_dir))
        where = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been saved yet"
        raise UserError(
            f"the loss at step {int(self._first_bad_step)} is not finite, so training stopped; {where}; "
            "try a lower --learning_rate, a longer --warmup_steps or --bf16 false"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the loss's parts to transformers' log line; the only place where the host waits for the device."""
        self._stop_on_bad_loss()
        num_steps = self.state.global_step - self._num_logged_steps
        if "loss" in logs and num_steps:
            for name, value in self._sums.items():
                total = self.accelerator.reduce(torch.as_tensor(value), reduction="sum")
                logs[name] = round(float(total) / num_steps, 6)
            self._sums.clear()
            self._num_logged_steps = self.state.global_step
        super().log(logs, *args, **kwargs)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measures the student by `measure`, logs it and returns it."""
        metrics = self.measure(stock_model(self.model))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return os.path.join(self.args.output_dir, STAGING) if self._is_staging else self.args.output_dir

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._stop_on_bad_loss()
        name = f"checkpoint-{self.state.global_step}"
        staged, final = Path(self.args.output_dir, STAGING, name), Path(self.args.output_dir, name)
        self._is_staging = True
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                self.finish_checkpoint(staged)
        except OSError as error:
            shutil.rmtree(staged.parent, ignore_errors=True)
            raise self._save_error(error) from error
        except RuntimeError as error:  # torch.save reports a full disk as one
            shutil.rmtree(staged.parent, ignore_errors=True)
            if "PytorchStreamWriter" not in str(error) and "No space left" not in str(error):
                raise
            raise self._save_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error
        finally:
            self._is_staging = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(staged, final)
            shutil.rmtree(staged.parent, ignore_errors=True)
            for old in self._surplus_checkpoints():
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _save_error(self, error: OSError) -> UserError:
        kept = checkpoints(Path(self.args.output_dir))
        resume = f"{kept[-1]} is whole: resume from it" if kept else "no earlier checkpoint exists"
        reason = error.strerror or str(error)
        return UserError(f"cannot save a checkpoint in {self.args.output_dir}: {reason}; {resume} when there is room")

    def _surplus_checkpoints(self) -> list[Path]:
        limit = self.args.save_total_limit
        return checkpoints(Path(self.args.output_dir))[:-limit] if limit else []

    def whole_state_dict(self) -> dict[str, Tensor]:
        """Returns all weights, gathered from wherever sharding has put them."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return self.accelerator.get_state_dict(self.model_wrapped)
        return self.model.state_dict()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, state_dict=fold_mask_row(self.model, state_dict))
        save_mask_row(self.model, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_mask_row(self.model, Path(resume_from_checkpoint))
