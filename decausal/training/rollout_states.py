"""The states of a rollout to train on: blocks at some step of their denoising, and rows that hold several rollouts."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decausal.training.rollouts import NEVER, Rollout

StateChoice = Literal["block", "sequence"]

# Row length at which dense attention costs as much as all matrices, in widths: 6 for a usual transformer.
_ATTENTION_LENGTH = 4096


def states_of(rollout: Rollout, block_size: int, relative_step: Float[Tensor, "K M"]) -> Bool[Tensor, "K T"]:
    """Returns states that the rollout visited, as the masks of K views: what was masked in each block before its r-th
    step.

    If tokens of the answer were unmasked in n steps of a block, then r = floor(relative_step * n). So every block of
    every state has a token to predict.

    Args:
        rollout: The rollout.
        block_size: Tokens per block.
        relative_step: A number in [0, 1) for each view and each block of the row.

    Source: OPDLM (arXiv 2606.06712, algorithm 1).
    """
    length = len(rollout.ids)
    num_blocks = -(-length // block_size)
    steps = _in_blocks(rollout.step_of_token, num_blocks, block_size, -1)
    answer_steps = _in_blocks(
        torch.where(rollout.is_answer, rollout.step_of_token, NEVER), num_blocks, block_size, NEVER
    )
    in_order = answer_steps.sort(dim=1).values
    is_distinct = in_order < NEVER
    is_distinct[:, 1:] &= in_order[:, 1:] > in_order[:, :-1]
    count = is_distinct.sum(dim=1)
    chosen = (relative_step[:, :num_blocks] * count).long().minimum((count - 1).clamp(min=0))
    is_chosen = is_distinct & (is_distinct.cumsum(dim=1) == chosen[..., None] + 1)
    first_step = torch.where(is_chosen, in_order, NEVER).amin(dim=2)
    is_masked = (steps >= first_step[..., None]) & (count > 0)[:, None]
    return is_masked.flatten(1)[:, :length]


def relative_steps(
    num_blocks: int, num_states: int, choice: StateChoice, *, position: int, seed: int
) -> Float[Tensor, "K M"]:
    """Draws each block's progress in each of K states, uniform in [0, 1), as a function of (seed, position).

    One draw spreads several states evenly over a block's steps.

    Args:
        num_blocks: Blocks of the row.
        num_states: Number of states, K.
        choice: "block" draws for each block, "sequence" once for all.
        position: Training row, counted from the start of the run.
        seed: The run's seed.
    """
    generator = np.random.default_rng([seed % 2**64, position, 0x57A7E])
    drawn = torch.from_numpy(generator.random((1, num_blocks if choice == "block" else 1)))
    spread = torch.arange(num_states)[:, None] / num_states
    return ((drawn + spread) % 1.0).expand(num_states, num_blocks)


def _in_blocks(values: Int[Tensor, " T"], num_blocks: int, block_size: int, fill: int) -> Int[Tensor, "M K"]:
    padded = values.new_full((num_blocks * block_size,), fill)
    padded[: len(values)] = values
    return padded.reshape(num_blocks, block_size)


def rows_of(rollouts: Sequence[Rollout], is_masked: Sequence[Bool[Tensor, "K _"]]) -> list[dict[str, Tensor]]:
    """Packs rollouts and their states into rows, in the form of a `TrainingStream`'s items.

    Rollouts and their noised copies are spread over rows of nearly equal length, so that there is little padding.
    """
    views = len(is_masked[0])
    sizes = [(views + 1) * len(rollout.ids) - views * rollout.prompt_length for rollout in rollouts]
    packed = _packed(sizes)
    length = max(sum(len(rollouts[index].ids) for index in row) for row in packed)
    items = []
    for row in packed:
        item = {
            "clean_ids": torch.zeros(length, dtype=torch.int64),
            "document_ids": torch.full((length,), -1),
            "is_predictable": torch.zeros(length, dtype=torch.bool),
            "is_masked": torch.zeros(views, length, dtype=torch.bool),
            "level": torch.ones(views, length),
        }
        start = 0
        for number, index in enumerate(row):
            rollout = rollouts[index]
            place = slice(start, start + len(rollout.ids))
            item["clean_ids"][place] = rollout.ids
            item["document_ids"][place] = number
            item["is_predictable"][place] = rollout.is_answer
            item["is_masked"][:, place] = is_masked[index]
            start = place.stop
        items.append(item)
    return items


def _packed(sizes: Sequence[int]) -> list[list[int]]:
    """Returns the content of each row, for the number of rows with the least cost of padding and attention."""

    def cost(rows: list[list[int]]) -> float:
        length = max(sum(sizes[index] for index in row) for row in rows)
        return len(rows) * length * (1 + length / _ATTENTION_LENGTH)

    return min((_balanced(sizes, num_rows) for num_rows in range(1, len(sizes) + 1)), key=cost)


def _balanced(sizes: Sequence[int], num_rows: int) -> list[list[int]]:
    """Assigns the largest first, each to the row that is the shortest so far."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    lengths = [(0, row) for row in range(num_rows)]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        length, row = heapq.heappop(lengths)
        rows[row].append(index)
        heapq.heappush(lengths, (length + sizes[index], row))
    return rows
