"""Exact likelihood of continuations under a model that reads from left to right. Each context is read once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decausal.diffusion.layout import Layout
from decausal.evaluation.continuations.scored import Continuation, Scored, in_parts
from decausal.evaluation.passes import device_of, in_batches, measuring
from decausal.models.backbone import body_forward, denoising_head
from decausal.models.checkpoint import Converted
from decausal.sampling.scoring import TokenScores, score_states

CAUSAL = Layout("causal")


class Tree:
    """A context and its continuations as branches, in one row.

    Each continuation reads the context and itself. No token reads its last one, so that has no place.

    Attributes:
        members: Indices of the continuations among the requests.
        ids, positions, streams: Ids, positions and streams of the row's tokens. Stream 0 is the context, j the j-th
            continuation.
        places: Places of the states that predict the continuations' tokens.
        targets: The continuations' tokens.
        lengths: Number of tokens of each continuation.
    """

    def __init__(self, context: Sequence[int], members: Sequence[int], continuations: Sequence[Sequence[int]]) -> None:
        self.members = members
        self.ids, self.positions = list(context), list(range(len(context)))
        self.streams = [0] * len(context)
        self.places: list[int] = []
        self.targets: list[int] = []
        self.lengths = [len(tokens) for tokens in continuations]
        for stream, tokens in enumerate(continuations, start=1):
            self.places += [len(context) - 1, *range(len(self.ids), len(self.ids) + len(tokens) - 1)]
            self.targets += tokens
            self.ids += tokens[:-1]
            self.positions += range(len(context), len(context) + len(tokens) - 1)
            self.streams += [stream] * (len(tokens) - 1)

    @property
    def is_a_line(self) -> bool:
        """Whether all positions differ, so that plain causal attention is correct."""
        return self.positions == list(range(len(self.ids)))


def score_causally(
    converted: Converted, requests: Sequence[Continuation], *, batch_size: int
) -> Iterator[tuple[int, Scored, bool]]:
    """Yields (index, how likely, whether greedy decoding writes it) of each request, in any order.

    Args:
        converted: Model, tokenizer and facts; the weights are read causally, whatever their layout, and never predict
            the mask token.
        requests: The continuations.
        batch_size: Requests in the model at once. It changes the scores only by rounding.
    """
    for trees in _batches(requests, batch_size):
        with measuring(converted.model):  # closed before a yield, so that the caller's code has gradients
            scores = _score(converted, trees)
        of_each = [length for tree in trees for length in tree.lengths]
        members = [index for tree in trees for index in tree.members]
        parts = zip(*(part.split(of_each) for part in scores), strict=True)
        for index, (log_probs, best) in zip(members, parts, strict=True):
            is_greedy = bool((log_probs >= best).all())
            yield index, Scored(float(log_probs.double().sum()), 0.0), is_greedy


def _batches(requests: Sequence[Continuation], batch_size: int) -> Iterator[list[Tree]]:
    """Yields trees of similar lengths, the longest first, with at most `batch_size` requests together."""
    by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        by_context[tuple(request.context)].append(index)
    trees = [
        Tree(context, part, [list(requests[index].tokens) for index in part])
        for context, members in by_context.items()
        for part in in_parts(members, batch_size)
    ]
    batch: list[Tree] = []
    for tree in sorted(trees, key=lambda tree: (not tree.is_a_line, -len(tree.ids))):
        is_other_kind = bool(batch) and batch[0].is_a_line != tree.is_a_line
        if is_other_kind or sum(len(each.members) for each in batch) + len(tree.members) > batch_size:
            yield batch
            batch = []
        batch.append(tree)
    yield from in_batches(batch, max(len(batch), 1))


def _score(converted: Converted, trees: Sequence[Tree]) -> TokenScores:
    model, _, facts = converted
    device = device_of(model)
    length = max(len(tree.ids) for tree in trees)
    ids = _rows([tree.ids for tree in trees], length, 0).to(device)  # an AR source may have no mask token
    if all(tree.is_a_line for tree in trees):  # no token of a row reads the padding after it
        states = body_forward(model, ids, CAUSAL).last_hidden_state
    else:
        documents = _rows([[0] * len(tree.ids) for tree in trees], length, -1).to(device)
        positions = _rows([tree.positions for tree in trees], length, 0).to(device)
        streams = _rows([tree.streams for tree in trees], length, -1).to(device)
        states = body_forward(
            model, ids, CAUSAL, document_ids=documents, position_ids=positions, stream_ids=streams
        ).last_hidden_state
    places = torch.tensor([row * length + place for row, tree in enumerate(trees) for place in tree.places])
    targets = torch.tensor([target for tree in trees for target in tree.targets])
    head = denoising_head(model, facts.mask_token_id)
    return score_states(_at(states, places.to(device)), head, targets.to(device))


def _at(states: Float[Tensor, "B T D"], places: Int[Tensor, " n"]) -> Float[Tensor, "n D"]:
    return states.flatten(0, 1).index_select(0, places)


def _rows(values: Sequence[Sequence[int]], length: int, padding: int) -> Int[Tensor, "B T"]:
    return torch.tensor([[*row, *[padding] * (length - len(row))] for row in values])
