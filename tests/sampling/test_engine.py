"""The block engine from outside: queue and refill, ends and stop texts, counts, live models, and every refusal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from decausal.errors import UserError
from decausal.sampling import selection
from decausal.sampling.blocks.engine import BlockEngine
from decausal.sampling.jobs import Job
from decausal.sampling.settings import SamplerSettings
from tests.families import FAMILIES, MAX_LENGTH, tiny_tokenizer
from tests.sampling.block_decoding import MASK, block_facts, job_of, sharp_model
from tests.sampling.denoising import drained, in_order
from tests.sampling.stand_ins import conversion_facts

MODEL = sharp_model()
FACTS = block_facts(4)
PROMPT = [7, 5, 9, 11, 4]
OWN = SamplerSettings(max_new_tokens=10, num_steps=2)


def engine(facts: Any = FACTS, model: Any = MODEL, **options: Any) -> BlockEngine:
    return BlockEngine(model, facts, **{"max_rows": 3, **options})


def prompt_of(index: int) -> list[int]:
    return [4 + (index * 7 + place) % 15 for place in range(1 + index % 6)]


def test_every_pass_of_the_model_is_counted_and_no_other() -> None:
    made = engine(max_rows=1)
    calls: list[int] = []
    hook = MODEL.base_model.register_forward_hook(lambda *call: calls.append(1))
    (row,) = in_order(made, [job_of(PROMPT, OWN)])
    hook.remove()
    # The prompt's tail leaves 3 positions of the first block, then 2 whole blocks: 2 steps each.
    assert row.num_forwards == len(calls) == 6
    assert row.tokens_per_forward == 10 / 6
    assert row.step_of_token == [
        step + 2 * (block - 1) for block, step in zip(row.blocks.of_token, row.blocks.step_of_token, strict=True)
    ]


def test_places_are_filled_as_rows_finish() -> None:
    made = engine(max_rows=2)
    for number in (3, 14, 6, 1):
        made.submit(job_of(PROMPT, replace(OWN, max_new_tokens=number)))
    in_use, order = [], []
    while made.num_running:
        steps = made.step()
        in_use.append(len(steps))
        order += [step.ticket for step in steps if step.ended]
    assert order == [0, 2, 3, 1]
    assert in_use[:-1] == [2] * (len(in_use) - 1)


def test_rows_with_other_end_tokens_share_a_batch() -> None:
    (whole,) = in_order(engine(), [job_of(PROMPT, replace(OWN, max_new_tokens=24))])
    ends = [(), (whole.ids[3],), (whole.ids[9], MASK - 1), (whole.ids[6],)]
    jobs = [job_of(PROMPT, replace(OWN, max_new_tokens=24), ends=each) for each in ends]
    assert in_order(engine(max_rows=2), jobs) == [in_order(engine(), [job])[0] for job in jobs]
    assert [row.reason for row in in_order(engine(), jobs)] == ["length", "end", "end", "end"]


def test_a_cancelled_row_leaves_no_trace() -> None:
    rows = [job_of(prompt_of(index), replace(OWN, max_new_tokens=6 + index)) for index in range(5)]
    expected = in_order(engine(), rows)
    made = engine()
    tickets = [made.submit(row) for row in rows]
    made.step()
    made.step()
    made.cancel(tickets[1])  # running
    made.cancel(tickets[4])  # waiting
    made.cancel(tickets[4])  # nothing any more
    assert (made.num_running, made.num_waiting) == (3, 0)
    assert drained(made) == {tickets[index]: expected[index] for index in (0, 2, 3)}


def test_a_row_ends_with_the_end_token_once_all_before_it_is_kept() -> None:
    long = in_order(engine(), [job_of(PROMPT, replace(OWN, max_new_tokens=24))])
    (row,) = long
    for end in sorted(set(row.ids)):
        first = row.ids.index(end)
        (ended,) = in_order(engine(), [job_of(PROMPT, replace(OWN, max_new_tokens=24), ends=(MASK - 1, end))])
        assert ended.ids[-1] == end
        assert ended.reason == "end"
        assert end not in ended.ids[:-1]
        if ended.ids[:-1] == row.ids[:first]:
            assert ended.num_forwards <= row.num_forwards


def test_an_end_token_in_the_prompt_ends_nothing() -> None:
    (plain,) = in_order(engine(), [job_of([5, 7, 9], OWN)])
    ends = tuple({5, 7, 9} - set(plain.ids))
    assert ends
    (row,) = in_order(engine(), [job_of([5, 7, 9], OWN, ends=ends)])
    assert row.ids == plain.ids


def test_positions_after_a_kept_end_are_no_longer_eligible(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is surest of the third position, which ends the row: the fourth is never decided."""
    sure = torch.tensor([0.6, 0.7, 0.9, 0.5])
    made = engine(block_facts(4, shift=0), max_rows=1)
    tokens = torch.tensor([5, 6, 3, 8])
    counts: list[int] = []

    def propose(states: Tensor, head: Any, own: Any, numbers: Any) -> tuple[Tensor, Tensor]:
        index = made._rows.is_eligible[0].nonzero().squeeze(1)
        counts.append(len(states))
        return tokens[index], sure[index]

    monkeypatch.setattr("decausal.sampling.blocks.keeping.propose", propose)
    (row,) = in_order(made, [job_of([4] * 4, SamplerSettings(max_new_tokens=8, num_steps=4), ends=(3,))])
    assert (row.ids, row.blocks.step_of_token, row.reason) == ([5, 6, 3], [2, 1, 0], "end")
    assert (row.blocks.ids, row.blocks.steps) == ([5, 6, 3, MASK], [2, 1, 0, -1])
    assert counts == [4, 2, 1]


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_stop_text_ends_a_row_with_the_token_that_completes_it(block_size: int) -> None:
    model, tokenizer = FAMILIES["qwen3"](vocab_size=300), tiny_tokenizer()
    facts = replace(block_facts(block_size), mask_token_id=299)
    prompt = tokenizer("x = ")["input_ids"]
    make = lambda: BlockEngine(model, facts, max_rows=2, tokenizer=tokenizer)  # noqa: E731
    own = SamplerSettings(max_new_tokens=24, temperature=3.0, threshold=0.5, top_k=200)
    (whole,) = in_order(make(), [job_of(prompt, own)])
    texts = [tokenizer.decode(whole.ids[:number]) for number in range(25)]
    stops = [texts[last][len(texts[first]) :] for first, last in ((2, 3), (5, 9), (11, 13), (20, 24))]
    stops = [stop for stop in stops if stop and "\ufffd" not in stop]
    assert stops
    for stop in stops:
        (row,) = in_order(make(), [job_of(prompt, replace(own, stop=("no such text", stop)))])
        expected = next(number for number in range(25) if stop in texts[number])
        assert (row.ids, row.reason) == (whole.ids[:expected], "stop")


