"""Identity 9: a run that was killed, or whose disk filled up, at any call that writes, renames or removes, is resumed.

What each of these calls leaves is found in one run (`tests/faults.py`). Resuming then gives the undisturbed weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from decausal.models.facts import FACTS_FILE
from decausal.training.run_directory import STAGING, claimed
from tests.faults import Fault, State, digest, faults_of, put_back, state_of
from tests.runs import assert_same, run, save_source, weights, write_text

OPTIONS = {"max_steps": 2, "save_steps": 1, "save_total_limit": 1}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, its data, and a run that nothing disturbed."""
    root = tmp_path_factory.mktemp("survival")
    save_source(root / "model")
    write_text(root / "text.jsonl")
    (root / "prompts.txt").write_text("the rain in\n")
    train(root, root / "whole")
    return root


def train(root: Path, output_dir: Path, **options: object) -> None:
    samples = {"sample_prompts": str(root / "prompts.txt"), "sample_tokens": 2, "eval_steps": 1}
    run(root / "model", root / "text.jsonl", output_dir, **OPTIONS | samples | options)


@pytest.fixture(scope="module")
def first(root: Path) -> list[Fault]:
    """Of a run from the beginning."""
    return faults_of(lambda: train(root, root / "out"), root / "out", root / "report")


@pytest.fixture(scope="module")
def second(root: Path, first: list[Fault]) -> list[Fault]:
    """Of a run that is resumed, after the first was killed while it wrote the second checkpoint's weights."""
    interrupted = next(fault for fault in first if fault.path == f"{STAGING}/checkpoint-2/model.safetensors")
    put_back(interrupted.killed, root / "again")
    return faults_of(
        lambda: train(root, root / "again", resume_from_checkpoint="true"), root / "again", root / "report"
    )


def left_by(faults: list[Fault]) -> dict[str, State]:
    """What these faults leave, once for each state of all that is outside of the staging directory.

    A kill in the middle of a write leaves a part of the file, too.
    """
    left: dict[str, State] = {}
    for fault, later in zip(faults, [*faults[1:], None], strict=True):
        states = [fault.killed] if fault.full is None else [fault.killed, fault.full]
        if fault.call == "open" and later is not None:
            name, whole = fault.path, later.killed.get(fault.path)
            states += [later.killed | {name: whole[: len(whole) // 2]}] if whole else []
        for state in states:
            left.setdefault(digest({name: part for name, part in state.items() if STAGING not in name}), state)
    return left


def test_a_full_disk_is_reported_in_one_line_wherever_it_strikes(first: list[Fault], second: list[Fault]) -> None:
    for fault in [*first, *second]:
        if fault.full is not None:
            assert "No space left on device" in fault.message, fault.path
            assert "\n" not in fault.message, fault.path
            if fault.path not in (".", ".lock"):  # from there on the directory is the run's to tidy up
                assert not any(STAGING in name or "tmp" in name for name in fault.full), fault.path
    names = {Path(fault.path).name for fault in first}
    assert {".lock", "model.safetensors", "optimizer.pt", "rng_state.pth", "decausal.json", "checkpoint-1"} <= names
    assert sum(fault.path.startswith("samples.jsonl") for fault in first) >= 4


def test_whatever_is_left_a_plain_resume_has_the_undisturbed_weights(
    root: Path, first: list[Fault], second: list[Fault], tmp_path: Path
) -> None:
    left = left_by(first) | left_by(second)
    assert len(left) > 15
    for number, state in enumerate(left.values()):
        output_dir = tmp_path / str(number)
        put_back(state, output_dir)
        train(root, output_dir, resume_from_checkpoint="true")
        assert_same(weights(output_dir), weights(root / "whole"))
        assert state_of(output_dir).keys() == state_of(root / "whole").keys()
        assert (output_dir / "samples.jsonl").read_text() == (root / "whole" / "samples.jsonl").read_text()
        shutil.rmtree(output_dir)


def test_a_directory_without_facts_is_never_taken_for_a_model(first: list[Fault], second: list[Fault]) -> None:
    for fault in [*first, *second]:
        if FACTS_FILE in fault.killed:
            assert fault.killed["model.safetensors"] == first[-1].killed["model.safetensors"]


def overwrite(output_dir: Path) -> None:
    with claimed(output_dir, overwrite=True) as run_directory:
        run_directory.begin({"seed": 1}, overwrite=True)


def test_overwriting_that_was_stopped_can_be_had_again_and_leaves_no_half_model(root: Path, tmp_path: Path) -> None:
    whole, out = state_of(root / "whole"), tmp_path / "out"
    put_back(whole, out)
    faults = faults_of(lambda: overwrite(out), out, tmp_path / "report")
    assert len(faults) > len(whole)
    for fault in faults:
        for state in (fault.killed, fault.full):
            if state is not None:
                assert FACTS_FILE not in state or state.items() >= whole.items()
                put_back(state, tmp_path / "again")
                overwrite(tmp_path / "again")
                assert state_of(tmp_path / "again") == {}
