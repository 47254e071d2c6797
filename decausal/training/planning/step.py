"""The training step of a run that has not begun: student, teacher, losses and a batch, by the run's own code."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from decausal.data.stream import Batch, TrainingStream
from decausal.devices import choices
from decausal.diffusion.layout import Layout, positions_in_documents
from decausal.models.adapt import outline
from decausal.models.architecture import context_length, refuse_longer_rows
from decausal.models.backbone import decoder_layers, stock_model
from decausal.models.casting import cast_weights
from decausal.models.facts import ConversionFacts
from decausal.models.row_attention import FLEX, RowAttention
from decausal.training.losses import Supervision
from decausal.training.on_device import reads_packed_rows
from decausal.training.run import run_length, training_arguments
from decausal.training.run_rows import collator_of, rows_of_run, stream_of
from decausal.training.settings import ConversionSettings
from decausal.training.start import Start, find_start
from decausal.training.student import (
    give_mask_token,
    needs_teacher,
    refuse_checkpointing,
    student_of,
    supervision_of,
)
from decausal.training.teacher import CAUSAL, AdapterTeacher, Teacher
from decausal.training.terms import Term

META = torch.device("meta")
_STEPS_UNKNOWN = 1000
"""Assumed length of a run if neither data nor settings give it, for losses that change during the run."""
_PLACES = 200
"""Number of places in a run that are examined to find when each loss is used."""


@dataclass(frozen=True)
class PlannedStep:
    """A training step that can be counted or measured.

    Attributes:
        student, teacher: The models, on `meta` or, with random weights, on a device.
        supervision: The losses.
        batch: The run's first batch, on the CPU.
        args: The run's arguments.
        device: Where the run will be.
        num_steps: Optimizer steps of the run; None if neither data nor settings say.
        rollout_slots: Tokens whose keys and values the run holds while it decodes, which is not part of a step.
    """

    student: nn.Module
    teacher: Teacher | None
    supervision: Supervision
    batch: Batch
    args: TrainingArguments
    device: torch.device
    num_steps: int | None
    rollout_slots: int = 0

    @property
    def mixed_dtype(self) -> torch.dtype | None:
        """The type of autocast; None: products are in the weights' type."""
        return torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None

    @property
    def num_tokens(self) -> int:
        """Tokens that the student reads in the batch."""
        if "groups" in self.batch:
            return self.batch["clean_ids"].numel() + self.batch["groups"].position_ids.numel()
        return self.batch.get("student_ids", self.batch.get("noised_ids")).numel()

    def stages(self) -> list[tuple[dict[Term, float], float]]:
        """Returns the sets of losses, with weights, that the run uses, and for which share of the run."""
        total = self.num_steps or _STEPS_UNKNOWN
        places = sorted({round(place * (total - 1) / _PLACES) for place in range(_PLACES + 1)})
        found: dict[frozenset[Term], tuple[dict[Term, float], int]] = {}
        for place in places:
            weights = self.supervision.weights(place)
            first, count = found.get(frozenset(weights), (weights, 0))
            found[frozenset(weights)] = first, count + 1
        return [(weights, count / len(places)) for weights, count in found.values()]

    def attended(self) -> RowAttention:
        """Returns which tokens read which in the student's rows, as FlexAttention sees it."""
        batch, layout = self.batch, self.supervision.layout
        if "student_ids" in batch:
            names = ("student_document_ids", "student_position_ids", "stream_ids")
            return RowAttention(layout, *(batch[name] for name in names))
        rows = batch["clean_ids"] if "groups" in batch else batch["noised_ids"]
        documents = batch.get("document_ids", torch.zeros_like(batch["clean_ids"]))
        documents = documents.repeat_interleave(len(rows) // len(documents), dim=0)
        return RowAttention(CAUSAL if "groups" in batch else layout, documents, positions_in_documents(documents))


class RandomRows:
    """Rows of random tokens, each one document that is trained on from its first to its last token."""

    def __init__(self, vocab_size: int, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(vocab_size, (64, length), generator=generator)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        whole = torch.zeros(self._ids.shape[1], dtype=torch.long)
        return {"clean_ids": self._ids[index], "document_ids": whole, "is_maskable": whole == 0}


def planned_step(
    settings: ConversionSettings,
    training: dict[str, Any],
    device: torch.device,
    *,
    where: torch.device = META,
    num_rows: int | None = None,
    start: Start | None = None,
) -> PlannedStep:
    """Prepares a run's step without its weights.

    Args:
        settings: As for `convert`. Without data, the rows are random tokens, one document in each.
        training: Transformers' arguments, without need of `output_dir`.
        device: Where the run will be. Choices are made for this device.
        where: Where the models are made.
        num_rows: Clean rows of the batch; None: those of the run.
        start: What the run starts from, if that is known. The settings then hold all facts.

    Raises:
        UserError: There is no such model or data, or settings contradict each other or the model.
    """
    args = training_arguments(_arguments(training, device, where))
    if start is None:
        settings, start = find_start(settings, Path(args.output_dir), None)
    refuse_checkpointing(settings, args)
    layout = Layout(settings.layout, settings.block_size, settings.causal_context, settings.causal_groups)
    wanted = None if settings.attn_implementation == FLEX else settings.attn_implementation
    model, tokenizer = outline(start.name, revision=start.commit, attn_implementation=wanted, device=where)
    refuse_longer_rows(settings.max_length, model.config)
    teacher = _teacher(settings, start, model, args, where)
    mask_token_id = give_mask_token(settings, model, tokenizer, layout)
    stream, collator, num_steps = _rows(settings, args, model, tokenizer, layout, mask_token_id, device)
    rows = [stream[place] for place in range(num_rows or args.per_device_train_batch_size)]
    stream.close()
    if choices(device).has_flex and settings.attn_implementation in (None, FLEX):
        _attend_by_flex(model, teacher, layout.kind == "block" or reads_packed_rows(stream))
    student = student_of(settings, model, tokenizer, mask_token_id, args).train()
    if args.gradient_checkpointing:
        with warnings.catch_warnings():  # transformers renames it, and both names work
            warnings.simplefilter("ignore", FutureWarning)
            kwargs = args.gradient_checkpointing_kwargs or {"use_reentrant": False}
            stock_model(student).gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    if teacher is None and needs_teacher(settings, model):
        teacher = AdapterTeacher(student)
    supervision = supervision_of(
        settings, layout, mask_token_id, len(decoder_layers(model)), num_steps or _STEPS_UNKNOWN
    )
    batch = collator(rows)
    # Each row has one more slot, for padding.
    slots = settings.rollout_batch_size * (settings.max_length + 1) if settings.rows == "rollout" else 0
    return PlannedStep(student, teacher, supervision, batch, args, device, num_steps, slots)


def _arguments(training: dict[str, Any], device: torch.device, where: torch.device) -> dict[str, Any]:
    values = {"output_dir": "unused"} | training
    if where.type != device.type:
        values |= {"use_cpu": True}  # the device may not be here
    is_said = any(values.get(name) is not None for name in ("bf16", "fp16"))
    return values if is_said or not choices(device).is_mixed else values | {"bf16": True}


def _teacher(
    settings: ConversionSettings, start: Start, model: PreTrainedModel, args: TrainingArguments, where: torch.device
) -> Teacher | None:
    """Returns the outline of the model to compare with, unless it is the student without its adapters."""
    if not needs_teacher(settings, model):
        return None
    named = settings.teacher_model_name_or_path
    if named is None and start.facts is None and settings.lora_r:
        return None
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    return Teacher(cast_weights(outline(named or start.source, device=where)[0], dtype))


def _rows(
    settings: ConversionSettings,
    args: TrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
    mask_token_id: int,
    device: torch.device,
) -> tuple[TrainingStream, Any, int | None]:
    """Returns the corpus rows of the run or random ones, what makes batches of them, and the run's steps if known.

    Rollouts are as long as `max_length` at most, so random rows stand for them.
    """
    facts = ConversionFacts(
        source="",
        layout=settings.layout,
        block_size=settings.block_size,
        causal_context=settings.causal_context,
        causal_groups=settings.causal_groups,
        weights=settings.weights,
        shift=settings.shift,
        mask_token_id=mask_token_id,
    )
    collator = collator_of(settings, facts, context_length(model.config), choices(device).row_multiple)
    if settings.data is not None:
        stream = rows_of_run(settings, args, model, tokenizer, facts).stream
        if isinstance(stream, TrainingStream):
            return stream, collator, args.max_steps
    num_steps = args.max_steps if args.max_steps > 0 else None
    args.max_steps = num_steps or _STEPS_UNKNOWN
    rows = RandomRows(min(mask_token_id, len(tokenizer)), settings.max_length)
    return stream_of(settings, rows, run_length(args, len(rows)), args.seed), collator, num_steps


def _attend_by_flex(model: PreTrainedModel, teacher: Teacher | None, is_wanted: bool) -> None:
    if is_wanted and model.config._attn_implementation == "sdpa":
        for each in (model, None if teacher is None else stock_model(teacher.model)):
            if each is not None and each.config._attn_implementation == "sdpa":
                each.config._attn_implementation = FLEX
