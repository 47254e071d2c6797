"""The decoding benchmark runs, and what it compares writes the same text or as much of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from decausal.models.checkpoint import save_converted
from tests.sampling.block_decoding import sharp_model
from tests.sampling.tiny_models import converted

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OPTIONS = ["--device", "cpu", "--batch_sizes", "1", "3", "--prompt_length", "9", "--new_tokens", "11", "--rounds", "1"]


@pytest.fixture
def decode(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import decode

    return decode


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    sharp_model().float().save_pretrained(path)
    return path


def test_every_case_writes_as_much_and_the_autoregressive_one_the_same(decode: ModuleType, directory: Path) -> None:
    work = decode.workload(decode._arguments([*OPTIONS, "--model", str(directory)]), str(directory))
    stock = work.transformers(3)
    runs = {name: work.engine(name, 3) for name in work.cases}
    assert runs["engine, AR"].ids == stock.ids
    for run in runs.values():
        assert [len(ids) for ids in run.ids] == [11] * 3
    steps = {name: run.passes_per_block for name, run in runs.items()}
    # 3 of the first block's positions and 8 after them, in the given number of steps per block.
    assert steps["block 4, 1 steps"] == 1
    assert steps["block 4, 2 steps"] == 2
    assert steps["block 4, 4 steps"] == steps["block 4, 4 steps, unfused"] == 11 / 3
    assert runs["block 4, 4 steps"].ids == runs["block 4, 4 steps, unfused"].ids
    assert runs["block 4, 4 steps"].tokens_per_forward == 1
    # A pass of its own for the prompt's two blocks and for each finished one but the last.
    assert runs["block 4, 4 steps, unfused"].tokens_per_forward == pytest.approx(11 / (11 + 3))


def test_the_script_writes_its_figures(decode: ModuleType, directory: Path, tmp_path: Path, monkeypatch: Any) -> None:
    decode.main([*OPTIONS, "--model", str(directory), "--threshold", "0.9", "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures.keys() >= {"hardware", "versions", "commit", "command", "date"}
    records = figures["models"][str(directory)]
    assert {record["batch_size"] for record in records} == {1, 3}
    assert {record["case"] for record in records} >= {"transformers", "engine, AR", "block 4, threshold 0.9"}
    for record in records:
        assert record["seconds_per_pass"] > 0
        if record["case"] == "transformers":
            assert record["pass_ratio"] == record["speed_ratio"] == 1


def test_a_converted_model_is_measured_as_it_is_on_real_prompts(decode: ModuleType, tmp_path: Path) -> None:
    save_converted(tmp_path / "model", *converted(layout="block", block_size=2))
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": "the rain " * 9 + str(i)}) + "\n" for i in range(4))
    )
    arguments = [*OPTIONS, "--model", str(tmp_path / "model"), "--data", str(tmp_path / "text.jsonl")]
    work = decode.workload(decode._arguments(arguments), str(tmp_path / "model"))
    assert set(work.cases) == {"engine, AR", "block 2, 2 steps", "block 2, 1 steps", "block 2, 2 steps, unfused"}
    assert work.prompts.shape == (3, 9)
    assert converted().tokenizer.decode(work.prompts[0]).startswith("the rain")
    save_converted(tmp_path / "other", *converted())
    with pytest.raises(SystemExit, match="layout 'bidirectional'"):
        decode.workload(decode._arguments(arguments), str(tmp_path / "other"))
