"""Identities 3 (its second half) and 11: what the block engine writes is what the layout defines, in any company."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from decausal.diffusion.doubled import double
from decausal.models.backbone import body_forward
from decausal.sampling.blocks.engine import BlockEngine
from decausal.sampling.jobs import Ended, Job
from decausal.sampling.settings import SamplerSettings
from tests.families import SLIDING_WINDOW
from tests.sampling.block_decoding import MASK, VOCAB_SIZE, block_facts, decode, job_of, sharp_model
from tests.sampling.denoising import drained, in_order
from tests.sampling.tape import Tapes

MODEL = sharp_model()
END = 3
NEVER = 10**9

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
layouts = {"block_size": block_sizes, "shift": st.sampled_from([0, 1]), "causal_context": st.booleans()}


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    own = SamplerSettings(
        max_new_tokens=draw(st.integers(1, 14)), confidence=draw(orders), **draw(schedules), **draw(draws)
    )
    return job_of(draw(prompts), own, seed=draw(st.integers(0, 99)), ends=(END,))


def engine_of(facts: Any, model: PreTrainedModel = MODEL, padding: int | None = None, **options: Any) -> BlockEngine:
    engine = BlockEngine(model, facts, **{"max_rows": 4, **options})
    if padding is not None:
        engine._reader.free_padding = padding
    return engine


def reported(row: Ended) -> tuple[Any, ...]:
    return row.ids, row.blocks.of_token, row.blocks.step_of_token, row.reason


@settings(max_examples=24, deadline=None)
@given(
    **layouts,
    rows=st.lists(jobs(), min_size=1, max_size=4),
    max_rows=st.integers(1, 4),
    padding=st.sampled_from([0, 5, NEVER]),
)
def test_rows_are_what_passes_over_whole_rows_give(
    block_size: int, shift: int, causal_context: bool, rows: list[Job], max_rows: int, padding: int
) -> None:
    facts = block_facts(block_size, shift, causal_context)
    found = in_order(engine_of(facts, max_rows=max_rows, padding=padding), rows)
    assert len(found) == len(rows)
    for row, job in zip(found, rows, strict=True):
        expected = decode(MODEL, facts, job.row.given[0], job.settings, job.seed, (END,))
        assert reported(row) == (expected.ids, expected.blocks, expected.steps, expected.reason)
        assert row.num_forwards == expected.num_steps


FAMILY_MODELS = {
    "mistral": sharp_model("mistral"),  # every layer slides
    "gemma3": sharp_model("gemma3"),  # one layer slides
    "gpt2": sharp_model("gpt2"),  # learned positions
    "gemma2": sharp_model("gemma2"),  # eager attention, soft caps
}


@pytest.mark.parametrize("family", FAMILY_MODELS)
@pytest.mark.parametrize("shift", [0, 1])
def test_rows_of_other_families_are_what_passes_over_whole_rows_give(family: str, shift: int) -> None:
    model, facts = FAMILY_MODELS[family], block_facts(4, shift)
    own = SamplerSettings(max_new_tokens=9, threshold=0.6)
    rows = [job_of([7, 5, 9, 11, 4, 8][:length], own, ends=(END,)) for length in (1, 4, 6)]
    windows = {"mistral": SLIDING_WINDOW, "gemma3": SLIDING_WINDOW, "gemma2": SLIDING_WINDOW}
    for row, job in zip(in_order(engine_of(facts, model), rows), rows, strict=True):
        expected = decode(model, facts, job.row.given[0], own, 0, (END,), window=windows.get(family))
        assert reported(row) == (expected.ids, expected.blocks, expected.steps, expected.reason)


class RecordedStates:
    """The states from which an engine predicts, one tensor per pass."""

    def __init__(self, engine: BlockEngine) -> None:
        self.passes: list[Tensor] = []
        predict = engine._reader.predict

        def recorded(windows: list[range]) -> Tensor:
            states = predict(windows)
            self.passes.append(states.clone())
            return states

        engine._reader.predict = recorded


@settings(max_examples=14, deadline=None)
@given(**layouts, job=jobs())
@torch.no_grad()
def test_states_are_those_of_the_row_that_is_trained_on(
    block_size: int, shift: int, causal_context: bool, job: Job
) -> None:
    """Identity 3: every state an engine decided from stands in a row of clean and noised tokens."""
    facts = block_facts(block_size, shift, causal_context)
    engine = engine_of(facts)
    states = RecordedStates(engine)
    (row,) = in_order(engine, [job])
    size, first = block_size, row.blocks.first * block_size
    clean = torch.tensor([[*job.row.given[0][:first], *row.blocks.ids]])
    steps = torch.tensor([-1] * first + row.blocks.steps)
    was_given = torch.arange(clean.shape[1]) < len(job.row.given[0])
    blocks = torch.arange(clean.shape[1]) // size
    pass_number = 0
    for block in range(row.blocks.first, clean.shape[1] // size):
        here = blocks == block
        num_steps = 1 + max(steps[here & ~was_given].tolist())
        for step in range(num_steps):
            is_masked = here & ~was_given & ((steps >= step) | (steps < 0))
            doubled = double(clean, torch.zeros_like(clean), here[None], is_masked[None, None], MASK, size)
            hidden = body_forward(
                MODEL,
                doubled.ids,
                facts.attention,
                document_ids=doubled.document_ids,
                position_ids=doubled.position_ids,
                stream_ids=doubled.stream_ids,
            ).last_hidden_state[0]
            positions = is_masked.nonzero().flatten()
            found = states.passes[pass_number][0, positions % size]
            expected = hidden[doubled.predicting_place(1, positions, shift)]
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
            pass_number += 1
    assert pass_number == row.num_forwards


@settings(max_examples=14, deadline=None)
@given(
    **layouts,
    rows=st.lists(jobs(), min_size=2, max_size=6),
    max_rows=st.integers(1, 5),
    num_early=st.integers(0, 5),
    padding=st.sampled_from([0, NEVER]),
)
def test_a_row_is_the_same_alone_in_any_batch_and_admitted_late(
    block_size: int,
    shift: int,
    causal_context: bool,
    rows: list[Job],
    max_rows: int,
    num_early: int,
    padding: int,
) -> None:
    facts = block_facts(block_size, shift, causal_context)
    alone = [in_order(engine_of(facts), [row])[0] for row in rows]
    assert in_order(engine_of(facts, max_rows=max_rows, padding=padding), rows) == alone
    engine, late = engine_of(facts, max_rows=max_rows, padding=padding), {}
    tickets = [engine.submit(row) for row in rows[:num_early]]
    for row in rows[num_early:]:
        late |= {step.ticket: step.ended for step in engine.step() if step.ended}
        tickets.append(engine.submit(row))
    late |= drained(engine)
    assert [late[ticket] for ticket in tickets] == alone


@settings(max_examples=20, deadline=None)
@given(
    block_size=block_sizes,
    rows=st.lists(st.tuples(jobs(), st.booleans()), min_size=1, max_size=5),
    max_rows=st.integers(1, 4),
    padding=st.sampled_from([0, 5, NEVER]),
)
def test_first_tokens_from_the_clean_state_are_kept_before_the_others_are_decided(
    block_size: int, rows: list[tuple[Job, bool]], max_rows: int, padding: int
) -> None:
    facts = block_facts(block_size)
    asked = [
        replace(row, settings=replace(row.settings, first_token_from_clean=is_first_alone))
        for row, is_first_alone in rows
    ]
    expected = [decode(MODEL, facts, row.row.given[0], row.settings, row.seed, (END,)) for row in asked]
    for options in ({}, {"is_fused": False}, {"record": Tapes()}):
        found = in_order(engine_of(facts, max_rows=max_rows, padding=padding, **options), asked)
        assert [reported(row) for row in found] == [(row.ids, row.blocks, row.steps, row.reason) for row in expected]
        for row, job in zip(found, asked, strict=True):
            if job.settings.first_token_from_clean and block_size > 1:
                places = range(row.blocks.first * block_size, row.blocks.first * block_size + len(row.blocks.ids))
                steps = dict(zip(places, row.blocks.steps, strict=True))
                starts = [p for p in places if p % block_size == 0 and p >= len(job.row.given[0])]
                assert all(steps[p] == 0 and 0 not in [steps[p + i] for i in range(1, block_size)] for p in starts)


@settings(max_examples=14, deadline=None)
@given(**layouts, rows=st.lists(jobs(), min_size=1, max_size=4))
def test_commits_in_passes_of_their_own_give_the_same_rows_for_one_pass_more_per_block(
    block_size: int, shift: int, causal_context: bool, rows: list[Job]
) -> None:
    facts = block_facts(block_size, shift, causal_context)
    fused, unfused = (in_order(engine_of(facts, is_fused=is_fused), rows) for is_fused in (True, False))
    for one, other, job in zip(fused, unfused, rows, strict=True):
        num_blocks = len(one.blocks.ids) // block_size
        num_commits = num_blocks - (len(job.row.given[0]) < block_size)  # the prompt's whole blocks are one
        if block_size == 1 and shift == 1:
            num_commits = 0  # the autoregressive model reads no masks: each pass is a commit
        assert other == replace(one, num_forwards=one.num_forwards + num_commits)


@pytest.mark.parametrize("layout", ["block", "causal"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "mistral", "gemma2"])
def test_blocks_of_one_token_with_shift_1_write_the_greedy_text_of_the_autoregressive_model(
    family: str, layout: str
) -> None:
    model = sharp_model(family)
    facts = block_facts(1) if layout == "block" else replace(block_facts(1), layout="causal", block_size=None)
    rows = [job_of([7, 5, 9, 11, 4, 8, 20][:length], SamplerSettings(max_new_tokens=12)) for length in (1, 3, 7)]
    calls: list[tuple[int, ...]] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda _, args, options: calls.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    found = in_order(engine_of(facts, model), rows)
    hook.remove()
    for row, job in zip(found, rows, strict=True):
        ids = torch.tensor([job.row.given[0]])
        stock = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            suppress_tokens=[MASK],
            pad_token_id=0,
        )
        assert row.ids == stock[0, ids.shape[1] :].tolist()
        assert row.num_forwards == 12
        assert row.tokens_per_forward == 1
    # After the model's own test of its cache: the prompts, then one token of each row at a time.
    assert calls[-11:] == [(3, 1)] * 11


def test_random_numbers_are_those_of_seed_step_and_position_alone() -> None:
    """A row that draws at temperature 1 is the reference's, which knows nothing else."""
    facts = block_facts(4)
    own = SamplerSettings(max_new_tokens=16, temperature=1.0, num_steps=2)
    rows = [job_of([5, 6, 7], own, seed=seed, ends=(END,)) for seed in (0, 1, 2**40, 1)]
    found = in_order(engine_of(facts), rows)
    for row, job in zip(found, rows, strict=True):
        seed = job.settings.seed if job.seed is None else job.seed
        assert row.ids == decode(MODEL, facts, job.row.given[0], own, seed, (END,)).ids
    assert found[0].ids != found[1].ids
    assert found[1].ids == found[3].ids


