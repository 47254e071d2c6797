"""Scores how sure the model is of a token. Positions are ordered by this number and compared with a threshold."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decausal.sampling.settings.schedules import CONFIDENCES


def confidence(logits: Float[Tensor, "n V"], token: Int[Tensor, " n"], kind: str) -> Float[Tensor, " n"]:
    """Scores tokens under the model's own distribution, softmax(logits), whatever temperature they were drawn at.

    Each kind scores the given token, which may be greedy, sampled, or kept earlier. So these can be compared:

    - ``"probability"``: p(token).
    - ``"margin"``: p(token) minus the largest probability of any other token: top-1 minus top-2 for the most probable
      token, negative for every other.
    - ``"entropy"``: exp(-H), H in nats, but at most p(token). For the most probable token this is exp(-H), which never
      exceeds its probability. So an unlikely draw from a sharp distribution does not count as sure.

    All lie in (-1, 1], and 1 is certainty, so the three share one scale of thresholds.

    Args:
        logits: Unscaled log-probabilities. Banned tokens hold -inf.
        token: The tokens to score.
        kind: One of `CONFIDENCES`.

    Source: probability and margin as in Kim et al. 2025 (arXiv 2502.06768), entropy as in Dream (arXiv 2508.15487). The
    dependence on the token and the exponential are ours.
    """
    log_total = logits.logsumexp(-1)
    own = (logits.gather(1, token[:, None]).squeeze(1) - log_total).exp()
    if kind == "probability":
        return own
    if kind == "margin":
        others = logits.scatter(1, token[:, None], -torch.inf).amax(-1)
        return own - (others - log_total).exp()
    if kind == "entropy":
        return torch.minimum((-entropies(logits)).exp(), own)
    raise ValueError(f"confidence is one of {CONFIDENCES}, not {kind!r}")


def entropies(logits: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """Returns the entropy of softmax(logits) in nats."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)
