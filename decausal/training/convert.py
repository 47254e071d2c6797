"""One conversion from start to end: AR directory in, diffusion directory out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from decausal.data.template import set_template
from decausal.diffusion.layout import Layout
from decausal.errors import UserError
from decausal.models.adapt import load_source
from decausal.models.architecture import refuse_longer_rows
from decausal.models.backbone import decoder_layers, stock_model
from decausal.models.base_files import base_files, base_hashes, refuse_links_out, refuse_secrets
from decausal.models.casting import cast_weights
from decausal.models.checkpoint import count_as_ends, dtype_to_save, save_converted
from decausal.models.compiled import compile_layers
from decausal.models.doctor import refuse_if_unusable
from decausal.models.facts import ConversionFacts, write_facts
from decausal.models.flex import use_flex_attention
from decausal.models.gated_checkpoint import save_gated, source_directory
from decausal.models.mask_row import fold_mask_row, settle_mask_row
from decausal.models.row_attention import FLEX
from decausal.training.corpus_rows import reading_ahead
from decausal.training.draft_tokens import frequent_tokens
from decausal.training.inputs import check_conversion
from decausal.training.measuring import Measure, measurement, with_evaluation
from decausal.training.memory import keep_freed_memory
from decausal.training.meters import TokenMeter
from decausal.training.on_device import attend_by_flex, compiles, say_precision
from decausal.training.planning.room import refuse_what_does_not_fit
from decausal.training.resuming import (
    fingerprint,
    refuse_other_arguments,
    refuse_other_rows,
    run_record,
    say_other_precision,
)
from decausal.training.run import rows_per_step, training_arguments
from decausal.training.run_directory import (
    checkpoint_to_resume,
    claimed,
    disk_errors,
    wants_resume,
)
from decausal.training.run_log import RunLog
from decausal.training.run_rows import rows_of_run
from decausal.training.settings import ConversionSettings
from decausal.training.sharding import refuse_partitioned
from decausal.training.start import Start, find_start
from decausal.training.student import (
    give_mask_token,
    needs_teacher,
    refuse_checkpointing,
    student_of,
    supervision_of,
)
from decausal.training.teacher import AdapterTeacher, Teacher, refuse_other_vocabulary
from decausal.training.trainer import ConversionTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """The result of a run: the trained student in memory, and its directory."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    facts: ConversionFacts
    output_dir: Path
    history: list[dict[str, float]]


def convert(
    settings: ConversionSettings,
    training: dict[str, Any],
    *,
    callbacks: list[TrainerCallback] | None = None,
    measure: Callable[[PreTrainedModel], dict[str, float]] | None = None,
    meter: TokenMeter | None = None,
) -> Conversion:
    """Converts an AR model into a diffusion model, or trains a converted one on, resumably.

    Args:
        settings: The point on the grid, the model and the data.
        training: Fields of `transformers.TrainingArguments`; needs `output_dir`.
        callbacks: Callbacks of `transformers.Trainer`.
        measure: Replaces the measurement on `eval_data`. Called with the student each `eval_steps`.
        meter: Counts the tokens that are trained on.

    Returns:
        The student, its facts and the log. `output_dir` holds the model, which `decausal.load` and plain
        `AutoModelForCausalLM` can load.

    Raises:
        UserError: The model cannot be converted, the data cannot be read, or settings contradict each other or the
            model. Then nothing is left in `output_dir`.
    """
    check_conversion(settings, training)
    args = training_arguments(with_evaluation(settings, training, is_measured=measure is not None))
    refuse_partitioned(args)
    say_precision(args)
    output_dir = Path(args.output_dir)
    resume = args.resume_from_checkpoint
    with claimed(output_dir, resume=wants_resume(resume), overwrite=settings.overwrite) as run_directory:
        checkpoint = checkpoint_to_resume(output_dir, resume)
        settings, start = find_start(settings, output_dir, checkpoint)
        if checkpoint is not None:
            refuse_other_arguments(checkpoint, args)
            say_other_precision(checkpoint, args)
        is_sharded = bool(args.fsdp or args.deepspeed)
        refuse_what_does_not_fit(settings, training, args.device, start=start, is_sharded=is_sharded)
        run = _prepare(settings, start, args, training, callbacks, measure, meter)
        if checkpoint is not None:
            refuse_other_rows(checkpoint, run.trainer.run_record)
        run_directory.begin(asdict(settings) | training, overwrite=settings.overwrite and checkpoint is None)
        with reading_ahead(run.trainer.train_dataset, lambda: run.trainer.state.global_step * rows_per_step(args)):
            run.trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        run.trainer.discard_surplus_checkpoints()  # left by a run that was killed after its last save
        model = _finish(settings, run)
    return Conversion(model, run.tokenizer, run.facts, output_dir, run.trainer.state.log_history)


