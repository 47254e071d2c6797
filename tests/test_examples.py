"""The scripts and notebooks of examples/ run, on tiny models."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from decausal.models.checkpoint import save_converted
from decausal.models.facts import read_facts
from tests.families import FAMILIES, tiny_tokenizer
from tests.runs import ROOT, write_text
from tests.sampling.tiny_models import converted

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AR model, a converted one, and text."""
    folder = tmp_path_factory.mktemp("examples")
    FAMILIES["qwen3"](max_position_embeddings=256).save_pretrained(folder / "ar")
    tiny_tokenizer().save_pretrained(folder / "ar")
    model = converted()
    save_converted(folder / "diffusion", model.model, model.tokenizer, model.facts)
    write_text(folder / "text.jsonl")
    return folder


@pytest.fixture(autouse=True)
def _in_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("decausal.data.rows.HF_HOME", str(folder / "cache"))


def script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def execute(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Runs the code of a notebook from top to end, with other values for the cell tagged "parameters"."""
    notebook = json.loads((EXAMPLES / f"{name}.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names: dict[str, Any] = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        exec(compile("".join(cell["source"]), f"{name}.ipynb, cell {number}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            assert parameters.keys() <= names.keys()
            names.update(parameters)
    plt.close("all")
    return names


def test_a_model_is_converted_measured_and_writes(capsys: pytest.CaptureFixture[str]) -> None:
    script("convert")["main"]("ar", "text.jsonl", "converted", max_steps=2)
    printed = capsys.readouterr().out
    assert "token loss: " in printed
    assert "NELBO " in printed
    assert "def add(a, b):" in printed
    assert read_facts(Path("converted")).layout == "bidirectional"


def test_an_own_objective_is_trained_and_logged() -> None:
    log = script("own_objective")["main"]("ar", "text.jsonl", "own-objective", max_steps=2)
    (first, _) = [entry for entry in log if "z_loss" in entry]
    # The total is in the log beside the terms: the objective counts, with its weight.
    assert first["loss"] == pytest.approx(first["token_loss"] + 1e-3 * first["z_loss"], abs=1e-4)
    assert read_facts(Path("own-objective")).shift == 1


def test_an_own_sampler_writes_from_both_ends_and_keeps_what_is_given() -> None:
    prefix = "def f():\n"
    text = script("own_sampler")["main"]("diffusion", prefix, 5)
    assert text.startswith(prefix)
    assert text.endswith("\n    return area\n")
    assert "<|mask|>" not in text


def test_the_notebook_that_watches_denoising(capsys: pytest.CaptureFixture[str]) -> None:
    names = execute("watch_denoising", {"MODEL": "diffusion", "NUM_TOKENS": 8})
    assert len(names["steps"]) == names["written"].num_forwards == 8
    assert [text.count("·") for text in names["steps"]] == list(range(7, -1, -1))


def test_the_notebook_that_compares_recipes() -> None:
    shared = {"max_length": "24", "per_device_train_batch_size": "2", "learning_rate": "1e-3"}
    own = {"MODEL": "ar", "DATA": "text.jsonl", "HELD_OUT": "text.jsonl", "SHARED": shared, "MAX_STEPS": 4}
    names = execute("compare_recipes", own)
    assert [run["arm"] for run in names["report"]["runs"]] == ["mdm", "repr-align"]
    assert len(names["nelbo"]) == 5
    assert (Path("compared") / "report.png").stat().st_size > 0
