"""How probable a model finds the tokens of a text, each given others. Edits and lengths are chosen by this.

A masked model is trained at masked positions only, so its output for a visible token is not that token's probability.
Here tokens are masked before they are scored. The positions are dealt out to `groups` groups like cards, and each group
is masked in a copy of the row where all other tokens are visible. With one group all are masked at once. With as many
groups as positions it is the pseudo-log-likelihood, each token given all others.

Source: pseudo-log-likelihood, Salazar et al., Masked language model scoring (arXiv 1910.14659). Groups are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decausal.diffusion.layout import Layout
from decausal.diffusion.shift import predicting_index
from decausal.models.backbone import body_forward, denoising_head
from decausal.models.checkpoint import Converted
from decausal.objectives.head import Head, logits
from decausal.sampling.jobs import Job, TokenLogProbs

LOWEST_LOG_PROB = -9999.0
"""Replaces minus infinity, which JSON cannot write."""
TOKENS_PER_CHUNK = 256
"""Tokens of a given text that are scored together, so that its logits never all exist at once."""
ROWS_AT_ONCE = 16
STATES_PER_CHUNK = 2048


class TokenScores(NamedTuple):
    """Natural logarithms of probabilities, in the order of the given positions.

    Attributes:
        log_prob: Log-probability of the token at the position.
        best_log_prob: Log-probability of the model's own choice there.
    """

    log_prob: Float[Tensor, " n"]
    best_log_prob: Float[Tensor, " n"]


class _Copy(NamedTuple):
    """A row in which one group of positions is masked."""

    row: int
    positions: list[int]
    members: list[int]


def score_tokens(
    converted: Converted,
    rows: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    *,
    groups: int,
    batch_size: int = ROWS_AT_ONCE,
) -> list[TokenScores]:
    """Scores chosen tokens of each row, masking group by group.

    Args:
        converted: Model, tokenizer and facts, of layout bidirectional.
        rows: Token ids of each row.
        positions: The positions to score in each row; under shift 1 never the first.
        groups: The most copies of a row. The j-th position belongs to group j modulo `groups`.
        batch_size: Copies in the model at once; it does not change the scores.

    Returns:
        Scores of the positions of each row, on the CPU in fp32.
    """
    copies = [
        _Copy(row, list(places[group::groups]), list(range(len(places))[group::groups]))
        for row, places in enumerate(positions)
        for group in range(min(groups, len(places)))
    ]
    scores = [TokenScores(torch.zeros(len(places)), torch.zeros(len(places))) for places in positions]
    for start in range(0, len(copies), batch_size):
        batch = copies[start : start + batch_size]
        found = _score_copies(converted, [rows[copy.row] for copy in batch], [copy.positions for copy in batch])
        ends = torch.tensor([len(copy.members) for copy in batch]).cumsum(0).tolist()
        for copy, end in zip(batch, ends, strict=True):
            for whole, part in zip(scores[copy.row], found, strict=True):
                whole[copy.members] = part[end - len(copy.members) : end]
    return scores


@torch.no_grad()
def _score_copies(
    converted: Converted, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
) -> TokenScores:
    """Masks all `positions` of each row at once, and scores the tokens there."""
    model, facts = converted.model, converted.facts
    device = next(model.parameters()).device
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), facts.mask_token_id)
    document_ids = torch.full((len(rows), length), -1)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        document_ids[row, : len(tokens)] = 0
    index = torch.tensor([row * length + place for row, places in enumerate(positions) for place in places])
    targets = ids.flatten()[index]
    ids.view(-1)[index] = facts.mask_token_id
    is_whole = bool((document_ids == 0).all())
    body = body_forward(
        model, ids.to(device), facts.attention, document_ids=None if is_whole else document_ids.to(device)
    )
    states = body.last_hidden_state.flatten(0, 1)[predicting_index(index, facts.shift).to(device)]
    return score_states(states, denoising_head(model, facts.mask_token_id), targets.to(device))


def score_states(states: Float[Tensor, "n D"], head: Head, targets: Int[Tensor, " n"]) -> TokenScores:
    """Scores the tokens that states predict. Logits exist for `STATES_PER_CHUNK` states at a time."""
    chunks = []
    for some, tokens in zip(states.split(STATES_PER_CHUNK), targets.split(STATES_PER_CHUNK), strict=True):
        log_probs = logits(some, head).log_softmax(-1).float()
        chunks.append((log_probs.gather(1, tokens[:, None]).squeeze(1).cpu(), log_probs.amax(1).cpu()))
    return TokenScores(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


@torch.no_grad()
def token_log_probs(
    states: Float[Tensor, "n D"], head: Head, tokens: Sequence[int], counts: Sequence[int]
) -> list[TokenLogProbs]:
    """Returns log-probabilities of tokens and of the likeliest ones in their places, before temperature and truncation.

    Args:
        states: The states that predict them.
        head: The model's head, the mask token banned.
        tokens: The kept tokens.
        counts: How many alternatives to report for each.
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


def job_log_probs(
    jobs: Sequence[Job],
    tokens: Sequence[Sequence[int]],
    states_of: Callable[[int], Float[Tensor, "n D"]],
    head: Head,
) -> list[list[TokenLogProbs]]:
    """Returns the log-probabilities of newly kept tokens, for each row whose job asks; empty for others.

    Args:
        jobs: The jobs of the rows.
        tokens: The tokens kept in each row.
        states_of: Returns the states that predict a row's tokens, given its index in `jobs`.
        head: As in `token_log_probs`.
    """
    asking = [place for place, job in enumerate(jobs) if job.wants_log_probs and tokens[place]]
    found: list[list[TokenLogProbs]] = [[] for _ in jobs]
    if not asking:
        return found
    states = torch.cat([states_of(place) for place in asking])
    counts = [jobs[place].num_top_log_probs or 0 for place in asking for _ in tokens[place]]
    each = iter(token_log_probs(states, head, [token for place in asking for token in tokens[place]], counts))
    for place in asking:
        found[place] = [next(each) for _ in tokens[place]]
    return found


@torch.no_grad()
def given_log_probs(converted: Converted, ids: Sequence[int], num_top: int) -> list[TokenLogProbs | None]:
    """Returns the log-probabilities of given tokens, each after those before it, under a causal model; None of the
    first.

    Args:
        converted: A model of layout "causal".
        ids: The given tokens.
        num_top: How many alternatives to report for each.
    """
    model = converted.model
    head = denoising_head(model, converted.facts.mask_token_id)
    row = torch.tensor([list(ids)], device=next(model.parameters()).device)
    states = body_forward(model, row, Layout("causal")).last_hidden_state[0, :-1]
    found: list[TokenLogProbs | None] = [None]
    for first in range(0, len(states), TOKENS_PER_CHUNK):
        here = states[first : first + TOKENS_PER_CHUNK]
        found += token_log_probs(here, head, ids[first + 1 : first + 1 + len(here)], [num_top] * len(here))
    return found
