"""Prepares what is trained, and on which losses: the model with its mask token, adapters and frozen parts."""

from __future__ import annotations

import warnings

from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from decausal.diffusion.layout import Layout
from decausal.errors import UserError
from decausal.models.adapt import adapt
from decausal.models.adapters import hushed
from decausal.models.backbone import decoder_layers
from decausal.models.draft_head import install_draft_head
from decausal.models.gated import gated_mask_token_id, initial_row, install_gate
from decausal.models.mask_row import freeze_embeddings
from decausal.training.losses import Supervision, Weighted
from decausal.training.schedule import WeightSchedule, steps
from decausal.training.settings import ConversionSettings
from decausal.training.settings.weights import NEEDS_PEFT
from decausal.training.terms import TERMS


def refuse_checkpointing(settings: ConversionSettings, args: TrainingArguments) -> None:
    """Raises UserError for gradient checkpointing where a pass reads keys that it would not keep."""
    if settings.noise == "all" and args.gradient_checkpointing:
        raise UserError(
            "--gradient_checkpointing is not for --noise all: masks read keys of clean tokens, which it does not keep; "
            "leave it out, and lower --per_device_train_batch_size if memory is short"
        )


def give_mask_token(
    settings: ConversionSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layout: Layout
) -> int:
    """Gives the model a mask token and returns its id; with gated weights neither model nor tokenizer gets any."""
    if settings.weights != "gated":
        return adapt(model, tokenizer, mask_token=settings.mask_token, layout=layout)
    model.config.is_causal = False
    return gated_mask_token_id(model)


def needs_teacher(settings: ConversionSettings, model: PreTrainedModel) -> bool:
    """Returns whether a loss needs an AR model other than the student's own clean half."""
    if settings.weights == "gated":
        return False
    num_layers = len(decoder_layers(model))
    used = (term for term in TERMS if getattr(settings, f"{term.setting}_weight"))
    return any(term.of(settings, num_layers).questions for term in used)


def student_of(
    settings: ConversionSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    mask_token_id: int,
    args: TrainingArguments,
    draft_tokens: Int[Tensor, " tokens"] | None = None,
) -> nn.Module:
    """Returns the model as it is trained: with adapters, a gate or frozen embeddings, or as it is.

    With `draft_tokens` it has a draft head that chooses from these.
    """
    set_seed(args.seed)  # adapters start from random numbers
    student = with_adapters(settings, model) if settings.lora_r else model
    if settings.weights == "gated":
        install_gate(student, mask_token_id, initial_row(model, tokenizer))
        if draft_tokens is not None:
            install_draft_head(student, draft_tokens)
        return student
    if settings.freeze_embeddings or settings.lora_r:
        freeze_embeddings(student, mask_token_id)
    return student


def with_adapters(settings: ConversionSettings, model: PreTrainedModel) -> nn.Module:
    """Returns the model with LoRA adapters.

    Raises:
        UserError: PEFT is missing, or the model has none of the named modules.
    """
    try:
        with hushed():  # it imports bitsandbytes if that is installed
            from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError(NEEDS_PEFT) from error
    modules = settings.lora_target_modules
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(modules) if isinstance(modules, tuple) else modules,
    )
    try:
        with hushed():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # PEFT corrects it for GPT-2 with a warning
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT reads it
            return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora_target_modules: {str(error).splitlines()[0]}") from error


def supervision_of(
    settings: ConversionSettings, layout: Layout, mask_token_id: int, num_layers: int, num_steps: int
) -> Supervision:
    """Returns how a run's losses are weighted, and how the student reads."""
    losses = (Weighted(term.of(settings, num_layers), _schedule(settings, term.setting, num_steps)) for term in TERMS)
    return Supervision(layout, mask_token_id, tuple(losses), settings.anneal_steps, settings.weights == "gated")


def _schedule(settings: ConversionSettings, loss: str, num_steps: int) -> WeightSchedule:
    """Returns the schedule of the settings `{loss}_weight`, `{loss}_schedule`, ..."""
    weight, shape, start, stop = (
        getattr(settings, f"{loss}_{name}") for name in ("weight", "schedule", "start_step", "stop_step")
    )
    return WeightSchedule(weight, shape, steps(stop, num_steps), num_steps, steps(start, num_steps))
