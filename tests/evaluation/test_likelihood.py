"""Likelihood: the estimate equals enumeration, hand counts and transformers' own loss; masks depend on nothing else."""

from __future__ import annotations

import json
import math
from itertools import combinations

import pytest
import torch

from decausal.diffusion.nelbo import nelbo_exact
from decausal.errors import UserError
from decausal.evaluation import likelihood
from decausal.evaluation.checkpoint import evaluate_checkpoint
from decausal.evaluation.likelihood import evaluate_ar_nll, evaluate_nll
from decausal.evaluation.passes import predicted_tokens
from decausal.evaluation.results import beside, nelbo_difference
from decausal.models.backbone import body_forward, head_of
from decausal.models.checkpoint import save_converted
from decausal.models.facts import ConversionFacts
from decausal.objectives import head as output_head
from tests.evaluation.rows import alone, converted, packed_row
from tests.families import FAMILIES, tiny_tokenizer

PACKED = [packed_row(7, 5, padding=2), packed_row(14, seed=1), packed_row(1, 4, 9, seed=2)]
layouts = pytest.mark.parametrize(("layout", "shift"), [("bidirectional", 1), ("bidirectional", 0), ("causal", 1)])


def _token_log_probs(model, facts, row):
    """log p of each token of a one-document row, given a mask pattern."""
    head = head_of(model)._replace(banned=facts.mask_token_id)
    clean_ids, length = row["clean_ids"], len(row["clean_ids"])

    @torch.no_grad()
    def log_probs(is_masked):
        noised_ids = clean_ids.expand_as(is_masked).masked_fill(is_masked, facts.mask_token_id)
        fill = -length % (facts.block_size or 1)  # masks that fill the last block, as in sampling
        noised_ids = torch.nn.functional.pad(noised_ids, (0, fill), value=facts.mask_token_id)
        hidden = body_forward(model, noised_ids, facts.attention).last_hidden_state[:, :length]
        logits = output_head.logits(hidden.flatten(0, 1), head).unflatten(0, is_masked.shape)
        of_tokens = logits.log_softmax(-1).roll(facts.shift, dims=1)
        return of_tokens[:, torch.arange(length), clean_ids]

    return log_probs


@layouts
def test_the_mean_is_the_nelbo_by_enumeration(layout, shift):
    model, facts, tokenizer = converted(layout=layout, shift=shift)
    row = packed_row(6)
    found = evaluate_nll(model, facts, [row] * 250, tokenizer, samples_per_row=4, batch_size=64)
    exact = nelbo_exact(_token_log_probs(model, facts, row), predicted_tokens(row)) / 5
    assert found.nelbo_standard_error < 0.01 * exact
    assert abs(found.nelbo_per_token - exact) < 4 * found.nelbo_standard_error


@pytest.mark.parametrize(("block_size", "shift"), [(1, 0), (2, 1), (3, 0), (3, 1), (8, 0)])
def test_the_mean_under_a_block_layout_is_its_nelbo_by_enumeration(block_size, shift):
    model, facts, tokenizer = converted(layout="block", block_size=block_size, shift=shift)
    row = packed_row(6)
    found = evaluate_nll(model, facts, [row] * 250, tokenizer, samples_per_row=4, batch_size=64)
    num_predicted = int(predicted_tokens(row).sum())
    exact = nelbo_exact(_token_log_probs(model, facts, row), predicted_tokens(row), block_size) / num_predicted
    assert abs(found.nelbo_per_token - exact) < 4 * found.nelbo_standard_error + 1e-5 * exact


@pytest.mark.parametrize("causal_context", [False, True])
def test_blocks_of_one_token_cost_what_the_autoregressive_model_does(causal_context):
    model, facts, tokenizer = converted(layout="block", block_size=1, shift=1, causal_context=causal_context)
    found, ar = (
        evaluate_nll(model, facts, PACKED, tokenizer, samples_per_row=2),
        evaluate_ar_nll(model, PACKED, tokenizer),
    )
    # The AR model gives the mask token a share; the diffusion model never does.
    assert found.nelbo_per_token < ar.nll_per_token
    assert found.nelbo_per_token == pytest.approx(ar.nll_per_token, rel=5e-3)


