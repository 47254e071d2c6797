"""Tiny random converted models."""

from __future__ import annotations

from typing import Any

from decausal.models.adapt import adapt
from decausal.models.checkpoint import Converted
from tests.families import FAMILIES, tiny_tokenizer
from tests.sampling.stand_ins import conversion_facts


def converted(family: str = "qwen3", chat: bool = False, **facts: Any) -> Converted:
    """A bidirectional model of shift 1, unless changed."""
    model, tokenizer = FAMILIES[family](), tiny_tokenizer(chat)
    mask_token_id = adapt(model, tokenizer)
    # Sharper distributions: rounding then decides no comparison.
    model.get_output_embeddings().weight.data *= 4
    return Converted(model, tokenizer, conversion_facts(mask_token_id, **{"shift": 1, **facts}))
