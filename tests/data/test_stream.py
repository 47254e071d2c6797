"""The training stream: everything random is a function of (seed, position), and batches hold exact index sets."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decausal.data.encode import encode
from decausal.data.packing import pack
from decausal.data.stream import Collator, Noising, TrainingStream
from tests.families import tiny_tokenizer
from tests.runs import T, uneven_rows

MASK = 300


def stream(*, noising: Noising | None = None, shift: int = 1, seed: int = 0, rows=None) -> TrainingStream:
    return TrainingStream(rows or uneven_rows(), 64, seed=seed, shift=shift, noising=noising or Noising())


def assert_same_item(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@given(st.lists(st.integers(0, 63), min_size=1, max_size=6), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_an_item_depends_on_seed_and_position_alone(positions, seed):
    used, fresh = stream(seed=seed), stream(seed=seed)
    torch.manual_seed(positions[0])
    for position in positions:
        used[position]
    assert_same_item(used[positions[-1]], fresh[positions[-1]])


def test_seeds_and_positions_give_different_rows_and_masks():
    masks = [stream(seed=seed)[position]["is_masked"] for seed in (0, 1) for position in (0, 16, 32)]
    assert len({mask.numpy().tobytes() for mask in masks}) == len(masks)


def test_every_epoch_holds_every_row_once_in_another_order():
    this = stream()
    orders = [[this.row_index(epoch * 16 + offset) for offset in range(16)] for epoch in range(4)]
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_reading_backwards_over_an_epoch_gives_the_same_rows():
    this = stream()
    forwards = [this.row_index(position) for position in range(64)]
    assert [this.row_index(position) for position in reversed(range(64))] == forwards[::-1]


def test_a_data_loaders_workers_read_the_same_items():
    for position in (0, 17):
        assert_same_item(pickle.loads(pickle.dumps(stream()))[position], stream()[position])


@pytest.mark.parametrize("shift", [0, 1])
def test_only_predictable_tokens_are_masked(shift):
    this = stream(shift=shift)
    for position in range(16):
        item, row = this[position], this.rows[this.row_index(position)]
        is_first = torch.ones(T, dtype=torch.bool)
        is_first[1:] = row["document_ids"][1:] != row["document_ids"][:-1]
        expected = row["is_maskable"] & ~is_first if shift == 1 else row["is_maskable"]
        assert torch.equal(item["is_predictable"], expected & (row["document_ids"] >= 0))
        assert not (item["is_masked"] & ~item["is_predictable"]).any()


def test_complementary_views_mask_every_predictable_token_exactly_once_per_pair():
    this = stream(noising=Noising(2, complementary=True))
    for position in range(16):
        item = this[position]
        assert torch.equal(item["is_masked"].sum(0), item["is_predictable"].long())
        inside = item["clean_ids"].new_ones(T).bool() & (this.rows[this.row_index(position)]["document_ids"] >= 0)
        torch.testing.assert_close(item["level"].sum(0)[inside], torch.ones(int(inside.sum())))


def test_independent_views_are_not_complementary():
    item = stream(noising=Noising(2))[1]
    assert not torch.equal(item["is_masked"].sum(0), item["is_predictable"].long())


def mean_levels(noising: Noising) -> np.ndarray:
    rows = [{"clean_ids": torch.zeros(2, dtype=torch.int64), "document_ids": torch.zeros(2, dtype=torch.int64)}]
    rows = [row | {"is_maskable": torch.ones(2, dtype=torch.bool)} for row in rows]
    this = TrainingStream(rows, 4096, seed=0, shift=0, noising=noising)
    levels = torch.stack([this[position]["level"][0, 0] for position in range(256)])
    return levels.reshape(-1, 16).mean(1).numpy()


def test_stratified_levels_spread_over_every_run_of_16_rows():
    spread = {is_stratified: mean_levels(Noising(stratified=is_stratified)).std() for is_stratified in (True, False)}
    assert spread[True] < 0.035
    assert spread[False] > 0.05  # independent: 0.29 / 4


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("views", [1, 2])
def test_target_indices_name_the_states_that_predict_the_masked_tokens(shift, views):
    this = stream(noising=Noising(views), shift=shift)
    items = [this[position] for position in range(4)]
    batch = Collator(MASK, shift)(items)
    is_masked = torch.stack([item["is_masked"] for item in items]).reshape(-1, T)
    clean = torch.stack([item["clean_ids"] for item in items]).repeat_interleave(views, dim=0)
    assert torch.equal(batch["noised_ids"], torch.where(is_masked, MASK, clean))
    token = batch["target_index"] + shift
    assert torch.equal(token, is_masked.flatten().nonzero()[:, 0])
    assert torch.equal(batch["target_ids"], clean.flatten()[token])
    assert (batch["noised_ids"].flatten()[token] == MASK).all()
    assert batch["counts"]["tokens"] == batch["counts"]["aligned"] == is_masked.sum()


@pytest.mark.parametrize("aligned_positions", ["targets", "visible", "all"])
def test_aligned_positions_are_those_named(aligned_positions):
    this = stream(noising=Noising(2))
    items = [this[position] for position in range(4)]
    batch = Collator(MASK, 1, aligned_positions=aligned_positions)(items)
    is_masked = torch.stack([item["is_masked"] for item in items]).reshape(-1, T)
    is_real = (torch.stack([item["document_ids"] for item in items]) >= 0).repeat_interleave(2, dim=0)
    is_aligned = torch.zeros(8 * T, dtype=torch.bool)
    is_aligned[batch["aligned_index"]] = True
    expected = {"targets": torch.roll(is_masked.flatten(), -1), "visible": (is_real & ~is_masked).flatten()}
    assert torch.equal(is_aligned, expected.get(aligned_positions, is_real.flatten()))
    assert batch["counts"]["aligned"] == is_aligned.sum()
    aligned_clean = batch["clean_ids"].repeat_interleave(2, dim=0).flatten()[batch["aligned_index"]]
    assert torch.equal(batch["clean_ids"].flatten()[batch["teacher_index"]], aligned_clean)


def test_documents_and_positions_are_left_out_only_where_rows_are_whole_documents():
    rows = uneven_rows()
    for row in rows:
        row["document_ids"] = torch.zeros(T, dtype=torch.int64)
    whole, packed = stream(rows=rows), stream()
    assert "document_ids" not in Collator(MASK, 1)([whole[0], whole[1]])
    batch = Collator(MASK, 1)([whole[0] | {"document_ids": packed[0]["document_ids"]}, whole[1]])
    assert {"document_ids", "position_ids"} <= batch.keys()


def test_autoregressive_batches_have_every_predictable_token_as_a_target_and_no_mask():
    this = TrainingStream(uneven_rows(), 8, seed=0, shift=1, noising=None)
    items = [this[position] for position in range(4)]
    batch = Collator(MASK, 1, predict_all=True)(items)
    assert torch.equal(batch["noised_ids"], batch["clean_ids"])
    assert torch.equal(
        batch["target_index"] + 1, torch.stack([i["is_predictable"] for i in items]).flatten().nonzero()[:, 0]
    )
    assert (batch["target_weight"] == 1).all()


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("kl_mean", ["token", "sequence"])
def test_the_teachers_distribution_is_asked_for_where_it_predicts_the_target(shift, kl_mean):
    this = stream(noising=Noising(2), shift=shift)
    items = [this[position] for position in range(4)]
    batch = Collator(MASK, shift, kl_mean=kl_mean)(items)
    weights, sequences = iter(batch["logit_weight"].tolist()), 0
    index = iter(batch["next_token_index"].tolist())
    for row, item in enumerate(items):
        documents = item["document_ids"].tolist()
        for is_masked in item["is_masked"].tolist():
            targets = [column for column, masked in enumerate(is_masked) if masked]
            for column in targets:
                has_previous = column > 0 and documents[column - 1] == documents[column]
                of_sequence = [
                    other
                    for other in targets
                    if documents[other] == documents[column] and other != documents.index(documents[other])
                ]
                expected = has_previous / (len(of_sequence) if kl_mean == "sequence" and has_previous else 1)
                assert next(weights) == pytest.approx(expected)
                assert next(index) == row * T + column - has_previous
            sequences += len({documents[c] for c in targets if c != documents.index(documents[c])})
    expected = sequences if kl_mean == "sequence" else (batch["logit_weight"] > 0).sum()
    assert batch["counts"]["next_tokens"] == pytest.approx(float(expected))


def test_a_prompts_tokens_are_never_masked_and_never_targets():
    tokenizer = tiny_tokenizer()
    prompts, answers = [f"say {n}: " for n in range(8)], [f"the {n}th answer" for n in range(8)]
    encoded = [
        encode({"origin": f"test:{n}", "prompt": prompt, "completion": answer}, tokenizer)
        for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    rows = [
        {
            "clean_ids": torch.from_numpy(row.clean_ids.astype(np.int64)),
            "document_ids": torch.from_numpy(row.document_ids.astype(np.int64)),
            "is_maskable": torch.from_numpy(row.is_maskable),
        }
        for row in pack(encoded, 64, 0)
    ]
    this = stream(rows=rows, noising=Noising(2, complementary=True))
    batch = Collator(MASK, 1)([this[position] for position in range(len(rows))])
    is_noised = (batch["noised_ids"] == MASK).reshape(len(rows), 2, 64).any(1)
    trained_text = "".join(tokenizer.decode(row[mask]) for row, mask in zip(batch["clean_ids"], is_noised, strict=True))
    assert "say" not in trained_text
    assert trained_text.replace(tokenizer.eos_token, "").count("answer") == 8
    assert torch.equal(is_noised, torch.stack([this[p]["is_predictable"] for p in range(len(rows))]))
