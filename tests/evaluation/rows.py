"""Rows, models and facts that the tests of this room share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from decausal.models.adapt import adapt
from decausal.models.facts import ConversionFacts
from tests.families import EOS_ID, FAMILIES, tiny_tokenizer

Row = dict[str, Tensor]


def packed_row(*lengths: int, padding: int = 0, seed: int = 0) -> Row:
    """A row of random documents of these lengths, all of it maskable, then padding."""
    length = sum(lengths)
    ids = torch.randint(0, 250, (length,), generator=torch.Generator().manual_seed(seed))
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return {
        "clean_ids": torch.cat([ids, torch.full((padding,), EOS_ID)]),
        "document_ids": torch.cat([documents, torch.full((padding,), -1)]),
        "is_maskable": torch.arange(length + padding) < length,
    }


def alone(row: Row, document: int) -> Row:
    """The same row with every other document's tokens turned into padding."""
    is_kept = row["document_ids"] == document
    return {
        "clean_ids": row["clean_ids"].where(is_kept, EOS_ID),
        "document_ids": row["document_ids"].where(is_kept, -1),
        "is_maskable": row["is_maskable"] & is_kept,
    }


def converted(
    family: str = "llama", *, layout: str = "bidirectional", shift: int = 1, seed: int = 0, **changes: Any
) -> tuple[PreTrainedModel, ConversionFacts, PreTrainedTokenizerFast]:
    """A random model with a mask token, its facts and its tokenizer."""
    model, tokenizer = FAMILIES[family](seed=seed), tiny_tokenizer()
    mask_token_id = adapt(model, tokenizer)
    facts = ConversionFacts(source="tiny", layout=layout, shift=shift, mask_token_id=mask_token_id, **changes)
    return model, facts, tokenizer
