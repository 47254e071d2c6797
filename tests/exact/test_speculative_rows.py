"""Identities 11 and 12: a speculated row depends on no other, and its cache holds what a prefill does."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decausal.errors import UserError
from decausal.models.block_cache import BlockCache, cached_forward, decoding
from decausal.models.facts import ConversionFacts
from decausal.models.visible_slots import visible_by_layer
from decausal.sampling.jobs import Job
from decausal.sampling.rows import Row
from decausal.sampling.settings import DRAFTS
from tests.exact.speculation import MASK, engine_of, facts, greedy, job_of, model_of, own, prompt_of, written
from tests.families import VOCAB_SIZE

ROW = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(5, VOCAB_SIZE - 1), min_size=1, max_size=9),
        "count": st.integers(1, 9),
        "temperature": st.sampled_from([0.0, 0.7, 1.3]),
        "top_k": st.sampled_from([None, 5]),
        "seed": st.integers(0, 2**40),
        "draft": st.sampled_from(DRAFTS),
        "draft_length": st.integers(0, 3),
        "enters": st.integers(0, 6),
    }
)


@given(
    rows=st.lists(ROW, min_size=1, max_size=6),
    family=st.sampled_from(["llama", "gemma3"]),
    shift=st.integers(0, 1),
    max_rows=st.integers(1, 4),
    cancelled=st.sets(st.integers(0, 5), max_size=2),
)
@settings(max_examples=25, deadline=None)
def test_a_row_is_the_same_alone_in_any_batch_and_entered_late(rows, family, shift, max_rows, cancelled):
    model, end = model_of(family), 7
    jobs = [
        job_of(
            row["prompt"],
            own(row["count"], row["draft"], row["draft_length"], temperature=row["temperature"], top_k=row["top_k"]),
            row["seed"],
            [end],
        )
        for row in rows
    ]
    alone = [written(engine_of(model, facts(shift), 1), [job])[0] for job in jobs]
    engine, reported, index_of, step = engine_of(model, facts(shift), max_rows), {}, {}, 0
    while len(index_of) < len(jobs) or engine.num_running:
        index_of |= {engine.submit(jobs[index]): index for index, row in enumerate(rows) if row["enters"] == step}
        for progress in engine.step():
            reported.setdefault(index_of[progress.ticket], []).append(progress)
        step += 1
        if step == 4:  # some have ended, some run, some wait
            for ticket, index in index_of.items():
                if index in cancelled and not (index in reported and reported[index][-1].ended):
                    engine.cancel(ticket)
                    reported.pop(index, None)
    assert not engine.num_waiting
    for index, progress in reported.items():
        ended, wanted = progress[-1].ended, alone[index]
        if rows[index]["draft"] in ("linear", "auto"):  # waits for others, looks at time
            own_course = {name: getattr(ended, name) for name in ("step_of_token", "num_forwards", "drafts")}
            wanted = replace(wanted, **own_course)
        assert ended == wanted
        assert [token for each in progress for token in each.ids] == alone[index].ids
        assert [each.step for each in progress] == list(range(ended.num_forwards))
        start = len(rows[index]["prompt"])
        positions = [position for each in progress for position in each.positions]
        assert positions == list(range(start, start + len(positions)))
    assert {index for index in range(len(jobs)) if index not in reported} <= cancelled


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_after_each_pass_the_cache_holds_what_a_prefill_does(draft, family):
    """Keys and values of all known tokens but the last; what drafts and masks have left is overwritten, and hides."""
    model = model_of(family)
    jobs = [job_of(prompt_of(length, length), own(12, draft, 3)) for length in (9, 2, 6, 4)]
    engine = engine_of(model, facts(1), 3)
    engine._most_read = 4
    for job in jobs:
        engine.submit(job)
    ended = []
    while engine.num_running:
        ended += [progress.ended.ids for progress in engine.step() if progress.ended]
        for row in (row for row in engine._held if row.num_cached):
            known = [*row.prompt, *row.ids]
            cache = BlockCache(model.config, 1, len(known))
            ids = torch.tensor([known[: row.num_cached]])
            places = torch.arange(row.num_cached)[None]
            visible = visible_by_layer(model.config, places, places, row.num_cached)
            with decoding(model):
                cached_forward(model, ids, places, places, visible, cache)
            for held, wanted in zip(engine._rows.cache.layers, cache.layers, strict=True):
                for own_states, expected in ((held.keys, wanted.keys), (held.values, wanted.values)):
                    torch.testing.assert_close(
                        own_states[row.place, : row.num_cached], expected[0, : row.num_cached], rtol=1e-9, atol=1e-9
                    )
                    own_states[row.place, row.num_cached :] = 1e3  # whoever read it would write another text
        assert all(row.num_cached == len(row.prompt) + len(row.ids) - 1 for row in engine._held[: engine._num_ready])
    assert sorted(ended) == sorted(greedy(model, job.row.given[0], 12) for job in jobs)


def test_rows_that_keep_coming_do_not_hold_up_the_others():
    engine = engine_of(model_of("qwen3"), facts(1), max_rows=2)
    count, num_passes = 12, 0
    ticket = engine.submit(job_of([5, 6], own(count)))
    is_over = False
    while not is_over:
        engine.submit(job_of([7], own(1)))  # over with the pass that reads its prompt
        is_over = any(progress.ticket == ticket and progress.ended for progress in engine.step())
        num_passes += 1
        assert num_passes <= 2 * count


def test_what_cannot_be_speculated_is_refused():
    model = model_of("qwen3")
    engine = functools.partial(engine_of, model, max_length=8)
    for job, says in [
        (job_of([], own(2)), "empty"),
        (job_of([5] * 7, own(2)), "at most 8"),
        (Job(Row(([5], [6]), (2,), "the text"), own(2), 0), "after a gap"),
        (job_of([5], own(2, "linear", 5)), r"draft_length=5 is more than .* at most 4"),
    ]:
        with pytest.raises(UserError, match=says):
            engine(facts(1)).submit(job)
    with pytest.raises(UserError, match="verifier='masks' is not possible"):
        engine(facts(1)).submit(job_of([5], own(2, verifier="masks")))
    with pytest.raises(UserError, match=r"draft_length=4 is more than .* at most 3"):
        engine(facts(0)).submit(job_of([5], own(2, "quadratic", 4)))
    with pytest.raises(UserError, match="causal"):
        engine(ConversionFacts(source="random", layout="causal", shift=1, mask_token_id=MASK))
