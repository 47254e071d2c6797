"""Gaps of unknown length in an engine, beside rows that have nothing to do with them."""

from __future__ import annotations

import pytest

from decausal.models.checkpoint import Converted
from decausal.sampling.bidirectional.row_engine import RowEngine
from decausal.sampling.filling.lengths import GappedText
from decausal.sampling.filling.searching import SearchingEngine, SearchJob
from decausal.sampling.jobs import Job
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.texts import prompt_ids
from tests.sampling.tiny_models import converted

MODEL = converted()
SETTINGS = SamplerSettings(num_steps=3)


def engine(max_rows: int = 4) -> SearchingEngine:
    return SearchingEngine(RowEngine(MODEL, max_rows=max_rows, max_length=48), MODEL, max_rows)


def search_job(model: Converted = MODEL, seed: int = 0, search: str = "candidates") -> SearchJob:
    given = (prompt_ids(model, "def f("), prompt_ids(model, "):\n"))
    text = GappedText(given, (None,), "the text", seed)
    return SearchJob(text.row((6,)), SETTINGS, seed, text=text, longest=6, length_search=search)


def plain_job() -> Job:
    return Job(Row((prompt_ids(MODEL, "import"), []), (6,), "the prompt"), SETTINGS, 3)


@pytest.mark.parametrize("max_rows", [2, 4])
def test_other_rows_take_no_step_more_for_searches_that_came_before_them(max_rows: int) -> None:
    own = engine(max_rows)
    for seed in range(3):
        own.submit(search_job(seed=seed))
    ticket = own.submit(plain_job())
    for _ in range(3):  # the row's own steps
        reported = {progress.ticket: progress for progress in own.step()}
    assert reported[ticket].ended is not None


@pytest.mark.parametrize("search", ["candidates", "grow"])
def test_a_search_that_is_given_up_leaves_nothing_whenever_that_is(search: str) -> None:
    own = engine()
    other = own.submit(search_job(seed=1, search=search))
    given_up = []
    while own.num_running or own.num_waiting:
        ticket = own.submit(search_job(search=search))
        seen = {progress.ticket for _ in range(len(given_up) + 1) for progress in own.step()}
        assert seen <= {ticket, other}
        own.cancel(ticket)
        own.cancel(ticket)
        given_up.append(ticket in seen)
    assert given_up[0] is False
    assert own.step() == []
