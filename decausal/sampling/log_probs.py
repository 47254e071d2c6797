"""How probable a model found the tokens that it kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from decausal.objectives.head import Head, logits
from decausal.sampling.jobs import TokenLogProbs

LOWEST_LOG_PROB = -9999.0
"""In place of minus infinity, which JSON cannot write."""


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
