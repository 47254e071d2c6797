"""The on-policy benchmark runs, and what teacher and student do is their floor where nothing needs padding."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from decausal.data.prompts import Prompts
from tests.benchmarks.test_train_step import BENCHMARKS, directory  # noqa: F401 - a fixture

ARGUMENTS = {
    **{"device": "cpu", "bf16": False, "prompts": 2, "prompt_length": 8, "new_tokens": 8, "block_size": 4},
    **{"states": 2, "threshold": 0.9, "seed": 0},
}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import opd_floor
    import opd_step

    return SimpleNamespace(step=opd_step, floor=opd_floor)


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("shift", [0, 1])
def test_matrix_products_of_teacher_and_student_are_those_of_their_floor(benchmark, directory, shift, top_k):  # noqa: F811
    work = benchmark.step.Workload.of(str(directory), Namespace(**ARGUMENTS, shift=shift, top_k=top_k))
    work.rows.prompts = Prompts.of([torch.arange(8, dtype=torch.int32).numpy()] * 2)
    batch = work.batch(0)
    answers = {}
    teacher = benchmark.floor.count_operations(lambda: answers.update(work.ask(batch)), with_attention=False)
    student = benchmark.floor.count_operations(lambda: work.train(batch, work.term, answers), with_attention=False)
    shape = benchmark.step.ModelShape.of(work.student)
    shape = type(shape)(shape.body_weights, 0, shape.width, shape.vocab_size)
    floor = benchmark.floor.training_floor(shape, list(work.rows._rollouts.values()), batch, work.rows.plan, top_k)
    assert teacher == pytest.approx(floor["teacher"], rel=1e-12)
    if shift == 0:
        assert student == pytest.approx(floor["student"], rel=1e-12)
    else:  # a view leaves out blocks of which the clean tokens predict all
        assert student <= floor["student"]


def test_the_script_measures_all_parts_and_writes_its_figures(benchmark, directory, tmp_path, monkeypatch):  # noqa: F811
    output = tmp_path / "figures.json"
    options = ["--model", str(directory), "--device", "cpu", "--rounds", "1", "--json", str(output)]
    options += ["--prompts", "3", "--prompt_length", "8", "--new_tokens", "6"]
    monkeypatch.setattr(sys, "argv", ["opd_step.py", *options])
    benchmark.step.main()
    figures = json.loads(output.read_text())
    assert figures.keys() >= {"hardware", "versions", "commit", "command", "date"}
    measured = figures["models"][str(directory)]
    assert all(seconds > 0 for seconds in measured["seconds"].values())
    operations = measured["operations"]
    assert operations["counted"].keys() == operations["floor"].keys() == {"rollout", "teacher", "student"}
    assert operations["ratio"] >= 1
    assert measured["memory"]["ratio"] < 1
