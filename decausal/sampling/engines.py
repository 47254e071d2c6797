"""The engine that fits a model."""

from __future__ import annotations

from decausal.models.checkpoint import Converted
from decausal.sampling.bidirectional.row_engine import RowEngine
from decausal.sampling.blocks.jobs import BlockJobs
from decausal.sampling.generate import end_token_ids
from decausal.sampling.jobs import Engine


def engine_for(converted: Converted, *, max_rows: int, max_length: int, is_autoregressive: bool = False) -> Engine:
    """Returns an engine for the model's layout; the same jobs give the same answers as `generate` and `infill`.

    Args:
        converted: Model, tokenizer and facts.
        max_rows: Rows in one forward pass.
        max_length: Longest row, given and written tokens together.
        is_autoregressive: Write a causal model's rows from left to right, one token with every pass, with a cache.
    """
    if converted.facts.layout == "block" or is_autoregressive:
        ends = end_token_ids(converted)
        return BlockJobs(converted, max_rows=max_rows, max_length=max_length, end_token_ids=ends)
    return RowEngine(converted, max_rows=max_rows, max_length=max_length)
