"""The benchmark of approximate caches measures nothing where the cache is exact, and something where it is not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from decausal.models.checkpoint import save_converted
from decausal.sampling.bidirectional.denoiser import Denoiser
from tests.sampling.tiny_models import converted

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODEL = converted()


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cache_error

    return cache_error


def test_distances_are_those_of_the_distributions_and_none_between_equal_states(benchmark: ModuleType) -> None:
    denoiser = Denoiser(MODEL.model, MODEL.facts, 1)
    exact, cached = torch.randn(2, 3, MODEL.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    assert benchmark.distances(denoiser, exact, exact) == (0, 0)
    divergence, variation = benchmark.distances(denoiser, exact, cached)
    kept = [token for token in range(MODEL.model.config.vocab_size) if token != MODEL.facts.mask_token_id]
    weight = MODEL.model.get_output_embeddings().weight.detach()[kept]
    p, q = ((states @ weight.T).double().softmax(-1) for states in (exact, cached))
    assert divergence == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)
    assert variation == pytest.approx(float((p - q).abs().sum(-1).mean() / 2), rel=1e-3)


def test_it_runs_says_with_what_and_finds_no_error_where_every_pass_reads_the_whole_row(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    save_converted(tmp_path / "model", *MODEL)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "def area(width, height):\n    return width\n" * 2}))
    sizes = [
        "--num_rows",
        "2",
        "--prefix",
        "9",
        "--gap",
        "12",
        "--suffix",
        "5",
        "--window",
        "4",
        "--refresh",
        "1,never",
    ]
    flags = ["--data", str(tmp_path / "text.jsonl"), "--device", "cpu", "--json", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", ["cache_error.py", str(tmp_path / "model"), *flags, *sizes])
    benchmark.main()
    header, table = capsys.readouterr().out.split("\n", 1)
    assert {"command", "date", "commit", "hardware", "versions", "settings"} <= json.loads(header).keys()
    found = json.loads((tmp_path / "found.json").read_text())["figures"]
    assert all(name in table for name in found)
    for cache in ("prefix", "dual"):
        exact, approximate = found[f"{cache}, every 1 passes"], found[f"{cache}, at each window"]
        assert {**exact, "seconds": 1} == {**found["exact"], "seconds": 1}
        assert approximate["KL"] > 0
        assert 0 < approximate["TV"] <= 1
        assert approximate["tokens read"] < approximate["passes"]
    assert found["dual, at each window"]["tokens read"] < found["prefix, at each window"]["tokens read"]
