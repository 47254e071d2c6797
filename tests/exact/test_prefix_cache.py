"""Identity 12: shared beginnings are read once, and what is written after them is the same."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decausal.errors import UserError
from decausal.models.checkpoint import Converted
from decausal.sampling.blocks.prefix_cache import PAGE
from decausal.sampling.blocks.speculative import SpeculativeEngine
from decausal.sampling.engines import engine_for
from decausal.sampling.jobs import Job, run
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
from tests.sampling.block_decoding import block_facts, sharp_model

FACTS = block_facts(4)
BEGINNINGS = [[7, 9, 11, 5] * PAGE, [7, 9, 11, 5] * (PAGE // 2) + [8] * PAGE]


def job_of(prompt: list[int], count: int = 6, **options: object) -> Job:
    own = SamplerSettings(speculative=True, draft="quadratic", **options)
    return Job(Row((prompt, []), (count,), "the prompt"), own, 3)


def engine_of(num_tokens: int, family: str = "qwen3", max_rows: int = 3, most_read: int = 512) -> SpeculativeEngine:
    model = sharp_model(family)
    engine = SpeculativeEngine(
        Converted(model, None, FACTS), max_rows=max_rows, max_length=128, prefix_cache_tokens=num_tokens
    )
    engine._most_read = most_read
    return engine


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@given(
    rows=st.lists(
        st.tuples(st.sampled_from(BEGINNINGS), st.integers(0, 4 * PAGE), st.lists(st.integers(4, 20), max_size=20)),
        min_size=1,
        max_size=8,
    ),
    num_tokens=st.sampled_from([0, PAGE, 3 * PAGE, 8 * PAGE, 64 * PAGE]),
    most_read=st.sampled_from([20, 512]),
    temperature=st.sampled_from([0.0, 1.0]),
)
@settings(max_examples=12, deadline=None)
def test_texts_do_not_depend_on_what_is_held(
    family: str, rows: list[tuple], num_tokens: int, most_read: int, temperature: float
) -> None:
    jobs = [job_of([*beginning[:cut], *rest, 6], temperature=temperature) for beginning, cut, rest in rows]
    engine = engine_of(num_tokens, family, most_read=most_read)
    wanted = [dict(run(engine_of(0, family, max_rows=1), [job]))[0].ids for job in jobs]
    found = dict(run(engine, jobs))
    assert [found[index].ids for index in range(len(jobs))] == wanted
    if engine._prefixes is not None:
        assert engine._prefixes.num_tokens <= num_tokens


def test_a_beginning_that_rows_share_is_read_once() -> None:
    beginning = BEGINNINGS[0]
    engine = engine_of(16 * PAGE)
    ended = dict(run(engine, [job_of([*beginning, 6 + index]) for index in range(7)]))
    held = [ended[index].num_prefix_tokens for index in range(7)]
    assert held == [0] + [len(beginning)] * 6


def test_an_answer_is_held_for_the_turn_that_follows() -> None:
    engine = engine_of(16 * PAGE)
    prompt = BEGINNINGS[0][: 2 * PAGE]
    first = dict(run(engine, [job_of(prompt, 2 * PAGE)]))[0]
    again = dict(run(engine, [job_of([*prompt, *first.ids, 5])]))[0]
    assert again.num_prefix_tokens == (len(prompt) + len(first.ids) - 1) // PAGE * PAGE


def test_beginnings_that_are_not_used_give_way() -> None:
    engine = engine_of(4 * PAGE, max_rows=1)
    used, other = BEGINNINGS[0][: 2 * PAGE], [8] * 2 * PAGE
    for prompt in (used, other, used, [9] * 2 * PAGE, used):
        (ended,) = dict(run(engine, [job_of([*prompt, 5], 1)])).values()
    assert ended.num_prefix_tokens == len(used)
    (ended,) = dict(run(engine, [job_of([*other, 5], 1)])).values()
    assert ended.num_prefix_tokens == 0


def test_less_than_nothing_cannot_be_held() -> None:
    with pytest.raises(UserError, match="prefix_cache_tokens=-1"):
        engine_for(Converted(sharp_model(), None, FACTS), max_rows=1, max_length=8, prefix_cache_tokens=-1)
