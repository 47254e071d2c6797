"""The half of the trainer that writes and reads checkpoints, on `transformers.Trainer`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from decausal.models.backbone import stock_model
from decausal.models.draft_head import is_of_draft_head, load_draft_head, save_draft_head
from decausal.models.mask_row import MASK_ROW, fold_mask_row, load_mask_row, save_mask_row
from decausal.privacy import secrets_set_aside
from decausal.training.bad_steps import BadSteps
from decausal.training.losses import remove_training_forward
from decausal.training.meters import TokenCounts, TokenMeter
from decausal.training.on_policy import OnPolicyRows
from decausal.training.run import argument_errors
from decausal.training.run_directory import STAGING, checkpoints, discard, disk_errors, seal, sealed
from decausal.training.sharding import reshard, tie


class CheckpointingTrainer(Trainer):
    """Writes checkpoints elsewhere and renames them when they are complete, with everything that resuming needs.

    Args:
        model: The student, stock or wrapped by PEFT.
        args: Transformers' arguments.
        finish_checkpoint: Called with each checkpoint's directory before it gets its name, to add what makes it
            loadable (tokenizer, facts).
        on_policy: The on-policy rows, whose rollouts a checkpoint keeps, or None.
        meter: Counts the tokens that are trained on.
        run_record: The run's record in checkpoints, see `decausal.training.resuming.run_record`.
        more: Passed on to `transformers.Trainer`.

    Raises:
        UserError: Transformers does not accept an argument.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        *,
        finish_checkpoint: Callable[[Path], None],
        on_policy: OnPolicyRows | None,
        meter: TokenMeter | None,
        run_record: Mapping[str, Any] | None,
        **more: Any,
    ) -> None:
        with argument_errors():
            super().__init__(model, args, **more)
        self.finish_checkpoint = finish_checkpoint
        self.on_policy = on_policy
        self.meter = TokenMeter() if meter is None else meter
        self.run_record = run_record
        self.bad_steps = BadSteps(Path(args.output_dir), self.accelerator.gather)
        self._is_staging = False

    def _get_output_dir(self, trial: Any) -> str:
        return os.path.join(self.args.output_dir, STAGING) if self._is_staging else self.args.output_dir

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.bad_steps.refuse()
        self.bad_steps.refuse_weights(self.model, self.state.global_step)
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
            save_draft_head(self.model, state_dict, Path(directory))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_beside_adapter(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self.meter.start_from(TokenCounts(**sealed(Path(checkpoint)).get("tokens", {})))
        if self.on_policy is not None:
            self.on_policy.load(Path(checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_beside_adapter(Path(str(self.state.best_model_checkpoint)))

    def _load_beside_adapter(self, checkpoint: Path) -> None:
        if not self.is_fsdp_enabled:  # whose checkpoints hold every weight
            load_mask_row(self.model, checkpoint)
            load_draft_head(self.model, checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Mask row and draft head are no weights of the source, and tied weights are saved once: these may be
        missing."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        loaded = {id(value) for name, value in parameters.items() if name not in load_result.missing_keys}
        missing = [
            name
            for name in load_result.missing_keys
            if name.rpartition(".")[2] != MASK_ROW
            and not is_of_draft_head(name)
            and id(parameters.get(name)) not in loaded
        ]
        super()._issue_warnings_after_load(type(load_result)(missing, load_result.unexpected_keys))
