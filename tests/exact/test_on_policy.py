"""Identity 10: every on-policy training state is a state that the rollout visited, whatever the prompt's length."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decausal.data.block_collator import BlockCollator
from decausal.diffusion.layout import Layout
from decausal.models.backbone import body_forward, head_of
from decausal.models.facts import ConversionFacts
from decausal.objectives.head import logits
from decausal.sampling.blocks.engine import BlockEngine
from decausal.sampling.settings import SamplerSettings
from decausal.training.rollout_states import relative_steps, rows_of, states_of
from decausal.training.rollouts import Rollout, as_rollout
from tests.families import VOCAB_SIZE
from tests.runs import adapted, teacher_of
from tests.sampling.block_decoding import job_of
from tests.sampling.denoising import in_order

END_TOKENS = tuple(range(0, VOCAB_SIZE, 7))  # so many that most rollouts end
Visited = dict[int, list[dict[int, int]]]  # by block: what was known of it, position to token, before each step


@cache
def a_model():
    return adapted("qwen3", dtype=torch.float64)


def rolled_out(lengths, block_size, shift, *, causal_context=False, threshold=0.02, new_tokens=9):
    """Rollouts, and what the engine reported of every pass."""
    model, mask_token_id = a_model()
    facts = ConversionFacts("tiny", "block", shift, mask_token_id, block_size, causal_context=causal_context)
    engine = BlockEngine(model, facts, max_rows=2, max_length=48)
    generator = torch.Generator().manual_seed(sum(lengths))
    prompts = [torch.randint(0, VOCAB_SIZE, (length,), generator=generator) for length in lengths]
    for number, prompt in enumerate(prompts):
        budget = -(-(len(prompt) + new_tokens) // block_size) * block_size - len(prompt)
        decoding = SamplerSettings(max_new_tokens=budget, temperature=1.0, threshold=threshold)
        engine.submit(job_of(prompt.tolist(), decoding, seed=number, ends=END_TOKENS))
    visited: list[Visited] = [{} for _ in prompts]
    finished = {}
    while engine.num_running:
        for event in engine.step():
            known = visited[event.ticket].setdefault(event.block, [_given(prompts[event.ticket], event, block_size)])
            known.append(known[-1] | dict(zip(event.positions, event.ids, strict=True)))
            if event.ended:
                finished[event.ticket] = event.ended
    return [as_rollout(prompt, finished[number], block_size) for number, prompt in enumerate(prompts)], visited


def _given(prompt, event, block_size):
    start = event.block * block_size
    return {position: int(prompt[position]) for position in range(start, min(start + block_size, len(prompt)))}


def batch_of(rollouts: list[Rollout], block_size: int, shift: int, num_states: int, choice: str, position: int, **more):
    relative = [
        relative_steps(-(-len(r.ids) // block_size), num_states, choice, position=position + number, seed=0)
        for number, r in enumerate(rollouts)
    ]
    states = [states_of(r, block_size, own) for r, own in zip(rollouts, relative, strict=True)]
    rows = rows_of(rollouts, states)
    collator = BlockCollator(a_model()[1], shift, Layout("block", block_size, **more), kl_mean="sequence")
    return collator(rows), rows


@given(
    block_size=st.integers(1, 5),
    offset=st.integers(0, 4),
    shift=st.sampled_from([0, 1]),
    num_states=st.integers(1, 3),
    choice=st.sampled_from(["block", "sequence"]),
    position=st.integers(0, 1000),
    causal_context=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_every_training_state_is_one_that_the_rollout_visited(
    block_size, offset, shift, num_states, choice, position, causal_context
):
    lengths = [1 + offset, block_size + offset % block_size or 1, 2 * block_size + 1]
    rollouts, visited = rolled_out(lengths, block_size, shift, causal_context=causal_context)
    batch, rows = batch_of(rollouts, block_size, shift, num_states, choice, position, causal_context=causal_context)
    num_seen = 0
    whose = {tuple(r.ids.tolist()): number for number, r in enumerate(rollouts)}
    for row, item in enumerate(rows):
        for document in range(int(item["document_ids"].max()) + 1):
            number = whose[tuple(item["clean_ids"][item["document_ids"] == document].tolist())]
            for stream in range(1, num_states + 1):
                is_mine = (batch["student_document_ids"][row] == document) & (batch["stream_ids"][row] == stream)
                ids, positions = (batch[name][row][is_mine] for name in ("student_ids", "student_position_ids"))
                for block in (positions // block_size).unique().tolist():
                    in_block = positions // block_size == block
                    known = {
                        p: token
                        for p, token in zip(positions[in_block].tolist(), ids[in_block].tolist(), strict=True)
                        if token != a_model()[1]
                    }
                    assert known in visited[number][block]
                    num_seen += 1
    assert num_seen or (shift == 1 and block_size == 1)


@given(block_size=st.integers(1, 5), offset=st.integers(0, 4), shift=st.sampled_from([0, 1]))
@settings(max_examples=20, deadline=None)
def test_targets_are_the_answers_masked_tokens_up_to_its_end_and_none_else(block_size, offset, shift):
    rollouts, _ = rolled_out([1 + offset, 2 + offset], block_size, shift)
    batch, rows = batch_of(rollouts, block_size, shift, 2, "block", 5)
    expected = sum(int((item["is_masked"] & item["is_predictable"]).sum()) for item in rows)
    assert len(batch["target_ids"]) == expected
    clean = batch["clean_ids"].reshape(-1)
    assert torch.equal(batch["target_ids"], clean[batch["next_token_index"] + 1])
    for rollout in rollouts:  # the end token is a target like any other, where a state masks it
        assert int(rollout.ids[rollout.end - 1]) in END_TOKENS or not rollout.has_ended
    assert batch["logit_weight"].sum() == pytest.approx(2 * len(rollouts))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_the_students_and_the_teachers_states_speak_of_the_same_token(block_size, shift):
    """The student's state reads none of the targets; the teacher's the clean tokens before them and nothing after."""
    rollouts, _ = rolled_out([3, 6], block_size, shift, threshold=1.0)
    batch, _ = batch_of(rollouts, block_size, shift, 1, "block", 3)
    teacher = teacher_of("qwen3", torch.float64)

    def teacher_rows(clean_ids):
        (states,) = teacher.read(
            clean_ids, [(-1, batch["next_token_index"])], batch.get("document_ids"), batch.get("position_ids")
        )
        return states

    length = batch["clean_ids"].shape[1]
    before = teacher_rows(batch["clean_ids"])
    for target in range(len(batch["target_ids"])):
        index = int(batch["next_token_index"][target]) + 1
        for place, is_read in ((index - 1, True), (index, False)):
            changed = batch["clean_ids"].clone()
            changed[place // length, place % length] = (changed[place // length, place % length] + 1) % VOCAB_SIZE
            assert torch.equal(teacher_rows(changed)[target], before[target]) != is_read
    # With blocks of one token and shift 1 the student's state for a token is the teacher's.
    if (block_size, shift) == (1, 1):
        model, _ = a_model()
        student = body_forward(
            model,
            batch["student_ids"],
            Layout("block", 1),
            document_ids=batch["student_document_ids"],
            position_ids=batch["student_position_ids"],
            stream_ids=batch["stream_ids"],
        ).last_hidden_state.flatten(0, 1)[batch["target_index"]]
        torch.testing.assert_close(
            logits(student, head_of(model))[:, :VOCAB_SIZE], logits(before, head_of(teacher.model))
        )


def test_an_end_token_that_comes_first_is_trained_on():
    model, mask_token_id = a_model()
    facts = ConversionFacts("tiny", "block", 0, mask_token_id, 4)
    engine = BlockEngine(model, facts, max_rows=1)
    settings = SamplerSettings(max_new_tokens=11, temperature=1.0)
    (row,) = in_order(engine, [job_of([5, 6, 7, 8, 9], settings, ends=tuple(range(VOCAB_SIZE)))])
    rollout = as_rollout(torch.tensor([5, 6, 7, 8, 9]), row, 4)
    assert rollout.has_ended
    assert rollout.end == 6
    batch, _ = batch_of([rollout], 4, 0, 3, "block", 0)
    assert batch["target_ids"].tolist() == [int(rollout.ids[5])] * 3
    assert batch["logit_weight"].tolist() == [1.0] * 3


def test_a_truncated_rollout_trains_on_all_that_was_written_and_on_nothing_else():
    model, mask_token_id = a_model()
    facts = ConversionFacts("tiny", "block", 0, mask_token_id, 4)
    engine = BlockEngine(model, facts, max_rows=1)
    (row,) = in_order(engine, [job_of([5, 6, 7, 8, 9], SamplerSettings(max_new_tokens=7, temperature=1.0))])
    rollout = as_rollout(torch.tensor([5, 6, 7, 8, 9]), row, 4)
    assert not rollout.has_ended
    assert rollout.is_answer.nonzero()[:, 0].tolist() == list(range(5, 12))
    assert len(rollout.ids) == 12
