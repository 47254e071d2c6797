"""Trains a small AR model from scratch, with the same trainer under a causal layout without masks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainingArguments

from decausal.data.documents import read_sources
from decausal.data.reading import Account
from decausal.data.rows import PackedRows
from decausal.data.sources import Tasks, find_sources
from decausal.data.stream import Collator, TrainingStream
from decausal.data.streamed_rows import streamed_sources
from decausal.data.tokenizer import character_tokenizer, train_tokenizer
from decausal.diffusion.layout import Layout
from decausal.evaluation.likelihood import evaluate_ar_nll
from decausal.evaluation.results import ArLikelihood
from decausal.evaluation.tasks import TaskScores, evaluate_tasks
from decausal.files import follow_umask
from decausal.models.casting import cast_weights
from decausal.models.compiled import compile_layers
from decausal.training.argument_values import PRETRAIN_DEFAULTS
from decausal.training.corpus_rows import corpus_of_run, corpus_rows, reading_ahead
from decausal.training.inputs import check_pretraining
from decausal.training.losses import Supervision
from decausal.training.memory import keep_freed_memory
from decausal.training.model_card import model_card
from decausal.training.muon import MuonWithAdamW
from decausal.training.resuming import (
    fingerprint,
    refuse_other_arguments,
    refuse_other_rows,
    refuse_other_settings,
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
from decausal.training.settings.pretraining import PretrainSettings
from decausal.training.trainer import ConversionTrainer

TOKENIZER_CHARACTERS = 100_000_000  # of streamed data, whose end may be far away


@dataclass(frozen=True)
class Pretrained:
    """The directory of the model, and its figures on held-out data if there are any."""

    output_dir: Path
    heldout: ArLikelihood | None
    tasks: TaskScores | None = None


def pretrain(settings: PretrainSettings, training: dict[str, Any]) -> Pretrained:
    """Trains tokenizer and model, resumably, and writes the final model in bfloat16 to `output_dir`.

    Args:
        settings: Shape and data.
        training: Fields of `transformers.TrainingArguments` that differ from `PRETRAIN_DEFAULTS`; needs `output_dir`.

    Returns:
        The output directory, which loads in plain `AutoModelForCausalLM` and holds a model card, and the figures.

    Raises:
        UserError: The shape is impossible, the data cannot be read, or the output directory is not free.
    """
    check_pretraining(settings, training)
    args = training_arguments(PRETRAIN_DEFAULTS | training)
    output_dir = Path(args.output_dir)
    resume = args.resume_from_checkpoint
    with claimed(output_dir, resume=wants_resume(resume), overwrite=settings.overwrite) as run_directory:
        checkpoint = checkpoint_to_resume(output_dir, resume)
        if checkpoint is not None:
            refuse_other_settings(checkpoint, asdict(settings))
            refuse_other_arguments(checkpoint, args)
            say_other_precision(checkpoint, args)
        tokenizer = _tokenizer(settings, checkpoint)
        stream = TrainingStream(*corpus_of_run(settings, args, tokenizer), seed=args.seed, shift=1, noising=None)
        heldout_rows = _heldout_rows(settings, tokenizer, args.seed)  # now, so that errors are reported before training
        model = _model(settings, tokenizer, seed=args.seed)
        trainer = _trainer(settings, args, model, tokenizer, stream)
        if checkpoint is not None:
            refuse_other_rows(checkpoint, trainer.run_record)
        run_directory.begin(asdict(settings) | training, overwrite=settings.overwrite and checkpoint is None)
        with reading_ahead(stream, lambda: trainer.state.global_step * rows_per_step(args)):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        model = cast_weights(trainer.trained_model(), torch.bfloat16)
        model.config.use_cache = True  # training turned it off
        heldout, tasks = _measure(settings, heldout_rows, model, tokenizer)
        if args.should_save:
            num_tokens = args.max_steps * rows_per_step(args) * settings.max_length
            card = model_card(settings, training, model.num_parameters(), num_tokens, args.max_steps, heldout, tasks)
            with disk_errors(output_dir):
                model.save_pretrained(output_dir)
                tokenizer.save_pretrained(output_dir)
                follow_umask(output_dir.glob("*.safetensors"))
                (output_dir / "README.md").write_text(card, encoding="utf-8")
        trainer.accelerator.wait_for_everyone()
    return Pretrained(output_dir, heldout, tasks)


def _heldout_rows(settings: PretrainSettings, tokenizer: PreTrainedTokenizerFast, seed: int) -> PackedRows | None:
    if settings.eval_data is None:
        return None
    return corpus_rows(settings, settings.eval_data, settings.eval_reading, tokenizer, seed)


def _measure(
    settings: PretrainSettings, rows: PackedRows | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> tuple[ArLikelihood | None, TaskScores | None]:
    """Measures the weights as saved, rounded to bfloat16, in float32. On tasks it measures right answers too."""
    if settings.eval_data is None or rows is None:
        return None, None
    measured = cast_weights(copy.deepcopy(model), torch.float32)
    problems = [
        example
        for source in find_sources(settings.eval_data)
        if isinstance(source, Tasks)
        for example in source.examples()
    ]
    return (
        evaluate_ar_nll(measured, rows, tokenizer),
        evaluate_tasks((measured, tokenizer), problems) if problems else None,
    )


def _tokenizer(settings: PretrainSettings, checkpoint: Path | None) -> PreTrainedTokenizerFast:
    if checkpoint is not None:
        return PreTrainedTokenizerFast.from_pretrained(checkpoint)
    if settings.tokenizer == "characters":
        return character_tokenizer(settings.context)
    return train_tokenizer(_texts(settings), settings.vocab_size, settings.context)


def _texts(settings: PretrainSettings) -> Iterator[str]:
    """Yields what the BPE tokenizer is trained on: all data, or the beginning of streamed ones."""
    reading, account = settings.reading, Account()
    find = streamed_sources if settings.streaming else find_sources
    num_characters = 0
    for record in read_sources(find(settings.data, reading.split, account), reading, account):
        text = record["text"] if "text" in record else record["prompt"] + record["completion"]
        yield text
        num_characters += len(text)
        if settings.streaming and num_characters >= TOKENIZER_CHARACTERS:
            return


def _model(settings: PretrainSettings, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_key_value_heads,
        head_dim=settings.hidden_size // settings.num_attention_heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = settings.attn_implementation
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def _trainer(
    settings: PretrainSettings,
    args: TrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    stream: TrainingStream,
) -> ConversionTrainer:
    if args.device.type == "cpu":
        keep_freed_memory()
    if settings.compile_layers:
        compile_layers(model)
    return ConversionTrainer(
        model,
        args,
        stream=stream,
        run_record=run_record(asdict(settings), args, fingerprint(stream)),
        collator=Collator(mask_token_id=tokenizer.mask_token_id, shift=1, predict_all=True),
        supervision=Supervision(Layout("causal"), tokenizer.mask_token_id),
        finish_checkpoint=tokenizer.save_pretrained,
        optimizers=(
            MuonWithAdamW(model, settings.muon_learning_rate, args.learning_rate, args.weight_decay),
            None,
        ),
    )
