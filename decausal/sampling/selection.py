"""Which of the scored positions are kept in a step: arithmetic on whole batches, with settings per row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decausal.objectives.head import Head, logits
from decausal.sampling.row_settings import RowSettings, TokenSettings
from decausal.sampling.settings.schedules import SCHEDULES

LOOP_SHARE, LOOP_START, LOOP_STOP = 0.9, 0.45, 0.95
LOGITS_PER_CHUNK = 2**25
"""The most logits at once: 128 MiB in fp32, and a few temporaries of that size."""


def propose(
    states: Float[Tensor, "n D"],
    head: Head,
    settings: TokenSettings,
    numbers: Float[Tensor, " n"] | None,
    kept: tuple[Int[Tensor, " n"], Bool[Tensor, " n"]] | None = None,
    is_scored: bool = True,
    unguided: Float[Tensor, "n D"] | None = None,
    only: tuple[Int[Tensor, " n"], Bool[Tensor, "S V"]] | None = None,
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"] | None]:
    """Returns a token for each position and its score, from the state that predicts it. Logits exist chunk by chunk.

    Args:
        states: The predicting states.
        head: The model's head, with the mask token banned.
        settings: One per position (`RowSettings.at`).
        numbers: Uniform in (0, 1), for positions that are not greedy.
        kept: (tokens, is_kept). A kept token is scored instead of a new one.
        is_scored: False if all are kept anyway. Then there are no scores.
        unguided: The states from rows without the given text, if some position has `guidance`.
        only: (index, is_allowed): the row of `is_allowed` for each position; -1 if any token is allowed.
    """
    chunk_size = max(1, LOGITS_PER_CHUNK // len(head.weight))
    if len(states) <= chunk_size:
        return _proposed(states, head, settings, numbers, kept, is_scored, unguided, only)
    chunks = []
    for here in torch.arange(len(states), device=states.device).split(chunk_size):
        own_numbers = None if numbers is None else numbers[here]
        own_kept = None if kept is None else (kept[0][here], kept[1][here])
        own_unguided = None if unguided is None else unguided[here]
        own_only = None if only is None else (only[0][here], only[1])
        own = (own_numbers, own_kept, is_scored, own_unguided, own_only)
        chunks.append(_proposed(states[here], head, settings.at(here), *own))
    tokens, scores = zip(*chunks, strict=True)
    return torch.cat(tokens), torch.cat(scores) if is_scored else None


def _proposed(
    states: Float[Tensor, "n D"],
    head: Head,
    settings: TokenSettings,
    numbers: Float[Tensor, " n"] | None,
    kept: tuple[Int[Tensor, " n"], Bool[Tensor, " n"]] | None,
    is_scored: bool,
    unguided: Float[Tensor, "n D"] | None,
    only: tuple[Int[Tensor, " n"], Bool[Tensor, "S V"]] | None,
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"] | None]:
    values = logits(states, head)
    if unguided is not None:
        values = guided(values, logits(unguided, head), settings.guidance)
    if only is not None:
        index, is_allowed = only
        bound = (index >= 0).nonzero().squeeze(1)
        values[bound] = values[bound].masked_fill(~is_allowed[index[bound]], -torch.inf)
    tokens = settings.chosen(values, numbers)
    if kept is not None:
        tokens = torch.where(kept[1], kept[0], tokens)
    return tokens, settings.scored(values, tokens) if is_scored else None


def guided(
    values: Float[Tensor, "n V"], without: Float[Tensor, "n V"], guidance: Float[Tensor, " n"]
) -> Float[Tensor, "n V"]:
    """Moves logits away from those of a row without the given text: without + (1 + w) (values - without).

    With w = 0 they stay the same. A banned token stays banned.
    """
    weight = guidance[:, None]
    moved = without + (1 + weight) * (values - without)
    return torch.where((weight == 0) | values.isneginf(), values, moved)


def num_to_keep(
    scores: Float[Tensor, "A T"],
    is_open: Bool[Tensor, "A T"],
    is_masked: Bool[Tensor, "A T"],
    settings: RowSettings,
    step: int | Int[Tensor, " A"],
) -> Int[Tensor, " A"]:
    """Returns how many of the scored positions of each row stay or become tokens in this step.

    Static: as many as `num_due`.
    Threshold: those at or above it, and at least one more than before.
    Entropy bound: scores are minus entropies. The surest positions whose entropies, without the last one, sum to at
    most the bound. With remasking "p2" kept positions are scored too and compete, so the count includes those kept
    before.

    Args:
        scores: -inf where a position is not scored.
        is_open: Positions that were not given.
        is_masked: Of these, the ones that are not kept.
        settings: One per row.
        step: From 0; one for all rows, or one per row.
    """
    num_open = is_open.sum(1)
    num_kept = num_open - is_masked.sum(1)
    counted_before = num_kept
    if "p2" in settings.remasks:
        counted_before = num_kept.masked_fill(settings.has_remask("p2"), 0)
    state = _State(scores, num_open, num_kept, counted_before, settings, step)
    count = None
    for schedule in settings.schedules:
        own = _COUNTS[schedule](state)
        count = own if count is None else torch.where(settings.schedule == SCHEDULES.index(schedule), own, count)
    return count


class _State(NamedTuple):
    scores: Float[Tensor, "A T"]
    num_open: Int[Tensor, " A"]
    num_kept: Int[Tensor, " A"]
    counted_before: Int[Tensor, " A"]
    settings: RowSettings
    step: int | Int[Tensor, " A"]


def num_due(num_open: Int[Tensor, " A"], settings: RowSettings, step: int | Int[Tensor, " A"]) -> Int[Tensor, " A"]:
    """Returns how many of N open positions are kept in all after step k (from 0) of the static schedule: ceil((k + 1)
    N / S).

    S is `num_steps`, and at most N unless tokens are opened at random, when every step has something to do.
    "remdm_loop" reaches `LOOP_SHARE` of N by `LOOP_START` of the steps and stays there until `LOOP_STOP`, with at least
    one position masked.
    """
    if not any(kind in settings.remasks for kind in ("remdm", "remdm_loop")):
        num_steps = num_open.minimum(settings.num_steps).clamp(min=1)
        return (((step + 1) * num_open + num_steps - 1) // num_steps).minimum(num_open)
    num_steps = torch.where(
        settings.has_remask("remdm", "remdm_loop"), settings.num_steps, num_open.minimum(settings.num_steps)
    ).clamp(min=1)
    due = ((step + 1) * num_open + num_steps - 1) // num_steps
    if "remdm_loop" in settings.remasks:
        share = (step + 1) / num_steps
        before = LOOP_SHARE * share / LOOP_START
        after = 1 - (1 - LOOP_SHARE) * (1 - share) / (1 - LOOP_STOP)
        looped = torch.maximum(before.clamp(max=LOOP_SHARE), after)
        # Slightly less, so that rounding never turns an integer into the next one.
        looped_due = (looped * num_open - 1e-4).ceil().long()
        looped_due = torch.where(share > LOOP_STOP, looped_due, looped_due.minimum(num_open - 1)).clamp(min=1)
        due = torch.where(settings.has_remask("remdm_loop"), looped_due, due)
    return due.minimum(num_open)


def _static(now: _State) -> Int[Tensor, " A"]:
    return num_due(now.num_open, now.settings, now.step) - now.counted_before


def _above_threshold(now: _State) -> Int[Tensor, " A"]:
    num_sure = (now.scores >= now.settings.threshold[:, None]).sum(1)
    return torch.maximum(num_sure, now.num_kept + 1 - now.counted_before)


def _within_entropy(now: _State) -> Int[Tensor, " A"]:
    entropy = -now.scores.sort(dim=1, descending=True).values
    # Summed up to the one before. A sum minus its last term may be off by an ulp, which matters for a bound of 0.
    before = entropy.cumsum(1).roll(1, dims=1)
    is_within = (before <= now.settings.entropy_bound[:, None]) & entropy.isfinite()
    is_within[:, 0].fill_(True)
    return is_within.sum(1)


_COUNTS = {"num_steps": _static, "threshold": _above_threshold, "entropy_bound": _within_entropy}


def best(scores: Float[Tensor, "A T"], count: Int[Tensor, " A"]) -> Bool[Tensor, "A T"]:
    """Marks the `count` highest scores of each row. Of equal scores the leftmost comes first."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return rank < count[:, None]
