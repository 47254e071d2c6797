"""Identities 3 (its second half) and 11: what the block engine writes is what the layout defines, in any company."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from decausal.sampling import windows
from decausal.sampling.engine import BlockEngine, Finished, Request
from decausal.sampling.settings import SamplerSettings
from tests.sampling.block_decoding import MASK, VOCAB_SIZE, block_facts, decode, sharp_model

MODEL = sharp_model()
END = 3

block_sizes = st.sampled_from([1, 2, 3, 4, 8])
prompts = st.lists(st.integers(4, MASK - 1), min_size=1, max_size=11)
schedules = st.sampled_from(
    [
        {"num_steps": 1},
        {"num_steps": 2},
        {"num_steps": 9},
        {"threshold": 0.5},
        {"threshold": 0.9},
        {"entropy_bound": 1.0},
    ]
)
orders = st.sampled_from(["probability", "margin", "entropy"])
draws = st.sampled_from(
    [{}, {"temperature": 1.0}, {"temperature": 2.0, "top_k": 5}, {"temperature": 1.5, "top_p": 0.8}]
)


@st.composite
def sampler_settings(draw: st.DrawFn) -> SamplerSettings:
    options = draw(schedules) | draw(draws)
    return SamplerSettings(max_new_tokens=draw(st.integers(1, 14)), confidence=draw(orders), **options)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    return Request(draw(prompts), draw(sampler_settings()), seed=draw(st.integers(0, 99)))


def run(
    facts: Any, rows: list[Request], max_rows: int = 8, model: PreTrainedModel = MODEL, **options: Any
) -> list[Finished]:
    engine = BlockEngine(model, facts, max_rows=max_rows, end_token_ids=(END,), **options)
    return sorted(engine.run(rows), key=lambda row: row.ticket)


def told(row: Finished) -> tuple[Any, ...]:
    return row.ids, row.block_of_token, row.step_of_token, row.finish_reason


layouts = {"block_size": block_sizes, "shift": st.sampled_from([0, 1]), "causal_context": st.booleans()}


@settings(max_examples=40, deadline=None)
@given(
    **layouts,
    rows=st.lists(requests(), min_size=1, max_size=4),
    max_rows=st.integers(1, 4),
    padding=st.sampled_from([0, 5, 10**9]),
)
def test_rows_are_what_passes_over_whole_rows_give(
    block_size: int, shift: int, causal_context: bool, rows: list[Request], max_rows: int, padding: int
) -> None:
    facts = block_facts(block_size, shift, causal_context)
    engine = BlockEngine(MODEL, facts, max_rows=max_rows, end_token_ids=(END,))
    engine._reader.free_padding = padding
    found = sorted(engine.run(rows), key=lambda row: row.ticket)
    assert len(found) == len(rows)
    for row, request in zip(found, rows, strict=True):
        expected = decode(MODEL, facts, request.prompt_ids, request.settings, request.seed, (END,))
        assert told(row) == (expected.ids, expected.blocks, expected.steps, expected.reason)
        assert row.num_forwards == expected.num_steps
