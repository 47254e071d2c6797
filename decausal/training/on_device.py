"""Choices of a run that depend on its device: precision, attention, compiled layers."""

from __future__ import annotations

from itertools import islice

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from decausal.data.reading import say
from decausal.data.stream import TrainingStream
from decausal.devices import choices, repays_compilation
from decausal.diffusion.layout import Layout, is_packed
from decausal.errors import UserError
from decausal.models.backbone import stock_model
from decausal.models.flex import use_flex_attention
from decausal.models.row_attention import FLEX
from decausal.training.on_policy import OnPolicyStream
from decausal.training.run import rows_per_step
from decausal.training.settings import ConversionSettings
from decausal.training.teacher import CAUSAL, Teacher

NUM_ROWS_SEEN = 64
"""How many rows are inspected to decide whether a corpus is packed."""


def say_precision(args: TrainingArguments) -> None:
    """Logs the dtype in which a GPU trains."""
    if not choices(args.device).is_mixed:
        return
    if args.bf16:
        say("training computes in bfloat16, on weights and optimizer in float32; --bf16 false computes in float32")
    elif not args.fp16:
        say("training computes in float32, an order of magnitude slower here than --bf16 true")


def attend_by_flex(
    settings: ConversionSettings,
    model: PreTrainedModel,
    teacher: Teacher | None,
    stream: TrainingStream | OnPolicyStream,
    device: torch.device,
) -> None:
    """Makes models that read packed or doubled rows attend by FlexAttention, if that is faster and they support it.

    A choice in the settings or of the model's architecture is kept, but a teacher follows its student.
    """
    layout = Layout(settings.layout, settings.block_size, settings.causal_context)
    is_open = settings.attn_implementation is None and model.config._attn_implementation == "sdpa"
    if is_open and choices(device).has_flex and (layout.kind == "block" or reads_packed_rows(stream)):
        _try_flex(model, layout, device, "the model")
    if teacher is not None and model.config._attn_implementation == FLEX:
        of_teacher = stock_model(teacher.model)
        if of_teacher.config._attn_implementation == "sdpa":
            _try_flex(of_teacher, CAUSAL, device, "the teacher")


def _try_flex(model: PreTrainedModel, layout: Layout, device: torch.device, name: str) -> None:
    try:
        use_flex_attention(model, layout, device)
    except UserError as error:
        reason = str(error).removeprefix(f"--attn_implementation {FLEX}: ").removesuffix("; leave it out")
        say(f"{name} attends by dense masks, which takes more time and memory: {reason}")


def reads_packed_rows(stream: TrainingStream | OnPolicyStream) -> bool:
    """Returns whether some of the first rows hold several documents or padding."""
    if isinstance(stream, OnPolicyStream):
        return True
    rows = stream.sample
    some = islice(range(len(rows)), NUM_ROWS_SEEN)
    return any(is_packed(rows[index]["document_ids"][None]) for index in some)


def compiles(settings: ConversionSettings, model: nn.Module, args: TrainingArguments) -> bool:
    """Returns whether the decoder layers are compiled: as set, or if the run is long enough to repay it.

    Sharded and checkpointed layers are compiled only on request, since the gain is not known yet.
    """
    if settings.compile_layers is not None:
        return settings.compile_layers
    if args.gradient_checkpointing or args.fsdp or args.deepspeed:
        return False
    operations = step_operations(settings, model, args) * args.max_steps
    is_compiled = repays_compilation(args.device, operations)
    if is_compiled:
        say("decoder layers are compiled: the first step takes about a minute; --compile_layers false turns it off")
    return is_compiled


def step_operations(settings: ConversionSettings, model: nn.Module, args: TrainingArguments) -> float:
    """Returns the floating-point operations of matrix products in a step of one process, forward and backward.

    The teacher's are not counted."""
    body = stock_model(model).base_model
    num_weights = sum(weight.numel() for weight in body.parameters()) - body.get_input_embeddings().weight.numel()
    streams = settings.views if settings.layout != "block" else settings.views + 1
    return 6.0 * num_weights * rows_per_step(args) / args.world_size * settings.max_length * streams
