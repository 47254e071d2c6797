"""Standard errors with rows as clusters; JSON and table."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console

from decausal.evaluation.likelihood import evaluate_nll
from decausal.evaluation.results import Ratio, ratio_over_rows
from tests.evaluation.rows import converted, packed_row


def test_with_rows_of_one_size_it_is_the_standard_error_of_their_means():
    sums = torch.randn(40, dtype=torch.float64)
    found = ratio_over_rows(sums, torch.full((40,), 5.0, dtype=torch.float64))
    assert found.value == pytest.approx(sums.mean().item() / 5)
    assert found.standard_error == pytest.approx((sums / 5).std().item() / math.sqrt(40))


def test_the_mean_weighs_rows_by_their_tokens():
    assert ratio_over_rows(torch.tensor([2.0, 30.0]), torch.tensor([1.0, 10.0])).value == pytest.approx(32 / 11)


def test_the_standard_error_is_the_spread_of_the_mean_over_repeated_draws():
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(2000):
        counts = torch.randint(1, 30, (50,), generator=generator).double()
        of_row = 3 + torch.randn(50, generator=generator, dtype=torch.float64)
        draws.append(ratio_over_rows(counts * of_row, counts))
    spread = torch.tensor([draw.value for draw in draws]).std().item()
    mean_error = torch.tensor([draw.standard_error for draw in draws]).mean().item()
    assert mean_error == pytest.approx(spread, rel=0.06)


def test_what_cannot_be_said_is_none():
    assert ratio_over_rows(torch.tensor([3.0]), torch.tensor([2.0])) == Ratio(1.5, None)
    assert ratio_over_rows(torch.zeros(4), torch.zeros(4)) == Ratio(None, None)


def test_rows_without_tokens_change_the_mean_by_nothing():
    sums, counts = torch.tensor([2.0, 9.0, 0.0]), torch.tensor([1.0, 4.0, 0.0])
    assert ratio_over_rows(sums, counts).value == ratio_over_rows(sums[:2], counts[:2]).value


@pytest.mark.parametrize("num_rows", [1, 3])
def test_json_and_table_hold_the_figures(num_rows):
    model, facts, tokenizer = converted()
    found = evaluate_nll(model, facts, [packed_row(6, 4, seed=seed) for seed in range(num_rows)], tokenizer)
    record = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert record["nelbo_per_token"] == found.nelbo_per_token
    assert record["bins"][4]["cross_entropy"] == found.bins[4].cross_entropy
    assert "row_nelbo" not in record

    output = io.StringIO()
    Console(file=output, width=120).print(found.as_table())
    assert f"{found.nelbo_per_token:.4f}" in output.getvalue()
    assert f"{found.masked_cross_entropy:.4f}" in output.getvalue()
    assert "80% to 100% masked" in output.getvalue()
    assert "AR source" not in output.getvalue()
