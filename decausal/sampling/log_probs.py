"""How probable a model found the tokens that it kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from decausal.diffusion.layout import Layout
from decausal.models.backbone import body_forward, head_of
from decausal.models.checkpoint import Converted
from decausal.objectives.head import Head, logits
from decausal.sampling.jobs import TokenLogProbs

LOWEST_LOG_PROB = -9999.0
"""In place of minus infinity, which JSON cannot write."""
TOKENS_PER_CHUNK = 256
"""Tokens of a given text that are scored together, so that its logits never exist all at once."""


@torch.no_grad()
def token_log_probs(
    states: Float[Tensor, "n D"], head: Head, tokens: Sequence[int], counts: Sequence[int]
) -> list[TokenLogProbs]:
    """Log-probabilities of tokens and of the likeliest ones in their places, before temperature and truncation.

    Args:
        states: The states that predict them.
        head: The model's head, the mask token banned.
        tokens: What was kept.
        counts: How many alternatives to tell of each.
    """
    if not tokens:
        return []
    all_log_probs = logits(states, head).log_softmax(-1).clamp(min=LOWEST_LOG_PROB)
    own = all_log_probs.gather(1, torch.tensor(tokens, device=states.device)[:, None]).squeeze(1).tolist()
    top = all_log_probs.topk(min(max(counts), all_log_probs.shape[1]))
    alternatives = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        (value, list(zip(ids[:count], values[:count], strict=True)))
        for value, (ids, values), count in zip(own, alternatives, counts, strict=True)
    ]


@torch.no_grad()
def given_log_probs(converted: Converted, ids: Sequence[int], num_top: int) -> list[TokenLogProbs | None]:
    """Log-probabilities of given tokens, each after those before it, under a causal model; None of the first.

    Args:
        converted: A model of layout "causal".
        ids: The given tokens.
        num_top: How many alternatives to tell of each.
    """
    model = converted.model
    head = head_of(model)._replace(banned=converted.facts.mask_token_id)
    row = torch.tensor([list(ids)], device=next(model.parameters()).device)
    states = body_forward(model, row, Layout("causal")).last_hidden_state[0, :-1]
    found: list[TokenLogProbs | None] = [None]
    for first in range(0, len(states), TOKENS_PER_CHUNK):
        here = states[first : first + TOKENS_PER_CHUNK]
        found += token_log_probs(here, head, ids[first + 1 : first + 1 + len(here)], [num_top] * len(here))
    return found