@settings(max_examples=10, deadline=None)
@given(**layouts, job=jobs())
def test_a_text_of_fewer_tokens_is_the_beginning_of_a_longer_one(
    block_size: int, shift: int, causal_context: bool, job: Job
) -> None:
    facts = block_facts(block_size, shift, causal_context)
    numbers = (1, 2, 5, 9, 14)
    rows = [replace(job, row=replace(job.row, gaps=(number,))) for number in numbers]
    found = in_order(engine_of(facts, max_rows=3), rows)
    for row, number in zip(found, numbers, strict=True):
        assert row.ids == found[-1].ids[:number]
        assert len(row.ids) == number or row.reason == "end"


@settings(max_examples=10, deadline=None)
@given(**layouts, rows=st.lists(jobs(), min_size=1, max_size=3))
def test_the_whole_blocks_of_a_row_hold_every_state_that_it_visited(
    block_size: int, shift: int, causal_context: bool, rows: list[Job]
) -> None:
    facts = block_facts(block_size, shift, causal_context)
    engine = engine_of(facts)
    tickets = {engine.submit(row): row for row in rows}
    seen: dict[int, dict[tuple[int, int], dict[int, int]]] = {ticket: {} for ticket in tickets}
    ended = {}
    while engine.num_running:
        for progress in engine.step():
            kept = dict(zip(progress.positions, progress.ids, strict=True))
            seen[progress.ticket][progress.block, progress.block_step] = kept
            if progress.ended:
                ended[progress.ticket] = progress.ended
    for ticket, row in ended.items():
        first, prompt = row.blocks.first * block_size, tickets[ticket].row.given[0]
        assert len(row.blocks.ids) % block_size == 0
        by_step: dict[tuple[int, int], dict[int, int]] = {}
        for place, (token, step) in enumerate(zip(row.blocks.ids, row.blocks.steps, strict=True), start=first):
            if place < len(prompt):
                assert (token, step) == (prompt[place], -1)
            elif step < 0:
                assert token == MASK
            else:
                by_step.setdefault((place // block_size, step), {})[place] = token
        # A row tells of what it was asked for, its last step of nothing after the end: its blocks hold all the rest.
        last = next(reversed(seen[ticket]))
        ends = {step: len(prompt) + (len(row.ids) if step == last else tickets[ticket].row.gaps[0]) for step in by_step}
        wanted = {step: {p: t for p, t in kept.items() if p < ends[step]} for step, kept in by_step.items()}
        assert wanted == seen[ticket]
        assert len(by_step) == row.num_forwards == 1 + max(row.step_of_token[-1:] + row.step_of_token)
        assert VOCAB_SIZE - 1 not in row.ids


@settings(max_examples=20, deadline=None)
@given(
    **layouts,
    rows=st.lists(jobs(), min_size=1, max_size=5),
    max_rows=st.integers(1, 4),
    max_length=st.sampled_from([None, 64]),
)
def test_passes_that_are_recorded_and_replayed_write_what_others_write(
    block_size: int, shift: int, causal_context: bool, rows: list[Job], max_rows: int, max_length: int | None
) -> None:
    facts, tapes = block_facts(block_size, shift, causal_context), Tapes()
    sizes = {"max_rows": max_rows, "max_length": max_length}
    found, expected = (in_order(engine_of(facts, **sizes, record=record), rows) for record in (tapes, None))
    assert [reported(row) for row in found] == [reported(row) for row in expected]
    # A prompt that is too long for a recorded pass is read in one of its own.
    num_alone = [len(job.row.given[0]) // block_size >= 2 for job in rows]
    assert [row.num_forwards for row in found] == [
        row.num_forwards + alone for row, alone in zip(expected, num_alone, strict=True)
    ]


@pytest.mark.parametrize("family", FAMILY_MODELS)
def test_passes_of_other_families_can_be_recorded(family: str) -> None:
    model, facts, tapes = FAMILY_MODELS[family], block_facts(4, 1), Tapes()
    own = SamplerSettings(max_new_tokens=21, threshold=0.6)
    rows = [job_of([7, 5, 9, 11, 4, 8][:length], own, ends=(END,)) for length in (1, 4, 6)]
    found, expected = (
        in_order(engine_of(facts, model, max_length=32, record=record), rows) for record in (tapes, None)
    )
    assert [reported(row) for row in found] == [reported(row) for row in expected]
    assert 0 < tapes.num_recorded < tapes.num_replayed


@pytest.mark.parametrize("block_size", [1, 4])
def test_recorded_passes_serve_other_rows_and_settings_of_the_same_kinds(block_size: int) -> None:
    facts, tapes = block_facts(block_size, 1), Tapes()
    engine = engine_of(facts, max_length=32, record=tapes)
    num_recorded = []
    for number in (1, 2, 3):
        own = SamplerSettings(max_new_tokens=12, num_steps=number, temperature=float(number))
        rows = [job_of([7, 5, 9, 11 + number], own, seed=index) for index in range(3)]
        expected = in_order(engine_of(facts, max_length=32), rows)
        assert [reported(row) for row in in_order(engine, rows)] == [reported(row) for row in expected]
        num_recorded.append(tapes.num_recorded)
    # Two steps a block need passes over two blocks and over one; one step a block, or one token, of one kind only.
    assert num_recorded == ([1, 1, 1] if block_size == 1 else [1, 2, 2])
