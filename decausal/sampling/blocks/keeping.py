"""What a block engine keeps in one step, decided on the device."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decausal.objectives.head import Head
from decausal.sampling.blocks.rows import BlockRows
from decausal.sampling.drawing import uniform_numbers
from decausal.sampling.row_settings import RowSettings
from decausal.sampling.selection import best, num_to_keep, propose


def keep(
    rows: BlockRows,
    num_rows: int,
    num_eligible: int | None,
    states: Float[Tensor, "b K D"],
    head: Head,
    settings: RowSettings,
) -> Int[Tensor, "b outcome"]:
    """Takes one step: proposes a token for each position, keeps the best, and returns what the host has to know.

    Args:
        rows: Written in place.
        num_rows: Rows in use.
        num_eligible: Masked positions in them that may be kept, as the host knows from the step before. None: every
            position is scored, whether it may be kept or not, so that no shape depends on this number.
        states: The state that predicts each position of the block.
        head: The model's head, with the mask token banned.
        settings: One per row.

    Returns:
        Per row, the K ids of its block, the K steps in which they were kept, how many positions are still eligible,
        and whether any of those is wanted (0: the block is done).
    """
    if rows.block_size == 1:
        return _keep_single(rows, num_rows, states, head, settings)
    here = slice(0, num_rows)
    block_ids, is_masked, is_eligible = rows.block_ids[here], rows.is_masked[here], rows.is_eligible[here]
    kept_in, step = rows.kept_in[here], rows.step[here]
    tokens, scores = _proposed(rows, num_rows, num_eligible, states, head, settings)
    is_kept = best(scores, num_to_keep(scores, rows.is_open[here], is_masked, settings, step)) & is_eligible
    block_ids.copy_(torch.where(is_kept, tokens, block_ids))
    kept_in.copy_(torch.where(is_kept, step[:, None], kept_in))
    is_masked &= ~is_kept
    is_eligible.copy_(is_masked)
    if rows.ends.shape[1]:
        is_end = (block_ids[..., None] == rows.ends[here, None]).any(-1) & rows.is_open[here] & ~is_masked
        is_eligible &= is_end.cumsum(1) == 0
    is_wanted = is_eligible & (rows.positions(here) < rows.limit[here, None])
    step += 1
    outcome = [block_ids, kept_in, is_eligible.sum(1, keepdim=True), is_wanted.any(1, keepdim=True)]
    return torch.cat(outcome, dim=1)


def _keep_single(
    rows: BlockRows, num_rows: int, states: Float[Tensor, "b 1 D"], head: Head, settings: RowSettings
) -> Int[Tensor, "b outcome"]:
    """Does what `keep` does where a block is one token: each is kept, so no score is needed."""
    here = slice(0, num_rows)
    numbers = None
    if not settings.is_greedy:
        numbers = uniform_numbers(rows.seed[here], 0, rows.start[here])
    tokens, _ = propose(states[:, 0], head, settings, numbers, is_scored=False)
    rows.block_ids[here] = tokens[:, None]
    return torch.nn.functional.pad(tokens[:, None], (0, 3))


def _proposed(
    rows: BlockRows,
    num_rows: int,
    num_eligible: int | None,
    states: Float[Tensor, "b K D"],
    head: Head,
    settings: RowSettings,
) -> tuple[Int[Tensor, "b K"], Float[Tensor, "b K"]]:
    """Returns a token and its score for each position; the score is -inf where nothing may be kept."""
    size, shape = rows.block_size, (num_rows, rows.block_size)
    flat = states.flatten(0, 1)
    is_everywhere = num_eligible in (None, len(flat))
    if is_everywhere:
        index = rows.places[: len(flat)]
    else:
        index = torch.nonzero_static(rows.is_eligible[:num_rows].view(-1), size=num_eligible).squeeze(1)
        flat = flat[index]
    row = index // size
    numbers = None
    if not settings.is_greedy:
        numbers = uniform_numbers(rows.seed[row], rows.step[row], rows.start[row] + index % size)
    tokens, scores = propose(flat, head, settings.at(row), numbers)
    if num_eligible is None:
        scores = scores.masked_fill(~rows.is_eligible[:num_rows].view(-1), -torch.inf)
    if is_everywhere:
        return tokens.view(shape), scores.view(shape)
    all_tokens = tokens.new_zeros(num_rows * size).index_copy_(0, index, tokens)
    all_scores = scores.new_full((num_rows * size,), -torch.inf).index_copy_(0, index, scores)
    return all_tokens.view(shape), all_scores.view(shape)
