"""The states that are drawn from a rollout, and the rows that hold them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decausal.training.rollout_states import relative_steps, rows_of, states_of
from decausal.training.rollouts import NEVER, Rollout


@st.composite
def rollouts(draw, block_size: int) -> Rollout:
    """A rollout as the engine makes them: blocks unmasked in any order, perhaps cut by an end token in the last."""
    prompt_length = draw(st.integers(1, 2 * block_size + 1))
    first = prompt_length // block_size
    num_blocks = draw(st.integers(1, 4))
    length = (first + num_blocks) * block_size
    steps = torch.full((length,), -1)
    for position in range(prompt_length, length):
        steps[position] = draw(st.integers(0, block_size - 1))
    end = draw(st.integers(max(prompt_length, length - block_size) + 1, length))
    for position in range(end, length):
        if draw(st.booleans()):
            steps[position] = NEVER
    return Rollout(torch.arange(length) + 5, prompt_length, end, steps, 3, end < length)


sizes = st.integers(1, 5)


@given(data=st.data(), block_size=sizes, share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=150, deadline=None)
def test_a_state_is_each_block_just_before_one_of_its_steps(data, block_size, share):
    rollout = data.draw(rollouts(block_size))
    num_blocks = len(rollout.ids) // block_size
    (is_masked,) = states_of(rollout, block_size, torch.full((1, num_blocks), share, dtype=torch.float64))
    for block in range(num_blocks):
        positions = range(block * block_size, (block + 1) * block_size)
        answer = [int(rollout.step_of_token[p]) for p in positions if rollout.prompt_length <= p < rollout.end]
        found = [p for p in positions if is_masked[p]]
        if not answer:
            assert not found
            continue
        distinct = sorted(set(answer))
        step = distinct[int(share * len(distinct))]
        assert found == [p for p in positions if rollout.step_of_token[p] >= step]
        assert any(rollout.is_answer[p] for p in found)


@given(data=st.data(), block_size=sizes, num_states=st.integers(1, 4), choice=st.sampled_from(["block", "sequence"]))
@settings(max_examples=60, deadline=None)
def test_every_block_of_every_state_has_a_token_to_predict(data, block_size, num_states, choice):
    rollout = data.draw(rollouts(block_size))
    num_blocks = len(rollout.ids) // block_size
    relative = relative_steps(num_blocks, num_states, choice, position=data.draw(st.integers(0, 99)), seed=1)
    is_target = (states_of(rollout, block_size, relative) & rollout.is_answer).reshape(num_states, num_blocks, -1)
    has_answer = rollout.is_answer.reshape(num_blocks, -1).any(1)
    assert torch.equal(is_target.any(2), has_answer.expand(num_states, -1))


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5])
def test_steps_are_uniform_and_several_states_spread_over_them(num_steps):
    drawn = torch.cat([relative_steps(50, 1, "block", position=p, seed=0)[0] for p in range(40)])
    counts = torch.bincount((drawn * num_steps).long(), minlength=num_steps)
    expected = len(drawn) / num_steps
    assert ((counts - expected).abs() < 5 * (expected**0.5)).all()
    spread = (relative_steps(30, num_steps, "block", position=7, seed=0) * num_steps).long()
    assert all(sorted(column) == list(range(num_steps)) for column in spread.T.tolist())


def test_one_draw_serves_all_blocks_of_a_sequence():
    sequence = relative_steps(6, 2, "sequence", position=3, seed=0)
    block = relative_steps(6, 2, "block", position=3, seed=0)
    assert (sequence == sequence[:, :1]).all()
    assert len(block[0].unique()) == 6
    assert torch.equal(sequence, relative_steps(6, 2, "sequence", position=3, seed=0))
    assert not torch.equal(sequence, relative_steps(6, 2, "sequence", position=4, seed=0))


@given(data=st.data(), block_size=sizes, count=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_packed_rows_hold_every_rollout_once_and_whole(data, block_size, count):
    held = [data.draw(rollouts(block_size)) for _ in range(count)]
    held = [Rollout(**(vars(r) | {"ids": r.ids + 1000 * number})) for number, r in enumerate(held)]
    relative = [
        relative_steps(len(r.ids) // block_size, 2, "block", position=number, seed=0) for number, r in enumerate(held)
    ]
    states = [states_of(r, block_size, own) for r, own in zip(held, relative, strict=True)]
    rows = rows_of(held, states)
    found = {}
    for row in rows:
        for number in range(int(row["document_ids"].max()) + 1):
            place = row["document_ids"] == number
            ids = row["clean_ids"][place]
            found[int(ids[0]) // 1000] = (ids, row["is_predictable"][place], row["is_masked"][:, place])
        assert not row["is_masked"][:, row["document_ids"] < 0].any()
    assert sorted(found) == list(range(count))
    for number, (ids, is_predictable, is_masked) in found.items():
        assert torch.equal(ids, held[number].ids)
        assert torch.equal(is_predictable, held[number].is_answer)
        assert torch.equal(is_masked, states[number])


@given(lengths=st.lists(st.integers(8, 40), min_size=8, max_size=16))
@settings(max_examples=40, deadline=None)
def test_packed_rows_hold_little_padding(lengths):
    held = [Rollout(torch.arange(n), 1, n, torch.arange(n) - 1, n, False) for n in lengths]
    states = [states_of(r, 1, torch.zeros(1, len(r.ids), dtype=torch.float64)) for r in held]
    rows = rows_of(held, states)
    num_places = sum(len(row["clean_ids"]) for row in rows)
    assert num_places <= sum(lengths) + max(lengths)
