"""The benchmark runs, and the steps that it times do the operations of its floor and no others."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BATCH, LENGTH, VOCABULARY = 4, 32, 90


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cases
    import floors
    import measure
    import train_step

    return SimpleNamespace(cases=cases, floors=floors, measure=measure, train_step=train_step)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    config = Qwen3Config(
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("model")
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def work(benchmark, directory):
    args = Namespace(bf16=False, batch_size=BATCH, length=LENGTH, documents=1, seed=0)
    return benchmark.train_step.Workload.of(str(directory), torch.device("cpu"), args)


def _addmm_flops(_sum, left, right, **_):
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("name", ["plain", "aligned", "plain_2_views", "aligned_2_views"])
def test_matrix_products_of_a_step_are_those_of_its_floor(benchmark, work, name):
    case = benchmark.cases.CASES[name]
    batch = work.batches(case.views)[0]
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops}) as counter:
        work.forward_backward(case.loss, batch)
    counts = counter.get_flop_counts()["Global"]
    counted = sum(count for operator, count in counts.items() if "mm" in str(operator))

    shape = benchmark.floors.ModelShape.of(work.arms.student)
    without_attention = benchmark.floors.ModelShape(shape.body_weights, 0, shape.width, shape.vocab_size)
    tokens = BATCH * LENGTH
    target_share = len(batch["target_ids"]) / tokens
    per_token = (
        without_attention.aligned_step(LENGTH, target_share, case.views)
        if case.is_aligned
        else without_attention.plain_step(LENGTH, target_share)
    )
    assert counted == pytest.approx(per_token * tokens, rel=1e-12)


@pytest.mark.parametrize(("ours", "naive"), [("plain", "naive_plain"), ("aligned", "naive_aligned")])
def test_the_naive_step_computes_the_same_loss_and_gradient(benchmark, work, ours, naive):
    batch, values, gradients = work.batches(1)[0], [], []
    for name in (ours, naive):
        value = benchmark.cases.CASES[name].loss(work.arms, batch)
        values.append(value)
        gradients.append(torch.autograd.grad(value, list(work.arms.student.parameters())))
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_peak_memory_of_a_chain_is_its_two_largest_neighbours(benchmark):
    start = torch.zeros(1000)

    def chain() -> None:
        small = start + 1
        large = torch.cat([small, small, small])
        del small
        large.exp_()
        (large * 2).sum()

    assert benchmark.measure.peak_bytes(chain, torch.device("cpu")) == 4 * (3000 + 3000 + 1)


def test_reading_a_value_on_the_host_is_counted(benchmark):
    values = torch.arange(3)
    assert benchmark.measure.host_waits(lambda: (values + 1).sum(), torch.device("cpu")) == 0
    assert benchmark.measure.host_waits(lambda: (values.sum().item(), values.nonzero()), torch.device("cpu")) == 2


def test_the_script_measures_every_case_and_writes_its_figures(benchmark, directory, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark.train_step, "LOSS_VOCABULARY", 500)
    output = tmp_path / "figures.json"
    options = ["--model", str(directory), "--device", "cpu", "--steps", "1", "--batch_size", "2", "--length", "16"]
    monkeypatch.setattr(sys, "argv", ["train_step.py", *options, "--json", str(output)])
    benchmark.train_step.main()
    figures = json.loads(output.read_text())
    assert figures.keys() >= {"hardware", "versions", "commit", "command", "date"}
    measured = figures["models"][str(directory)]["cases"]
    assert set(measured) == set(benchmark.cases.CASES)
    assert all(case["seconds"] > 0 and case["memory_bytes"] > 0 for case in measured.values())
    assert all(measured[name]["host_waits"] == 0 for name in measured if not name.startswith("naive"))
    assert measured["aligned"]["floor"] > measured["aligned_2_views"]["floor"] > measured["plain"]["floor"] == 1
