"""Decides whether a masked model writes a given continuation in greedy decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from decausal.evaluation.continuations.nelbo import units_of
from decausal.evaluation.continuations.scored import Continuation, in_parts, longest_first, padded
from decausal.evaluation.passes import device_of, measuring, noised_states
from decausal.models.backbone import denoising_head
from decausal.models.checkpoint import Converted
from decausal.sampling.scoring import score_states


def written_greedily(
    converted: Converted, requests: Sequence[Continuation], *, batch_size: int
) -> Iterator[tuple[int, bool]]:
    """Yields (index, whether greedy decoding writes exactly this continuation) of each request, in any order.

    Decoding knows the continuation's length and keeps one token per pass: the likeliest token at the surest position,
    block by block under a block layout. As long as the kept tokens agree, the text so far is that of the continuation.
    So the continuation itself is masked, and a request ends at the first different token.

    Args:
        converted: Model, tokenizer and facts.
        requests: The continuations.
        batch_size: Requests in the model at once.
    """
    for batch in in_parts(longest_first(requests), batch_size):
        with measuring(converted.model):  # closed before a yield, so that the caller's code has gradients
            is_right = _decode(converted, [requests[index] for index in batch])
        yield from zip(batch, is_right, strict=True)


def _decode(converted: Converted, asked: Sequence[Continuation]) -> list[bool]:
    units = [units_of(request, converted.facts) for request in asked]
    is_open = [unit >= 0 for unit in units]
    is_right = [True] * len(asked)
    while running := [row for row, mask in enumerate(is_open) if is_right[row] and bool(mask.any())]:
        masks = [is_open[row] & (units[row] == units[row][is_open[row]].min()) for row in running]
        ends = [
            int((units[row] == units[row][mask].min()).nonzero().max()) + 1
            for row, mask in zip(running, masks, strict=True)
        ]
        rows = [asked[row].ids[:end] for row, end in zip(running, ends, strict=True)]
        surest = _surest(converted, rows, [mask[:end] for mask, end in zip(masks, ends, strict=True)])
        for row, (place, agrees) in zip(running, surest, strict=True):
            is_open[row][place] = False
            is_right[row] = agrees
    return is_right


def _surest(converted: Converted, rows: Sequence[Sequence[int]], masks: Sequence[Tensor]) -> list[tuple[int, bool]]:
    """Returns, for each row, the masked place where the model is surest, and whether the row's token is likeliest
    there."""
    model, _, facts = converted
    clean_ids, document_ids = padded(rows)
    is_masked = torch.zeros_like(clean_ids, dtype=torch.bool)
    for row, mask in enumerate(masks):
        is_masked[row, : len(mask)] = mask
    states = noised_states(model, facts, clean_ids, document_ids, is_masked[:, None])
    head = denoising_head(model, facts.mask_token_id)
    scores = score_states(states, head, clean_ids[is_masked].to(device_of(model)))
    sizes = [int(mask.sum()) for mask in masks]
    found = []
    for mask, log_probs, best in zip(masks, *(part.split(sizes) for part in scores), strict=True):
        which = int(best.argmax())
        found.append((_place(mask, which), bool(log_probs[which] >= best[which])))
    return found


def _place(mask: Bool[Tensor, " T"], which: int) -> int:
    places: Int[Tensor, " n"] = mask.nonzero()[:, 0]
    return int(places[which])