@dataclass(frozen=True)
class _Run:
    trainer: ConversionTrainer
    tokenizer: PreTrainedTokenizerBase
    facts: ConversionFacts
    save_dtype: torch.dtype
    base: Path | None  # the source's files, where gated weights keep them


def _prepare(
    settings: ConversionSettings,
    start: Start,
    args: TrainingArguments,
    training: dict[str, Any],
    callbacks: list[TrainerCallback] | None,
    measure: Measure | None,
    meter: TokenMeter | None,
) -> _Run:
    layout = Layout(settings.layout, settings.block_size, settings.causal_context, settings.causal_groups)
    refuse_checkpointing(settings, args)
    model, tokenizer = _source(settings, start, layout, args)
    teacher = _teacher(settings, start, model, tokenizer, args)
    mask_token_id = give_mask_token(settings, model, tokenizer, layout)
    _set_template(settings, tokenizer)
    # Found before training: at its end the source may be out of reach.
    base = source_directory(start.name, start.commit) if settings.weights == "gated" else None
    rows = rows_of_run(settings, args, model, tokenizer, _facts(settings, start, training, mask_token_id, base))
    facts = rows.facts
    count_as_ends(model, tokenizer, facts.end_token_ids)
    meter = TokenMeter() if meter is None else meter
    measure = measurement(
        settings,
        args,
        model,
        tokenizer,
        facts,
        measure=measure,
        meter=meter,
        step=lambda: trainer.state.global_step,
    )
    attend_by_flex(settings, model, teacher, rows.stream, args.device)
    if args.device.type == "cpu":
        keep_freed_memory()
    if compiles(settings, model, args):
        compile_layers(model, *([] if teacher is None else [teacher.model]))
    draft_tokens = None
    if settings.draft_head:
        size = len(model.get_output_embeddings().weight)
        draft_tokens = frequent_tokens(rows.stream, settings.draft_vocabulary, size, facts.end_token_ids)
    student = student_of(settings, model, tokenizer, mask_token_id, args, draft_tokens)
    supervision = supervision_of(settings, layout, mask_token_id, len(decoder_layers(model)), args.max_steps)

    def finish_checkpoint(directory: Path) -> None:
        tokenizer.save_pretrained(directory)
        write_facts(directory, facts)

    trainer = ConversionTrainer(
        student,
        args,
        stream=rows.stream,
        collator=rows.collator,
        decoding=rows.decoding,
        supervision=supervision,
        teacher=AdapterTeacher(student) if teacher is None and needs_teacher(settings, model) else teacher,
        finish_checkpoint=finish_checkpoint,
        measure=measure,
        meter=meter,
        run_record=run_record(asdict(settings), args, fingerprint(rows.stream)),
        callbacks=[RunLog(Path(args.output_dir), lambda: trainer.meter), *(callbacks or [])],
    )
    # Found before training, because the source may be out of reach at its end.
    save_dtype = dtype_to_save(settings.save_dtype, settings.model_name_or_path, start.commit)
    return _Run(trainer, tokenizer, facts, save_dtype, base)


def _facts(
    settings: ConversionSettings, start: Start, training: dict[str, Any], mask_token_id: int, base: Path | None
) -> ConversionFacts:
    """Returns the facts of the model that the run makes. Gated ones name their source's files in `base`."""
    recipe = asdict(settings) | training | {"revision": start.commit}
    return ConversionFacts(
        layout=settings.layout,
        block_size=settings.block_size,
        causal_context=settings.causal_context,
        shift=settings.shift,
        mask_token_id=mask_token_id,
        causal_groups=settings.causal_groups,
        weights=settings.weights,
        recipe={name: value for name, value in recipe.items() if name != "output_dir"},
        sampler=settings.sampler or {},
        **start.history(),
        **_base_facts(settings, start, base),
    )