def test_logits_are_made_at_masked_positions_of_the_current_blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    plain = selection.logits
    monkeypatch.setattr(selection, "logits", lambda states, head: counts.append(len(states)) or plain(states, head))
    rows = [
        job_of([5] * 6, replace(OWN, max_new_tokens=6, num_steps=4)),
        job_of([5] * 4, replace(OWN, max_new_tokens=4)),
    ]
    in_order(engine(), rows)
    # Two open positions one by one, then a block one by one; beside them four in two steps.
    assert counts == [2 + 4, 1 + 2, 4, 3, 2, 1]


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("own", [OWN, SamplerSettings(max_new_tokens=9, threshold=0.5, temperature=1.0, top_p=0.9)])
def test_operators_of_a_pass_do_not_grow_with_the_batch(own: SamplerSettings) -> None:
    counts = []
    for num_rows in (2, 16):
        made = engine(max_rows=num_rows, max_length=32)
        made._reader.free_padding = 10**9
        for _ in range(num_rows):
            made.submit(job_of(PROMPT, own, ends=(3,)))
        made.step()
        with Operations() as operations:
            made.step()
        counts.append(operations.count)
    assert counts[0] == counts[1]


def test_the_weights_are_the_models_own_and_it_is_left_in_training() -> None:
    model = sharp_model("llama", attention_dropout=0.5).train()
    made = engine(model=model)
    before = in_order(made, [job_of(PROMPT, OWN)])[0].ids
    assert before == in_order(engine(model=model), [job_of(PROMPT, OWN)])[0].ids  # without dropout
    assert model.training
    with torch.no_grad():
        for weight in model.base_model.layers.parameters():
            weight.mul_(1.5)
    after = in_order(made, [job_of(PROMPT, OWN)])[0].ids
    assert after == in_order(engine(model=model), [job_of(PROMPT, OWN)])[0].ids
    assert after != before
    for row in in_order(made, [job_of(PROMPT, OWN)]):
        assert torch.is_grad_enabled()
        assert row.ids == after