def _masked_cross_entropy(model, facts, document):
    """Expected sum of masked losses and expected number of masked tokens, at a level t uniform in (0, 1)."""
    log_probs, n = _token_log_probs(model, facts, document), len(document["clean_ids"]) - 1
    cross_entropy, num_masked = 0.0, 0.0
    for m in range(1, n + 1):
        chance = 1 / ((n + 1) * math.comb(n, m))  # of one set of m
        is_masked = torch.zeros(math.comb(n, m), n + 1, dtype=torch.bool)
        is_masked.scatter_(1, torch.tensor(list(combinations(range(1, n + 1), m))), True)
        cross_entropy -= chance * log_probs(is_masked)[is_masked].double().sum().item()
        num_masked += chance * is_masked.sum().item()
    return cross_entropy, num_masked


def test_masked_cross_entropy_is_that_of_uniform_noise_levels_by_enumeration():
    model, facts, tokenizer = converted()
    torch.nn.init.normal_(model.lm_head.weight)
    short, long = packed_row(2, seed=8), packed_row(7, seed=2)
    row = {name: torch.cat([short[name], long[name]]) for name in short}
    row["document_ids"] = torch.tensor([0] * 2 + [1] * 7)
    (of_short, num_short), (of_long, num_long) = (_masked_cross_entropy(model, facts, each) for each in (short, long))
    assert abs(of_short / num_short - of_long / num_long) > 5  # so that it matters how documents are weighed
    expected = (of_short + of_long) / (num_short + num_long)
    found = evaluate_nll(model, facts, [row] * 300, tokenizer, samples_per_row=4, batch_size=64)
    assert found.masked_cross_entropy_standard_error < 0.005 * expected
    assert abs(found.masked_cross_entropy - expected) < 4 * found.masked_cross_entropy_standard_error


def test_a_uniform_model_costs_log_of_the_vocabulary_less_the_mask_token():
    model, facts, tokenizer = converted()
    torch.nn.init.zeros_(model.lm_head.weight)
    found = evaluate_nll(model, facts, PACKED, tokenizer)
    expected = math.log(model.lm_head.out_features - 1)
    assert found.nelbo_per_token == pytest.approx(expected, rel=1e-6)
    assert found.masked_cross_entropy == pytest.approx(expected, rel=1e-6)
    assert [noise_bin.cross_entropy for noise_bin in found.bins] == pytest.approx([expected] * 5, rel=1e-6)
    assert found.nelbo_standard_error < 1e-6
    assert found.masked_cross_entropy_standard_error < 1e-6


