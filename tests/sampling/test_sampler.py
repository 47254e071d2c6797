"""The order in which positions are kept, on models whose distributions are written by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from decausal.errors import UserError
from decausal.models.checkpoint import Converted
from decausal.sampling import selection
from decausal.sampling.bidirectional.row_engine import RowEngine
from decausal.sampling.drawing import choose, uniform_numbers
from decausal.sampling.generate import generate
from decausal.sampling.jobs import Job
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
from tests.families import tiny_tokenizer
from tests.sampling.denoising import Denoised, denoise
from tests.sampling.stand_ins import WrittenModel, conversion_facts, sure_of, written
from tests.sampling.tiny_models import converted

PROBABILITIES = [0.5, 0.92, 0.7, 0.97, 0.6]
VOCAB_SIZE = 6
"""Without the mask token, whose id this is."""
TABLE = [sure_of(position, probability, VOCAB_SIZE) for position, probability in enumerate(PROBABILITIES)]


def run(model: WrittenModel, num_open: list[int], mask_token_id: int = VOCAB_SIZE, **options: object) -> Denoised:
    """Denoises rows of one length whose first positions are open, the rest given as token 0."""
    length = len(model.logits_of(torch.zeros(1, 99, dtype=torch.long))[0])
    call = {name: options.pop(name) for name in ("end_token_ids", "on_step", "row_seeds") if name in options}
    is_open = torch.arange(length) < torch.tensor(num_open)[:, None]
    ids = torch.zeros(len(num_open), length, dtype=torch.long)
    settings = SamplerSettings().updated(**options)
    return denoise(model, conversion_facts(mask_token_id), ids, is_open, settings, **call)


def test_positions_are_kept_one_by_one_in_order_of_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    denoised = run(written(monkeypatch, TABLE), [5], num_steps=5)
    assert denoised.ids.tolist() == [[0, 1, 2, 3, 4]]
    assert denoised.step_of_token.tolist() == [[4, 1, 2, 0, 3]]


def test_positions_above_the_threshold_are_kept_together_and_then_the_best_one(monkeypatch: pytest.MonkeyPatch) -> None:
    denoised = run(written(monkeypatch, TABLE), [5], threshold=0.9)
    assert denoised.step_of_token.tolist() == [[3, 0, 1, 0, 2]]
    assert denoised.num_forwards.tolist() == [4]
    assert denoised.tokens_per_forward.tolist() == [5 / 4]


def test_a_confidence_equal_to_the_threshold_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    # Powers of two: the softmax of their logarithms is exact.
    denoised = run(written(monkeypatch, [[0.5, 0.25, 0.25]] * 3), [3], mask_token_id=3, threshold=0.5)
    assert denoised.num_forwards.tolist() == [1]


@pytest.mark.parametrize(
    ("confidence", "steps"), [("probability", [0, 1, 2]), ("margin", [1, 0, 2]), ("entropy", [0, 2, 1])]
)
def test_each_confidence_has_its_own_order(monkeypatch: pytest.MonkeyPatch, confidence: str, steps: list[int]) -> None:
    # By hand: probability .50 .44 .43; margin .05 .16 .01; entropy .86 1.07 1.01 nats.
    table = [[0.50, 0.45, 0.05], [0.44, 0.28, 0.28], [0.43, 0.42, 0.15]]
    denoised = run(written(monkeypatch, table), [3], mask_token_id=3, num_steps=3, confidence=confidence)
    assert denoised.step_of_token.tolist() == [steps]


def test_equal_confidences_are_kept_from_the_left(monkeypatch: pytest.MonkeyPatch) -> None:
    denoised = run(written(monkeypatch, [sure_of(1, 0.7, 4)] * 4), [4], mask_token_id=4, num_steps=2)
    assert denoised.step_of_token.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 7, 12])
def test_a_static_schedule_keeps_even_counts_that_sum_to_all(monkeypatch: pytest.MonkeyPatch, num_steps: int) -> None:
    num_open = 12
    table = [sure_of(1, 0.5 + position / 100, 4) for position in range(num_open)]
    denoised = run(written(monkeypatch, table), [num_open], mask_token_id=4, num_steps=num_steps)
    counts = denoised.step_of_token[0].bincount(minlength=num_steps)
    due = [-(-step * num_open // num_steps) for step in range(num_steps + 1)]
    assert counts.tolist() == [after - before for before, after in pairwise(due)]
    assert denoised.num_forwards.tolist() == [num_steps]


def test_more_steps_than_positions_keep_one_position_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = written(monkeypatch, TABLE)
    assert run(model, [5], num_steps=100).num_forwards.tolist() == [5]
    assert len(model.shapes) == 5


def test_each_row_has_its_own_schedule_and_finished_rows_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = written(monkeypatch, TABLE)
    denoised = run(model, [5, 0, 2], num_steps=4)
    assert denoised.num_forwards.tolist() == [4, 0, 2]
    assert [rows for rows, _ in model.shapes] == [2, 2, 1, 1]
    assert denoised.tokens_per_forward.tolist() == [5 / 4, 0, 1]


def test_the_mask_token_is_never_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    denoised = run(written(monkeypatch, TABLE), [5] * 64, num_steps=2, temperature=5.0)
    assert (denoised.ids < VOCAB_SIZE).all()


def test_a_row_ends_at_a_kept_end_token_with_nothing_open_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    end = 5
    order = [0.8, 0.6, 0.9, 0.7, 0.4, 0.3]
    tokens = [1, 2, end, 3, 4, end]
    table = [sure_of(token, probability, VOCAB_SIZE) for token, probability in zip(tokens, order, strict=True)]
    denoised = run(written(monkeypatch, table), [6], num_steps=6, end_token_ids=(end,))
    # The end comes first, but the row goes on until position 1 is kept; what was kept after the end is cut.
    assert denoised.ids.tolist() == [[1, 2, end, end, end, end]]
    assert denoised.step_of_token.tolist() == [[1, 3, 0, -1, -1, -1]]
    assert denoised.num_forwards.tolist() == [4]
    assert denoised.tokens_per_forward.tolist() == [3 / 4]


def test_a_given_end_token_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = written(monkeypatch, TABLE)
    ids = torch.tensor([[5, 0, 0, 0, 0]])
    is_open = torch.tensor([[False, True, True, True, True]])
    denoised = denoise(model, conversion_facts(VOCAB_SIZE), ids, is_open, SamplerSettings(), end_token_ids=(5,))
    assert denoised.ids.tolist() == [[5, 1, 2, 3, 4]]


def doubting_model(monkeypatch: pytest.MonkeyPatch) -> WrittenModel:
    """Says token 0 at position 0 while positions 1 and 2 are masked, and token 3 once one of them is known."""
    mask = 4
    alone = [sure_of(0, 0.9, 4), sure_of(1, 0.8, 4), sure_of(2, 0.3, 4)]
    first_kept = [sure_of(3, 0.7, 4), sure_of(1, 0.95, 4), sure_of(2, 0.5, 4)]
    all_but_first = [sure_of(3, 0.99, 4), sure_of(1, 0.95, 4), sure_of(2, 0.5, 4)]

    def logits_of(ids: Tensor) -> Tensor:
        tables = []
        for row in ids.tolist():
            table = alone if row[1:3] == [mask, mask] and row[0] == mask else first_kept
            tables.append(all_but_first if row[0] == mask and row[1] != mask else table)
        logits = torch.tensor(tables).log()
        return torch.cat([logits, torch.full_like(logits[..., :1], 50.0)], dim=-1)

    return WrittenModel(logits_of).install(monkeypatch, 5)


def test_remasking_opens_a_kept_token_that_the_model_no_longer_believes(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, is_open = torch.full((1, 3), 4), torch.ones(1, 3, dtype=torch.bool)
    settings = {remask: SamplerSettings(num_steps=3, remask=remask) for remask in (False, True)}
    kept, remasked = (
        denoise(doubting_model(monkeypatch), conversion_facts(4), ids, is_open, settings[remask])
        for remask in (False, True)
    )
    assert (kept.ids.tolist(), kept.step_of_token.tolist()) == ([[0, 1, 2]], [[0, 1, 2]])
    # Step 1 keeps two: token 0 has probability 0.1 by now, less than the candidates at 1 and 2.
    assert (remasked.ids.tolist(), remasked.step_of_token.tolist()) == ([[3, 1, 2]], [[2, 1, 1]])


def test_the_observer_sees_every_step_and_the_last_one_is_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, Tensor, Tensor, Tensor]] = []
    denoised = run(written(monkeypatch, TABLE), [5, 2], num_steps=4, on_step=lambda *frame: seen.append(frame))
    assert [step for step, *_ in seen] == [0, 1, 2, 3]
    for step, ids, is_open, newly_kept in seen:
        assert torch.equal(newly_kept, denoised.step_of_token == step)
        assert torch.equal(is_open, denoised.step_of_token > step)
        assert torch.equal(ids == VOCAB_SIZE, is_open)
    assert torch.equal(seen[-1][1], denoised.ids)


def test_the_head_runs_at_masked_positions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    plain_logits = selection.logits

    def counting_logits(states: Tensor, head: object) -> Tensor:
        counts.append(len(states))
        return plain_logits(states, head)

    model = written(monkeypatch, TABLE)
    monkeypatch.setattr(selection, "logits", counting_logits)
    run(model, [5, 3], num_steps=5)
    assert counts == [5 + 3, 4 + 2, 3 + 1, 2, 1]
    counts.clear()
    run(model, [5, 3], num_steps=5, remask=True)
    assert counts == [5 + 3, 5 + 3, 5 + 3, 5, 5]


def test_logits_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = written(monkeypatch, TABLE)
    whole = run(model, [5, 4, 3], num_steps=2, temperature=1.0)
    monkeypatch.setattr(selection, "LOGITS_PER_CHUNK", 2 * (VOCAB_SIZE + 1))
    chunked = run(model, [5, 4, 3], num_steps=2, temperature=1.0)
    assert torch.equal(whole.ids, chunked.ids)
    assert torch.equal(whole.step_of_token, chunked.step_of_token)


class CountOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("remask", [False, True])
def test_the_number_of_tensor_operations_does_not_grow_with_the_batch(
    monkeypatch: pytest.MonkeyPatch, remask: bool
) -> None:
    model, settings = (
        written(monkeypatch, TABLE),
        SamplerSettings(num_steps=3, temperature=1.0, top_p=0.9, remask=remask),
    )
    counts = []
    for num_rows in (2, 32):
        made = Converted(model, tiny_tokenizer(), conversion_facts(VOCAB_SIZE))
        engine = RowEngine(made, max_rows=num_rows, max_length=5)
        for _ in range(num_rows):
            engine.submit(Job(Row(([], []), (5,), "the row"), settings, 0, (99,)))
        engine.step()
        with CountOperations() as operations:
            engine.step()
        counts.append(operations.count)
    assert counts[0] == counts[1]


def test_sampled_tokens_follow_the_models_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.08, 0.02])
    num_rows, temperature = 8000, 1.5
    model = written(monkeypatch, [probabilities.tolist()] * 2)
    denoised = run(model, [2] * num_rows, mask_token_id=5, num_steps=1, temperature=temperature, seed=11)
    expected = (probabilities.log() / temperature).softmax(-1) * num_rows
    for position in range(2):
        counts = denoised.ids[:, position].bincount(minlength=5)
        assert ((counts - expected) ** 2 / expected).sum() < 18.47  # chi-square, 4 degrees of freedom, 0.999
    first, second = denoised.ids.float().T
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 4 / num_rows**0.5


def test_seeds_repeat_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    model = written(monkeypatch, [[0.25] * 4] * 5)
    options = {"mask_token_id": 4, "num_steps": 2, "temperature": 1.0}
    first, again, other = (run(model, [5] * 8, seed=seed, **options).ids for seed in (0, 0, 100))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(set(map(tuple, first.tolist()))) > 4


def test_every_token_is_the_draw_of_its_seed_step_and_position(monkeypatch: pytest.MonkeyPatch) -> None:
    uniform = torch.full((1, 16), 1 / 16)
    denoised = run(written(monkeypatch, uniform.tolist() * 6), [6] * 3, mask_token_id=16, num_steps=6, temperature=1.0)
    for row in range(3):
        for position in range(6):
            step = int(denoised.step_of_token[row, position])
            numbers = uniform_numbers(torch.tensor([row]), step, torch.tensor([position]))
            assert denoised.ids[row, position] == choose(uniform.log(), numbers, temperature=1.0)


def test_row_i_draws_from_seed_plus_i(monkeypatch: pytest.MonkeyPatch) -> None:
    model = written(monkeypatch, [[0.25] * 4] * 5)
    options = {"mask_token_id": 4, "num_steps": 2, "temperature": 1.0}
    assert torch.equal(run(model, [5] * 8, seed=7, **options).ids[3:4], run(model, [5], seed=10, **options).ids)


def test_the_model_is_in_eval_mode_for_the_call_alone() -> None:
    model = converted()
    modes: list[bool] = []
    hook = model.model.base_model.register_forward_hook(lambda *_: modes.append(model.model.training))
    model.model.train()
    generate(model, "x = ", max_new_tokens=5, num_steps=2)
    hook.remove()
    assert modes == [False, False]
    assert model.model.training


def test_block_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = conversion_facts(VOCAB_SIZE, layout="block", block_size=4)
    is_open = torch.ones(1, 5, dtype=torch.bool)
    with pytest.raises(UserError, match="block by block"):
        denoise(written(monkeypatch, TABLE), facts, torch.zeros(1, 5, dtype=torch.long), is_open, SamplerSettings())


@pytest.mark.parametrize(("shift", "position", "is_refused"), [(1, 0, True), (1, 1, False), (0, 0, False)])
def test_positions_that_no_state_predicts_are_refused(
    monkeypatch: pytest.MonkeyPatch, shift: int, position: int, is_refused: bool
) -> None:
    is_open, ids = torch.arange(5)[None] == position, torch.zeros(1, 5, dtype=torch.long)
    facts, model = conversion_facts(VOCAB_SIZE, shift=shift), written(monkeypatch, TABLE)
    if is_refused:
        with pytest.raises(UserError, match="row 0 begins with a gap"):
            denoise(model, facts, ids, is_open, SamplerSettings())
    else:
        denoise(model, facts, ids, is_open, SamplerSettings())