def _base_facts(settings: ConversionSettings, start: Start, base: Path | None) -> dict[str, Any]:
    """Returns the facts about the source of gated weights, which leave it unchanged."""
    if base is None:
        return {}
    if settings.reference_base and start.commit is None:
        raise UserError(f"--reference_base needs a model of the hub, and {start.name} is none; leave it out")
    if not settings.reference_base:
        refuse_links_out(base, base_files(base))  # its files are kept as they are
        refuse_secrets(base)
    reference = f"{start.name}@{start.commit}" if settings.reference_base else None
    return {"base": base_hashes(base), "base_reference": reference, "draft_head": settings.draft_head}


def _source(
    settings: ConversionSettings, start: Start, layout: Layout, args: TrainingArguments
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    wants_flex = settings.attn_implementation == FLEX
    model, tokenizer = start.load(None if wants_flex else settings.attn_implementation, settings.mask_token)
    refuse_if_unusable(model, tokenizer, start.facts)
    refuse_longer_rows(settings.max_length, model.config)
    if wants_flex:
        use_flex_attention(model, layout, args.device)
    return model, tokenizer


def _set_template(settings: ConversionSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    set_template(tokenizer, settings.chat_template, settings.chat_template_kwargs)
    if settings.weights == "gated" and (settings.chat_template or settings.chat_template_kwargs):
        logger.warning(
            "--chat_template and --chat_template_kwargs hold for this run alone: gated weights leave the tokenizer's "
            "files as they are, so give them to generate, chat, batch and serve as well"
        )


def _teacher(
    settings: ConversionSettings,
    start: Start,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
) -> Teacher | None:
    """Returns the model to compare with, unless it is the student without its adapters. Call it before adapting the
    model."""
    if not needs_teacher(settings, model):
        return None
    num_tokens = len(tokenizer) - (tokenizer.mask_token is not None)
    if settings.kl_top_k is not None and settings.kl_top_k > num_tokens:
        raise UserError(f"--kl_top_k {settings.kl_top_k}: the vocabulary has {num_tokens} tokens; give at most that")
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    if settings.teacher_model_name_or_path is not None or start.facts is not None:
        return Teacher(cast_weights(_other_model(settings, start, model, tokenizer), dtype))
    return None if settings.lora_r else Teacher(cast_weights(copy.deepcopy(model), dtype))


def _other_model(
    settings: ConversionSettings, start: Start, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    named = settings.teacher_model_name_or_path
    other, other_tokenizer = start.load_ar_source() if named is None else load_source(named)
    name = named or start.source
    refuse_other_vocabulary(other_tokenizer, tokenizer, name, settings.model_name_or_path)
    refuse_longer_rows(settings.max_length, other.config)
    shapes = [(config.num_hidden_layers, config.hidden_size) for config in (other.config, model.config)]
    if settings.align_weight and shapes[0] != shapes[1]:
        raise UserError(
            f"--teacher_model_name_or_path {name}: alignment compares states layer by layer, and this model has "
            f"{shapes[0][0]} layers of width {shapes[0][1]}, the student {shapes[1][0]} of {shapes[1][1]}; "
            "give --align_weight 0"
        )
    return other


def _finish(settings: ConversionSettings, run: _Run) -> PreTrainedModel:
    """Writes the final model. The checkpoints beside it keep the fp32 master weights for resuming."""
    trainer = run.trainer
    trainer.teacher = None
    student = trainer.trained_model()
    if settings.weights == "gated":
        return _finish_gated(run, student)
    if settings.lora_r:
        student = student.merge_and_unload()
    state_dict = fold_mask_row(student, trainer.whole_state_dict(student))
    settle_mask_row(student)
    output_dir = Path(trainer.args.output_dir)
    if trainer.args.should_save:
        with disk_errors(output_dir):
            save_converted(output_dir, student, run.tokenizer, run.facts, state_dict=state_dict, dtype=run.save_dtype)
    trainer.accelerator.wait_for_everyone()
    return student


def _finish_gated(run: _Run, student: nn.Module) -> PreTrainedModel:
    trainer, facts = run.trainer, run.facts
    assert run.base is not None
    state_dict = trainer.whole_state_dict(student)
    output_dir = Path(trainer.args.output_dir)
    if trainer.args.should_save:
        with disk_errors(output_dir):
            save_gated(output_dir, student, state_dict, facts, run.base)
    trainer.accelerator.wait_for_everyone()
    return stock_model(student)
