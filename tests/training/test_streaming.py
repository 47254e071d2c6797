"""Runs on streamed data end as if they had never been interrupted, whatever is left of the windows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from decausal.cli import main
from decausal.compare.arms import arm_run, read_arms
from decausal.compare.settings import CompareSettings
from decausal.data import reading, rows, streamed_rows
from decausal.errors import UserError
from decausal.training.settings import ConversionSettings
from tests.families import tiny_tokenizer
from tests.runs import T, assert_same, run, save_source, weights, write_text

STREAMED = {"streaming": True, "streaming_window": 4, "seed": 3, "max_steps": 6}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, its data, and a whole run of six steps."""
    root = tmp_path_factory.mktemp("streaming")
    save_source(root / "model")
    write_text(root / "text.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed_rows, "CACHE_DIR", root / "cache")
        run(root / "model", root / "text.jsonl", root / "out", **STREAMED)
    return root


@pytest.fixture(autouse=True)
def _own_cache(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(root / "cache", tmp_path / "cache")
    monkeypatch.setattr(streamed_rows, "CACHE_DIR", tmp_path / "cache")
    monkeypatch.setattr(reading, "_SAID", set())


def killed(root: Path, tmp_path: Path) -> Path:
    """The run as if it had been killed after step 4."""
    out = shutil.copytree(root / "out", tmp_path / "out")
    shutil.rmtree(out / "checkpoint-6")
    (out / "model.safetensors").unlink()
    return out


@pytest.mark.parametrize("left", ["all", "states", "nothing"])
@pytest.mark.parametrize("split", [{}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}])
def test_a_resumed_run_ends_with_the_weights_of_a_whole_one(root: Path, tmp_path: Path, left: str, split: dict) -> None:
    out = killed(root, tmp_path)
    if left == "states":
        for path in (tmp_path / "cache").glob("*/*.rows"):
            path.unlink()
    if left == "nothing":
        shutil.rmtree(tmp_path / "cache")
    options = STREAMED | split | {"resume_from_checkpoint": "true"}
    run(root / "model", root / "text.jsonl", out, **options)
    if split:  # a step's gradients are summed in another order
        expected, found = weights(root / "out"), weights(out)
        assert max(float((expected[name] - found[name]).abs().max()) for name in expected) < 1e-6
    else:
        assert_same(weights(out), weights(root / "out"))


def test_processes_that_load_and_tokenise_change_nothing(root: Path, tmp_path: Path) -> None:
    options = STREAMED | {"dataloader_num_workers": 2, "dataset_num_proc": 2}
    run(root / "model", root / "text.jsonl", tmp_path / "out", **options)
    assert_same(weights(tmp_path / "out"), weights(root / "out"))


def test_other_data_and_another_window_are_refused_on_resuming(root: Path, tmp_path: Path) -> None:
    out = killed(root, tmp_path)
    options = STREAMED | {"resume_from_checkpoint": "true"}
    with pytest.raises(UserError, match=r"--streaming_window 5: .* was trained with 4"):
        run(root / "model", root / "text.jsonl", out, **options | {"streaming_window": 5})
    with pytest.raises(UserError, match=r"--streaming false: .* was trained with true"):
        run(root / "model", root / "text.jsonl", out, **options | {"streaming": False})
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "the hat"}) + "\n" + (root / "text.jsonl").read_text())
    with pytest.raises(UserError, match="the data give other rows"):
        run(root / "model", tmp_path / "other.jsonl", out, **options)


def test_lines_say_that_data_are_streamed_and_what_was_read(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = root / "text.jsonl"
    packed = rows.load_rows(data, tiny_tokenizer(), T, cache_dir=tmp_path / "packed")
    num_steps = len(packed) // 2 + 4
    conversion = run(root / "model", data, tmp_path / "out", **STREAMED | {"max_steps": num_steps, "save_steps": 99})
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("decausal: stream")]
    assert said[0] == f"decausal: streaming {data}: read while training goes on; rows are shuffled within windows of 4"
    assert said[1].startswith(f"decausal: streamed: read {data}: ")
    assert said[1].endswith(" tokens, as 'text'; ended in pass 2 over the data")
    epochs = [log["epoch"] for log in conversion.history if "loss" in log]
    assert epochs[0] == 0
    assert epochs[-1] == round(2 * num_steps / len(packed), 4)


def test_rollouts_and_comparisons_refuse_streaming() -> None:
    with pytest.raises(UserError, match="--streaming true is for --rows corpus: rollouts draw their prompts from all"):
        ConversionSettings("tiny", layout="block", block_size=4, rows="rollout", streaming=True)
    (arm,) = read_arms("mdm", ["mdm.streaming=true"])
    with pytest.raises(UserError, match="streaming of mdm: a comparison packs all rows before a clock starts"):
        arm_run(CompareSettings(recipes="mdm"), arm, 0, is_bf16=False)
    with pytest.raises(UserError, match="--streaming_window 0: must be at least 1"):
        ConversionSettings("tiny", streaming_window=0)


@pytest.mark.parametrize("verb", ["convert", "plan"])
def test_the_length_of_a_run_must_be_given(
    root: Path, tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(root / "text.jsonl"), "--streaming", "true", "--recipe", "mdm"]
    flags += ["--output_dir", str(tmp_path / "out")] if verb == "convert" else []
    assert main([verb, str(root / "model"), *flags]) == 2
    assert "--streaming true needs --max_steps: how many rows the data give is not known" in capsys.readouterr().err


def test_a_plan_looks_at_the_first_window(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", str(root / "text.jsonl"), "--streaming", "true", "--recipe", "mdm", "--max_length", str(T)]
    flags += ["--max_steps", "7", "--streaming_window", "4", "--json", "--gpu", "h200"]
    assert main(["plan", str(root / "model"), *flags]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 7
