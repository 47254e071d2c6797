"""Finds the tokens that a draft head chooses from: the most frequent ones in the run's data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Int
from torch import Tensor

from decausal.data.stream import TrainingStream
from decausal.evaluation.passes import spread_indices
from decausal.training.on_policy import OnPolicyStream, parts_of

_COUNTED_ROWS = 4096


def frequent_tokens(
    stream: TrainingStream | OnPolicyStream, size: int, vocabulary_size: int, always: Iterable[int] = ()
) -> Int[Tensor, " tokens"]:
    """Returns the ids of the most frequent tokens of a run's rows or prompts, in order.

    If there are many rows, only some are counted, spread evenly. Tokens that do not occur come last, the lowest ids
    first: tokenizers give them to frequent pieces.

    Args:
        stream: The run's rows.
        size: How many.
        vocabulary_size: Tokens that the output head knows.
        always: Tokens that are taken whatever the data, such as the ends of answers.
    """
    counts = torch.zeros(vocabulary_size, dtype=torch.long)
    for part in parts_of(stream):
        items = (part[index] for index in spread_indices(part, _COUNTED_ROWS))
        ids = torch.cat([item["clean_ids"][item["is_maskable"]] if isinstance(item, dict) else item for item in items])
        counts += torch.bincount(ids, minlength=vocabulary_size)
    counts[list(always)] = counts.max() + 1
    return counts.argsort(descending=True, stable=True)[:size].sort().values