def test_adapters_take_part() -> None:
    model = sharp_model("llama")
    before = in_order(engine(model=model), [job_of(PROMPT, OWN)])[0].ids
    wrapped = get_peft_model(
        model, LoraConfig(r=4, target_modules=["v_proj", "o_proj"], init_lora_weights=False)
    ).double()
    assert in_order(engine(model=wrapped), [job_of(PROMPT, OWN)])[0].ids != before
    with wrapped.disable_adapter():
        assert in_order(engine(model=wrapped), [job_of(PROMPT, OWN)])[0].ids == before


def test_memory_that_is_taken_at_once_stays_where_it_is() -> None:
    made = engine(max_rows=2, max_length=32)
    in_order(made, [job_of(PROMPT, OWN)])
    held = [tensor.data_ptr() for layer in made._cache.layers for tensor in (layer.keys, layer.values)]
    in_order(made, [job_of(prompt_of(index), OWN) for index in range(5)])
    assert held == [tensor.data_ptr() for layer in made._cache.layers for tensor in (layer.keys, layer.values)]


REFUSED = {
    "remasking": (job_of(PROMPT, SamplerSettings(remask=True, max_new_tokens=4)), "remask"),
    "a mask in the prompt": (job_of([5, MASK], OWN), "holds the mask token"),
    "nothing to start from": (job_of([], OWN), "with shift 1 the first token cannot be predicted"),
    "a prompt that leaves no block": (job_of([5] * MAX_LENGTH, OWN), f"shorten it to {MAX_LENGTH - 1} tokens"),
    "more than fits": (job_of([5] * 10, SamplerSettings(max_new_tokens=60)), f"write at most {MAX_LENGTH - 10}"),
    "a stop text without tokenizer": (job_of(PROMPT, SamplerSettings(stop=("x",))), "need a tokenizer"),
}


@pytest.mark.parametrize(("job", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_requests_are_refused_before_any_pass(job: Job, message: str) -> None:
    made = engine()
    with pytest.raises(UserError, match=message):
        made.submit(job)
    assert made.num_running == made.num_waiting == 0


def test_bad_engines_are_refused() -> None:
    with pytest.raises(UserError, match="max_rows=0"):
        engine(max_rows=0)
    with pytest.raises(UserError, match="max_length=65 is over the model's context of 64"):
        engine(max_length=65)
    with pytest.raises(UserError, match="a block of 4 tokens does not fit into 3"):
        engine(max_length=3)
    with pytest.raises(UserError, match="layout 'bidirectional': it is not decoded in blocks"):
        engine(conversion_facts(MASK))


def test_a_context_that_is_no_multiple_of_the_block_is_used_up_to_its_last_whole_block() -> None:
    made = engine(block_facts(5), max_length=19)
    own = SamplerSettings(max_new_tokens=10)
    assert len(in_order(made, [job_of([5] * 5, own)])[0].ids) == 10
    with pytest.raises(UserError, match="only 15 fit, in blocks of 5: write at most 9"):
        made.submit(job_of([5] * 6, own))


def test_an_empty_prompt_is_enough_without_shift() -> None:
    (row,) = in_order(engine(block_facts(4, shift=0)), [job_of([], OWN)])
    assert len(row.ids) == 10
    assert row.blocks.of_token == [0] * 4 + [1] * 4 + [2] * 2
