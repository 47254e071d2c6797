"""Self-speculation as generate offers it: the causal model's text, its end, its stops, and what it goes with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from decausal.errors import UserError
from decausal.models.checkpoint import Converted
from decausal.sampling.blocks.engine import BlockEngine
from decausal.sampling.engines import engine_for
from decausal.sampling.filling.infilling import infill
from decausal.sampling.generate import generate
from decausal.sampling.jobs import Engine, Job, Progress, run
from decausal.sampling.model import DiffusionModel
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.stopping import end_token_ids
from decausal.sampling.texts import prompt_ids
from tests.sampling.block_decoding import job_of
from tests.sampling.denoising import in_order
from tests.sampling.tiny_models import converted

PROMPTS = ["def area(width, height):", "import", "x = [1, 2"]


@pytest.fixture(scope="module")
def model() -> Converted:
    return converted(layout="block", block_size=4)


def test_text_is_what_the_weights_write_under_causal_attention(model: Converted) -> None:
    causal = Converted(model.model, model.tokenizer, replace(model.facts, layout="causal", block_size=None))
    found = generate(model, PROMPTS, max_new_tokens=13, speculative=True)
    assert [row.ids for row in found] == [_greedy(causal, prompt, 13) for prompt in PROMPTS]


def _greedy(causal: Converted, prompt: str, max_new_tokens: int) -> list[int]:
    engine = BlockEngine(causal.model, causal.facts, max_rows=1)
    ids = causal.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    settings = SamplerSettings(max_new_tokens=max_new_tokens)
    (row,) = in_order(engine, [job_of(ids, settings, ends=(causal.tokenizer.eos_token_id,))])
    return row.ids


def test_a_stop_text_cuts_where_it_does_token_by_token(model: Converted) -> None:
    whole = generate(model, PROMPTS[0], max_new_tokens=20, speculative=True, draft="quadratic")
    stop = whole.text[4:7]
    cut = generate(model, PROMPTS[0], max_new_tokens=20, speculative=True, draft="quadratic", stop=stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.ids == whole.ids[: len(cut.ids)]


def test_rows_draw_from_their_own_seeds(model: Converted) -> None:
    options = {"max_new_tokens": 9, "temperature": 1.0, "speculative": True, "draft": "quadratic"}
    together = generate(model, PROMPTS, seed=5, batch_size=2, **options)
    assert together == [generate(model, prompt, seed=5 + row, **options) for row, prompt in enumerate(PROMPTS)]


def test_a_stop_text_in_the_pass_that_reaches_the_limit_counts_as_one(model: Converted) -> None:
    whole = generate(model, PROMPTS[0], max_new_tokens=12, speculative=True, draft="quadratic")
    cut = generate(model, PROMPTS[0], max_new_tokens=12, speculative=True, draft="quadratic", stop=whole.text[-1:])
    assert cut.finish_reason == "stop"


@pytest.mark.parametrize("facts", [{"layout": "block", "block_size": 4}, {"shift": 0}], ids=["block", "bidirectional"])
def test_every_request_of_a_mixed_queue_ends_as_alone(facts: dict) -> None:
    model = converted(**facts)
    verified = {"speculative": True, "draft": "quadratic"}  # whose passes do not hang on time
    kinds = [{"num_steps": 2}, verified, {**verified, "temperature": 1.0}, {"temperature": 0.7}]
    wanted, jobs = [], []
    for index in range(11):
        text, options, count = PROMPTS[index % 3], kinds[index % 4], 3 + index % 6
        options |= {"stop": "e"} if index % 5 == 4 else {}
        wanted.append(generate(model, text, max_new_tokens=count, seed=index, **options))
        row = Row((prompt_ids(model, text), []), (count,), "the prompt")
        jobs.append(Job(row, SamplerSettings().updated(**options), index, end_token_ids(model)))
    engine = engine_for(model, max_rows=2, max_length=64)
    dropped = engine.submit(jobs[1])
    ended = dict(run(_Cancelling(engine, dropped), jobs))
    assert engine.num_running == engine.num_waiting == 0
    for index, generation in enumerate(wanted):
        found = ended[index]
        assert (found.ids, found.step_of_token) == (generation.ids, generation.step_of_token)
        assert (found.num_forwards, found.reason) == (generation.num_forwards, generation.finish_reason)


class _Cancelling:
    """An engine whose first step is followed by the end of one row."""

    def __init__(self, engine: Engine, ticket: int) -> None:
        self.engine, self.ticket = engine, ticket

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def step(self) -> list[Progress]:
        reported = [progress for progress in self.engine.step() if progress.ticket != self.ticket]
        self.engine.cancel(self.ticket)
        return reported


def test_a_batch_gives_what_generate_does(model: Converted) -> None:
    options = {"max_new_tokens": 7, "seed": 3, "temperature": 0.8, "speculative": True, "draft": "quadratic"}
    found = list(DiffusionModel(model).engine(max_rows=2).run(PROMPTS, **options))
    assert found == generate(model, PROMPTS, **options)


def test_a_line_of_a_batch_file_may_ask_for_it(model: Converted, tmp_path: Path) -> None:
    options = {"max_new_tokens": 7, "seed": 3, "num_steps": 2}
    lines = [{"prompt": text, **({"speculative": True} if row else {})} for row, text in enumerate(PROMPTS)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    DiffusionModel(model).run_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", **options)
    answers = [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    drafting = [{"speculative": True} if row else {"num_steps": 2} for row in range(len(PROMPTS))]
    assert answers == [
        generate(model, text, max_new_tokens=7, seed=3 + row, **drafting[row]).text for row, text in enumerate(PROMPTS)
    ]


def test_it_is_refused_where_rows_are_denoised(model: Converted) -> None:
    bidirectional = converted()
    with pytest.raises(UserError, match="speculative"):
        infill(bidirectional, "a", "b", 3, speculative=True)
    with pytest.raises(UserError, match="speculative"):
        BlockEngine(model.model, model.facts, max_rows=1).submit(job_of([5], SamplerSettings(speculative=True)))
    causal = Converted(model.model, model.tokenizer, replace(model.facts, layout="causal", block_size=None))
    options = {"max_new_tokens": 4, "speculative": True}
    with pytest.raises(UserError, match="causal"):
        generate(causal, "a", **options)
    gap = Job(Row(([5], [6]), (2,), "the text"), SamplerSettings(speculative=True), 0)
    with pytest.raises(UserError, match="after a gap"):
        engine_for(bidirectional, max_rows=1, max_length=9).submit(gap)
    with pytest.raises(UserError, match="mask token"):
        generate(model, model.tokenizer.mask_token, **options)
