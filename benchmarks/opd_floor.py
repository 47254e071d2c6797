"""The operations of an on-policy step that cannot be avoided, and those that were done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from floors import ModelShape
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from decausal.training.on_policy import RolloutPlan
from decausal.training.rollouts import Rollout


def count_operations(function: Callable[[], Any], *, with_attention: bool = True) -> int:
    """Returns the floating-point operations of matrix products, and of attention, while `function` runs.

    Attention under a dense mask counts every pair of the rows, hidden ones too; its backward pass twice the forward.
    """
    mapping = {
        torch.ops.aten.addmm_: _addmm,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        torch.ops.aten._scaled_dot_product_efficient_attention: _attention,
        torch.ops.aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
        torch.ops.aten._scaled_dot_product_flash_attention: _attention,
        torch.ops.aten._scaled_dot_product_flash_attention_backward: _attention_backward,
        torch.ops.aten._scaled_dot_product_cudnn_attention: _attention,
        torch.ops.aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function()
    counts = counter.get_flop_counts().get("Global", {})
    return sum(count for operator, count in counts.items() if with_attention or "attention" not in str(operator))


def _addmm(_sum: Any, left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _attention(query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    rows, heads, length, width = query
    return 4 * rows * heads * length * key[2] * width


def _attention_backward(_grad: Any, query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * _attention(query, key)


def training_floor(
    shape: ModelShape, rollouts: Sequence[Rollout], batch: Mapping[str, Tensor], plan: RolloutPlan, top_k: int | None
) -> dict[str, float]:
    """The teacher reads prompt and answer once; the student the clean tokens once and each state's blocks; heads run at
    targets: three products for the student, one for the teacher. Attention counts the pairs that are read.
    """
    num_targets = len(batch["target_ids"])
    head = 2 * shape.width * shape.vocab_size * num_targets
    teacher = student = 0.0
    for rollout in rollouts:
        size, length = plan.block_size, rollout.end
        first = rollout.prompt_length // size
        clean_pairs = sum((min(p // size * size + size, length)) for p in range(length))
        copied = range(first * size, min(-(-length // size) * size, len(rollout.ids)))
        copied_pairs = sum(p // size * size + size for p in copied)
        teacher += 2 * shape.body_weights * length + 4 * shape.attention_width * length * (length + 1) / 2
        tokens = length + plan.states * len(copied)
        pairs = clean_pairs + plan.states * copied_pairs
        student += 3 * (2 * shape.body_weights * tokens + 4 * shape.attention_width * pairs)
    # Over all tokens the teacher's logits are made beside the student's, for one chunk of rows at a time.
    return {
        "teacher": teacher + (head if top_k is not None else 0),
        "student": student + 3 * head + (0 if top_k else head),
    }


def decode_floor(shape: ModelShape, rollouts: Sequence[Rollout], block_size: int) -> float:
    """Every prompt is read once, each step reads its block, and each finished block but the last is read once more; the
    head runs at what is masked.
    """
    total = 0.0
    for rollout in rollouts:
        first = rollout.prompt_length // block_size * block_size
        tokens, pairs, scored = first, sum(p // block_size * block_size + block_size for p in range(first)), 0
        for start in range(first, len(rollout.ids), block_size):
            steps = rollout.step_of_token[start : start + block_size]
            num_steps = int(steps[steps >= 0].max()) + 1
            reads = num_steps + (start + block_size < len(rollout.ids))
            tokens += reads * block_size
            pairs += reads * block_size * (start + block_size)
            scored += sum(int((steps >= step).sum()) for step in range(num_steps))
        total += 2 * shape.body_weights * tokens + 4 * shape.attention_width * pairs
        total += 2 * shape.width * shape.vocab_size * scored
    return total
