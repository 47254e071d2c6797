"""Memory and operations of a training step, counted on tensors without numbers."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from decausal.data.reading import say
from decausal.data.stream import Batch
from decausal.devices import meta_as
from decausal.diffusion.layout import future_order
from decausal.models.backbone import stock_model
from decausal.models.block_cache import BlockCache, cached_forward, decoding
from decausal.models.row_attention import FLEX
from decausal.training.losses import student_reading, sums_of_reading, weighed
from decausal.training.planning.kernels import GpuAttention, MixedPrecision, flex_attention_counted, pairs_of
from decausal.training.planning.step import META, PlannedStep
from decausal.training.planning.tally import Counting, Tally
from decausal.training.questions import Vocabulary, ask
from decausal.training.terms import Term

ADAM_PASSES = 7
"""How often an update reads or writes four bytes of a trained weight: the weight, its gradient and two moments are
read, and all but the gradient are written."""


@dataclass(frozen=True)
class Footprint:
    """What a step needs, in bytes unless stated otherwise.

    Attributes:
        weights: The student's weights, trained and frozen.
        optimizer: The optimizer's state.
        gradients: Gradients of all trained weights.
        teacher: Weights of a second model.
        answers: What losses keep from the teacher's pass.
        activations: What the student's forward pass keeps for the backward pass.
        copies: Weights in the type of autocast.
        working: What the losses or the backward pass add at the peak; gradients are part of it, unless an earlier
            micro-batch left them.
        update: What the optimizer adds while it works.
        rollouts: Keys and values of rows that the run writes itself, between steps.
        num_tokens: Tokens that the student reads.
        tally: Operations, kernels and bytes of a micro-batch, the mean over the run.
    """

    weights: int
    optimizer: int
    gradients: int
    teacher: int
    answers: int
    activations: int
    copies: int
    working: int
    update: int
    rollouts: int
    num_tokens: int
    are_gradients_kept: bool
    tally: Tally

    @property
    def parts(self) -> dict[str, int]:
        """What is held at the peak, by name. The peak is in a step, in an update, or while rows are written."""
        fixed = {"weights": self.weights, "optimizer": self.optimizer, "teacher's weights": self.teacher}
        step = {
            "gradients of earlier micro-batches": self.gradients if self.are_gradients_kept else 0,
            "activations": self.activations,
            "weights in autocast's type": self.copies,
            "teacher's answers": self.answers,
            "losses and backward pass": self.working,
        }
        update = {"gradients": self.gradients, "update of the weights": self.update}
        rollouts = {"rollouts' keys and values": self.rollouts, "weights in autocast's type": self.copies}
        return fixed | max(step, update, rollouts, key=lambda parts: sum(parts.values()))

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self.parts.values())


def footprint(step: PlannedStep) -> Footprint:
    """Returns what a step on `meta` would need. If losses change during the run, the largest need counts."""
    trained = [weight for weight in step.student.parameters() if weight.requires_grad]
    gradients = sum(weight.nbytes for weight in trained)
    optimizer, update = optimizer_bytes(step.args, trained)
    are_gradients_kept = step.args.gradient_accumulation_steps > 1
    counted = [(_Count(step, weights, are_gradients_kept), share) for weights, share in step.stages()]
    most = max((count for count, _ in counted), key=lambda count: count.peak)
    return Footprint(
        weights=_num_bytes(step.student),
        optimizer=optimizer,
        gradients=gradients,
        teacher=0 if step.teacher is None or step.teacher.model is step.student else _num_bytes(step.teacher.model),
        answers=most.answers,
        activations=most.activations,
        copies=most.copies,
        working=most.peak - most.answers - most.activations - most.copies,
        update=update,
        rollouts=_cache_bytes(step),
        num_tokens=step.num_tokens,
        are_gradients_kept=are_gradients_kept,
        tally=_mean((count.tally, share) for count, share in counted),
    )


class _Count:
    """The counts of one micro-batch with some losses.

    Attributes:
        tally: What a device would do.
        answers, activations, copies: See `Footprint`.
        peak: The most that was held at a time.
    """

    def __init__(self, step: PlannedStep, weights: dict[Term, float], are_gradients_kept: bool) -> None:
        batch = _on_meta(step)
        for weight in step.student.parameters():
            weight.grad = torch.empty_like(weight) if are_gradients_kept and weight.requires_grad else None
        counting = Counting()
        mixed = None if step.mixed_dtype is None else MixedPrecision(step.mixed_dtype)
        with ExitStack() as stack:
            stack.enter_context(meta_as(step.device, step.mixed_dtype))
            stack.enter_context(_attention_of(step, counting))
            if mixed is not None:
                stack.enter_context(mixed)
            stack.enter_context(counting)
            self._run(step, weights, batch, counting, mixed)
        self.tally = counting.tally
        self.peak = counting.tally.peak_bytes

    def _run(
        self,
        step: PlannedStep,
        weights: dict[Term, float],
        batch: Batch,
        counting: Counting,
        mixed: MixedPrecision | None,
    ) -> None:
        model, supervision, terms = stock_model(step.student), step.supervision, list(weights)
        vocabulary = Vocabulary(len(model.get_output_embeddings().weight), supervision.mask_token_id)
        questions = [] if supervision.is_gated else [question for term in terms for question in term.questions]
        answers = ask(step.teacher, questions, batch, vocabulary)
        self.answers = counting.live_bytes
        reading = student_reading(model, batch, supervision, terms)
        self.copies = 0 if mixed is None else mixed.num_bytes
        self.activations = counting.live_bytes - self.answers - self.copies
        sums = sums_of_reading(model, reading, supervision, terms, answers)
        _backward(weighed(sums, weights))


def _backward(loss: Tensor) -> None:
    """Does what `loss.backward()` does, under the modes that are on.

    PyTorch's own call leaves them, and layers under gradient checkpointing would be computed again without.
    """
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _attention_of(step: PlannedStep, counting: Counting) -> ExitStack:
    """Returns a context in which attention runs by a GPU's kernels, whose memory is that of a CPU's as well."""
    stack = ExitStack()
    if stock_model(step.student).config._attn_implementation == FLEX:
        stack.enter_context(flex_attention_counted(counting, pairs_of(step.attended(), in_blocks=True)))
    stack.enter_context(GpuAttention())
    return stack


def _on_meta(step: PlannedStep) -> Batch:
    batch = send_to_device(step.batch, META)
    if step.supervision.anneal_steps:
        batch |= {"future_order": future_order(batch["clean_ids"].shape[1], 0, META), "future_fraction": 0.5}
    return batch


def _cache_bytes(step: PlannedStep) -> int:
    """Returns the bytes of the keys and values of rollouts, computed from a pass over one token."""
    if not step.rollout_slots:
        return 0
    model, token = stock_model(step.student), torch.zeros(1, 1, dtype=torch.long, device=META)
    cache = BlockCache(model.base_model.config, num_rows=1, max_length=1)
    with ExitStack() as stack:
        stack.enter_context(meta_as(step.device, step.mixed_dtype))
        if step.mixed_dtype is not None:
            stack.enter_context(MixedPrecision(step.mixed_dtype))
        stack.enter_context(decoding(model))
        cached_forward(model, token, token, token, 1, cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return held // (cache.max_length + 1) * step.rollout_slots


def _num_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _mean(tallies: Iterable[tuple[Tally, float]]) -> Tally:
    """Returns the mean of tallies, weighted by their share of the run."""
    mean = Tally()
    for tally, share in tallies:
        for name in ("matrix_operations", "attention_operations", "num_bytes", "matrix_bytes", "attention_bytes"):
            setattr(mean, name, getattr(mean, name) + share * getattr(tally, name))
        mean.kernels.update({name: round(share * count) for name, count in tally.kernels.items()})
        mean.peak_bytes = max(mean.peak_bytes, tally.peak_bytes)
    return mean


def optimizer_bytes(args: TrainingArguments, trained: list[nn.Parameter]) -> tuple[int, int]:
    """Returns the bytes of an optimizer's state, and the most that an update needs in addition, by running its code.

    An optimizer that cannot run without numbers is counted as AdamW, and a line says so.
    """
    weights = [nn.Parameter(torch.empty_like(weight, device=META)) for weight in trained]
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    try:
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        is_fused = kwargs.pop("fused", False)  # only for tensors with numbers; it needs no more memory
        optimizer = kind(weights, **kwargs)
        with Counting() as counting:
            optimizer.step()
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        say(f"the state of --optim {args.optim.value} is counted as AdamW's: {str(error).partition(chr(10))[0]}")
        return 2 * sum(weight.nbytes for weight in weights), 0
    state = [value for values in optimizer.state.values() for value in values.values()]
    num_bytes = sum(value.nbytes for value in state if isinstance(value, torch.Tensor) and value.device == META)
    return num_bytes, 0 if is_fused else max(0, counting.tally.peak_bytes - num_bytes)