def test_the_batch_size_changes_nothing_but_rounding():
    model, facts, tokenizer = converted()
    one, four = (evaluate_nll(model, facts, PACKED, tokenizer, batch_size=size) for size in (1, 4))
    assert [b.num_tokens for b in one.bins] == [b.num_tokens for b in four.bins]
    assert one.row_nelbo == pytest.approx(four.row_nelbo, rel=1e-6)
    assert one.masked_cross_entropy == pytest.approx(four.masked_cross_entropy, rel=1e-6)
    ar_one, ar_four = (evaluate_ar_nll(model, PACKED, tokenizer, batch_size=size) for size in (1, 4))
    assert ar_one.nll_per_token == pytest.approx(ar_four.nll_per_token, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_ar_nll_of_one_document_rows_is_transformers_own_loss(family):
    model, rows = FAMILIES[family](), [packed_row(12, seed=seed) for seed in range(3)]
    found = evaluate_ar_nll(model, rows, tiny_tokenizer(), batch_size=2)
    with torch.no_grad():
        losses = [model(row["clean_ids"][None], labels=row["clean_ids"][None]).loss.item() for row in rows]
    assert found.nll_per_token == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert found.nll_standard_error == pytest.approx(torch.tensor(losses).std().item() / math.sqrt(3), rel=1e-3)
    assert found.num_tokens == 3 * 11


def test_a_packed_row_costs_what_its_documents_cost_alone():
    model, facts, tokenizer = converted()
    row = PACKED[2]
    packed = evaluate_nll(model, facts, [row], tokenizer)
    singles = [evaluate_nll(model, facts, [alone(row, document)], tokenizer) for document in (1, 2)]
    assert packed.row_nelbo[0] == pytest.approx(sum(single.row_nelbo[0] for single in singles), rel=1e-5)
    assert packed.num_tokens == sum(single.num_tokens for single in singles)
    ar_packed = evaluate_ar_nll(model, [row], tokenizer)
    ar_singles = [evaluate_ar_nll(model, [alone(row, document)], tokenizer) for document in (1, 2)]
    total = sum(single.nll_per_token * single.num_tokens for single in ar_singles)
    assert ar_packed.nll_per_token * ar_packed.num_tokens == pytest.approx(total, rel=1e-5)


def _noised_ids(model, facts, tokenizer, rows, **options):
    seen = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    evaluate_nll(model, facts, rows, tokenizer, **options)
    hook.remove()
    return torch.cat(seen)


def test_masks_depend_on_seed_and_row_alone():
    (model, facts, tokenizer), (other, *_) = converted(), converted(family="gpt2", seed=3)
    one = _noised_ids(model, facts, tokenizer, PACKED)
    assert torch.equal(one, _noised_ids(other, facts, tokenizer, PACKED, batch_size=1))
    assert torch.equal(one[8:16], _noised_ids(model, facts, tokenizer, [PACKED[0], PACKED[1]])[8:])
    assert not torch.equal(one, _noised_ids(model, facts, tokenizer, PACKED, seed=1))


def test_each_document_has_a_level_of_its_own_and_each_row_new_masks():
    model, facts, tokenizer = converted()
    row = packed_row(30, 30)
    is_masked = _noised_ids(model, facts, tokenizer, [row, row], samples_per_row=64) == facts.mask_token_id
    first, second = is_masked[:64, :30].sum(1), is_masked[:64, 30:].sum(1)
    assert len((first - second).unique()) > 1
    assert not torch.equal(is_masked[:64], is_masked[64:])


@layouts
def test_only_what_can_be_predicted_is_masked_for_every_shift(layout, shift):
    model, facts, tokenizer = converted(layout=layout, shift=shift)
    row = packed_row(4, 6, 1, padding=3)
    row["is_maskable"][6] = False
    is_masked = _noised_ids(model, facts, tokenizer, [row], samples_per_row=64) == facts.mask_token_id
    assert is_masked.any(0).nonzero()[:, 0].tolist() == [1, 2, 3, 5, 7, 8, 9]


def test_bins_partition_the_masked_tokens():
    model, facts, tokenizer = converted()
    rows = [packed_row(11, seed=seed) for seed in range(4)]
    num_masked = int((_noised_ids(model, facts, tokenizer, rows) == facts.mask_token_id).sum())
    found = evaluate_nll(model, facts, rows, tokenizer, num_bins=4)
    assert sum(noise_bin.num_tokens for noise_bin in found.bins) == num_masked
    mean = sum(noise_bin.cross_entropy * noise_bin.num_tokens for noise_bin in found.bins) / num_masked
    assert found.masked_cross_entropy == pytest.approx(mean, rel=1e-9)  # documents of one length weigh the same
    edges = [(noise_bin.low, noise_bin.high) for noise_bin in found.bins]
    assert edges == [(0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)]


def test_a_bin_holds_documents_of_its_share_of_masked_tokens():
    model, facts, tokenizer = converted()
    row = packed_row(6)  # shares are 1/5, 2/5, ..., each the upper edge of a bin
    found = evaluate_nll(model, facts, [row], tokenizer, samples_per_row=10)
    assert [noise_bin.num_tokens for noise_bin in found.bins] == [2, 4, 6, 8, 10]
    empty = evaluate_nll(model, facts, [packed_row(2)], tokenizer).bins
    assert [noise_bin.num_tokens for noise_bin in empty] == [0, 0, 0, 0, 8]
    assert empty[0].cross_entropy is None


def test_bits_per_byte_by_hand():
    model, facts, tokenizer = converted()
    text = "the reason in ünit é "
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    row = {
        "clean_ids": torch.tensor(ids),
        "document_ids": torch.zeros(len(ids), dtype=torch.int64),
        "is_maskable": torch.ones(len(ids), dtype=torch.bool),
    }
    num_bytes = len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
    found = evaluate_nll(model, facts, [row], tokenizer)
    assert (found.num_tokens, found.num_bytes) == (len(ids) - 1, num_bytes)
    expected = found.nelbo_per_token * found.num_tokens / math.log(2) / num_bytes
    assert found.bits_per_byte == pytest.approx(expected, rel=1e-9)
    ar = evaluate_ar_nll(model, [row], tokenizer)
    assert ar.bits_per_byte == pytest.approx(ar.nll_per_token * len(ids[1:]) / math.log(2) / num_bytes, rel=1e-9)


def test_modes_come_back_and_no_gradient_is_left():
    model, facts, tokenizer = converted(family="gpt2")
    model.train()
    model.transformer.h[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    evaluate_nll(model, facts, PACKED, tokenizer)
    evaluate_ar_nll(model, PACKED, tokenizer)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_dropout_is_off_while_measuring():
    model, facts, tokenizer = converted(family="gpt2")
    expected = evaluate_nll(model, facts, PACKED, tokenizer).row_nelbo
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert evaluate_nll(model.train(), facts, PACKED, tokenizer).row_nelbo == expected


def test_a_subset_of_rows_is_spread_over_all():
    model, facts, tokenizer = converted()
    rows = [packed_row(8, seed=seed) for seed in range(6)]
    everything = evaluate_nll(model, facts, rows, tokenizer)
    subset = evaluate_nll(model, facts, rows, tokenizer, num_rows=3)
    assert subset.row_nelbo == pytest.approx(everything.row_nelbo[::2], rel=1e-6)
    assert evaluate_nll(model, facts, rows, tokenizer, num_rows=100).num_rows == 6


def test_progress_is_reported_to_the_end():
    model, facts, tokenizer = converted()
    reported = []
    evaluate_nll(model, facts, PACKED, tokenizer, batch_size=10, on_progress=lambda *counts: reported.append(counts))
    assert reported == [(10, 24), (20, 24), (24, 24)]


def test_the_difference_of_two_models_is_measured_row_by_row():
    model, facts, tokenizer = converted()
    close = converted()[0]
    with torch.no_grad():
        close.lm_head.weight.mul_(1.01)
    rows = [packed_row(9, 5, seed=seed) for seed in range(20)]
    first, second = (evaluate_nll(of, facts, rows, tokenizer) for of in (model, close))
    difference = nelbo_difference(first, second)
    assert difference.value == pytest.approx(first.nelbo_per_token - second.nelbo_per_token, rel=1e-6)
    assert difference.standard_error < 0.1 * first.nelbo_standard_error
    with pytest.raises(ValueError, match="same rows"):
        nelbo_difference(first, evaluate_nll(model, facts, rows, tokenizer, seed=1))


def test_the_ar_source_stands_beside_only_if_measured_on_the_same_rows():
    model, facts, tokenizer = converted()
    likelihood = evaluate_nll(model, facts, PACKED, tokenizer)
    ar = evaluate_ar_nll(model, PACKED, tokenizer)
    both = beside(likelihood, ar)
    assert (both.ar_nll_per_token, both.ar_bits_per_byte) == (ar.nll_per_token, ar.bits_per_byte)
    with pytest.raises(ValueError, match="tokens"):
        beside(likelihood, evaluate_ar_nll(model, PACKED[:2], tokenizer))


@pytest.fixture
def checkpoint(tmp_path):
    """A source, a model converted from it, and text to measure them on."""
    source, tokenizer = FAMILIES["llama"](), tiny_tokenizer()
    source.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    model, facts, tokenizer = converted()
    facts = ConversionFacts(source=str(tmp_path / "source"), **_stored(facts))
    save_converted(tmp_path / "converted", model, tokenizer, facts)
    (tmp_path / "text.txt").write_text("the reason in the tent " * 12)
    return tmp_path


def _stored(facts):
    return {"layout": facts.layout, "shift": facts.shift, "mask_token_id": facts.mask_token_id}


@pytest.fixture
def measure(checkpoint, monkeypatch):
    monkeypatch.setattr("decausal.data.rows.HF_HOME", str(checkpoint / "cache"))

    def measured(**options):
        directory, data = checkpoint / "converted", checkpoint / "text.txt"
        return evaluate_checkpoint(directory, data, **{"max_length": 32, "device": "cpu", **options})

    return measured


def test_a_checkpoint_is_measured_beside_its_source(measure):
    found = measure()
    # The converted model has the source's weights: what differs is that it reads both ways.
    assert found.ar_missing is None
    assert found.ar_nll_per_token != pytest.approx(found.nelbo_per_token, rel=1e-3)
    assert measure(with_source=False).ar_nll_per_token is None
    assert json.loads(json.dumps(found.as_dict()))["ar_bits_per_byte"] == found.ar_bits_per_byte


def test_a_source_that_is_gone_is_named_and_the_rest_still_measured(measure, checkpoint):
    (checkpoint / "source").rename(checkpoint / "moved")
    found = measure()
    assert found.ar_nll_per_token is None
    assert str(checkpoint / "source") in found.ar_missing
    assert found.nelbo_per_token > 0


def test_a_source_with_another_tokenizer_is_compared_by_bits_per_byte_alone(measure, checkpoint):
    same = measure()
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["zebra"])  # which the text does not hold: the rows are the same
    tokenizer.save_pretrained(checkpoint / "source")
    found = measure()
    assert "another tokenizer" in found.ar_missing
    assert found.ar_nll_per_token is None
    assert found.ar_bits_per_byte == pytest.approx(same.ar_bits_per_byte)
    assert found.as_table().row_count == same.as_table().row_count - 1


@pytest.mark.parametrize("batch_size", [1, 3, 4, 9])
def test_a_block_model_reads_clean_tokens_once_for_all_views_of_a_pass(batch_size, monkeypatch):
    model, facts, tokenizer = converted(layout="block", block_size=2, shift=1)
    passes = []
    real = likelihood.noised_states

    def counted(model, facts, clean_ids, document_ids, is_masked):
        passes.append(tuple(is_masked.shape[:2]))
        return real(model, facts, clean_ids, document_ids, is_masked)

    monkeypatch.setattr(likelihood, "noised_states", counted)
    found = evaluate_nll(model, facts, PACKED, tokenizer, samples_per_row=4, batch_size=batch_size)
    per_row = {1: [(1, 1)] * 4, 3: [(1, 3), (1, 1)], 4: [(1, 4)]}
    assert passes == (per_row[batch_size] * 3 if batch_size in per_row else [(2, 4), (1, 4)])
    alone = evaluate_nll(model, facts, PACKED, tokenizer, samples_per_row=4, batch_size=1)
    assert found.row_nelbo == pytest.approx(alone.row_nelbo, rel=1e-5)


def test_rows_longer_than_the_context_are_refused(measure):
    with pytest.raises(UserError, match="--max_length 65 is over the model's maximum of 64"):
        measure(max_length=65)


@pytest.mark.parametrize("option", ["num_rows", "samples_per_row", "batch_size", "num_bins"])
def test_counts_below_one_are_refused_by_name(option):
    model, facts, tokenizer = converted()
    with pytest.raises(UserError, match=f"--{option} 0"):
        evaluate_nll(model, facts, PACKED, tokenizer, **{option: 0})


@pytest.mark.parametrize("rows", [[], [packed_row(1, 1, padding=3)]], ids=["none", "single tokens"])
def test_nothing_to_measure_is_refused(rows):
    model, facts, tokenizer = converted()
    with pytest.raises(UserError, match="give other data"):
        evaluate_nll(model, facts, rows, tokenizer)
    with pytest.raises(UserError, match="give other data"):
        evaluate_ar_nll(model, rows, tokenizer)
